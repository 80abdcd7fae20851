"""GRPO, plain: a policy learns from its own graded samples. This file runs alone, in one process; tlt.py runs the same
loop on many workers.

One step:

    rollout   G samples from each of P prompts                                  rollout.py
    reward    r = 1 if the verifier accepts the answer, else 0 (or any number)  tasks.py
    advantage A = (r - mean of its group) / std of its group                    0 where all rewards of a group are equal
    update    maximise  sum_t w * min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)  - kl * w * k3
              rho = p(token) / p_old(token)

    loss      w, the weight of each token                     advantage
    grpo      1 / (number of responses * its length)          divided by std      DeepSeekMath, arXiv 2402.03300
    dr_grpo   1 / (number of responses * max_new)             not divided         Dr. GRPO, 2503.20783 (1)
    dapo      1 / (number of tokens)                          divided by std      DAPO, 2503.14476 (2)
    gspo      as grpo                                         as grpo             GSPO, 2507.18071 (3)
    cispo     as dapo                                         as grpo             MiniMax-M1, 2506.13585 (4)

    (1) avoids the bias towards short right and long wrong answers   (2) every token counts the same
    (3) rho is the ratio of the whole response, the geometric mean of its tokens' (parts/training/losses.py). It equals
        grpo in the first update of a rollout, where rho = 1; with one update per rollout, that is always
    (4) w * clip(rho) A log p instead of w * min(...), with no gradient through clip(rho): every token keeps a gradient.
        The gradient equals dapo's in the first update of a rollout

    k3 = exp(d) - d - 1,  d = log p_ref - log p:  an unbiased, positive estimate of KL(policy || reference)

Rules that keep the sums right (each has a test):
- The denominators are those of the whole mini-batch, computed before it is cut, so the loss does not depend on
  micro-batches or workers.
- Masks come from lengths, never from `!= pad`: the stop token is a decision and gets its gradient.
- Scoring uses the sampling temperature. The first update of a rollout takes its own log-probabilities as the old ones,
  so rho is exactly 1 there; `old_logprobs` lists the cases. The rollout's log-probabilities are compared with them
  (`gap_max` in metrics.jsonl): a gap means that rollout and trainer are not the same policy.
- A gradient that is not finite changes nothing: that update is skipped and counted, and after three such steps in a row
  training stops and names the last checkpoint.
- Only token ids go from rollout to update. Which worker made a response, when, and in which batch must not affect the
  sums, so mini- and micro-batches are cut by content.

Left out: a critic, reward models, replay of old rollouts.
"""

import contextlib
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from parts.cli import UserError, check_above, check_at_least, check_package, flag, parse_flags, run
from parts.devices import keep_freed_memory, pick_device, send
from parts.engine.forward import head_of
from parts.engine.interfaces import Group, Response, Strategy
from parts.engine.model_loading import (
    ACTOR_DTYPES,
    actor_dtype,
    context_limit,
    decode,
    deployed_sampling,
    load_config,
    load_model,
    load_tokenizer,
    stop_tokens,
    too_long,
)
from parts.engine.sampling import Sampling, sequence_seed
from parts.running import checkpoints
from parts.running.timers import WorkerTimer
from parts.training.layouts import LoRALayout, ReplicatedLayout, trainable_parameters
from parts.training.logprobs import autocast, checkpoint_layers, computes_in_bfloat16, noise_settings, update_mode
from parts.training.losses import (
    has_variance,
    missing_groups,
    select_groups,
    sequence_old_logprobs,
    set_lr,
    truncated_importance,
)
from parts.training.micro_batches import MicroBatch, MicroBatches, MicroBatchSize, TrainingSample, per_token
from parts.training.update_stats import UpdateStats, summarise_update
from report import RunReport, SpeculationStats, evaluation, model_card, show_samples
from rollout import Engine
from tasks import Problem, TaskFlags, encode_prompt, make_task


@dataclass(frozen=True)
class Config(TaskFlags):
    """All settings, each a command-line flag."""

    model: str = flag("base", "policy to start from: a folder or a hub name")
    out: str = flag("runs/grpo", "folder for metrics, pictures, checkpoints and the final policy")
    config: str = flag("", "a JSON file with settings, such as an earlier run's config.json; other flags override it")
    resume: bool = flag(False, "continue from the newest checkpoint in --out; else an earlier run there is replaced")
    seed: int = flag(0, "seed of prompts and samples; held-out prompts are the same for every seed")
    device: str = flag("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))

    steps: int = flag(30, "RL steps")
    prompts: int = flag(16, "prompts per step")
    samples: int = flag(16, "samples per prompt, the group size G")
    max_new: int = flag(512, "longest response in tokens")
    temperature: float = flag(1.0, "for sampling and scoring; above 0, since equal samples teach nothing")
    slots: int = flag(64, "sequences that a worker generates at once")
    dynamic_sampling: int = flag(0, "most extra prompts per step, to replace groups whose rewards are all equal")
    overlong_penalty: int = flag(0, "the reward falls by up to 1 over this many tokens before --max-new; 0: no penalty")
    actor_dtype: str = flag("auto", "dtype of the rollout; auto: bfloat16 on a GPU, float32 on a CPU", ACTOR_DTYPES)

    loss: str = flag("grpo", "see the table at the top of train_grpo.py", ("grpo", "dr_grpo", "dapo", "gspo", "cispo"))
    clip_low: float = flag(0.2, "how far the ratio may fall below 1")
    clip_high: float = flag(0.2, "how far the ratio may rise above 1 (dapo's authors use 0.28)")
    kl: float = flag(0.0, "weight of the KL penalty to the starting policy; 0 keeps no reference model")
    tis_cap: float = flag(-1.0, "cap on truncated importance weights; 0: off; -1: 2 if anything is bfloat16, else off")
    mask_truncated: bool = flag(False, "give no gradient to responses cut at max_new")
    lr: float = flag(1e-4, "learning rate after the warm-up")
    warmup: int = flag(3, "updates until --lr is reached")
    schedule: str = flag("constant", "learning-rate schedule, over all --steps", ("constant", "linear", "cosine"))
    weight_decay: float = flag(0.0, "AdamW's weight decay, on all trained weights")
    grad_clip: float = flag(1.0, "largest gradient norm; inf: no limit")
    epochs: int = flag(1, "passes of the update over each rollout")
    minibatches: int = flag(1, "parts that a rollout is cut into, with one update each")
    micro_tokens: int = flag(2048, "most tokens, padding included, in one forward-backward")
    gradient_checkpointing: bool = flag(False, "in the update, keep only each layer's input: less memory, more time")
    lora_rank: int = flag(0, "rank of LoRA adapters (needs peft; make --lr 10 times as high); 0: train all weights")
    bf16: bool = flag(False, "bfloat16 autocast in the update (always on for GPUs)")

    eval_every: int = flag(15, "steps between evaluations (also before the first step and after the last); 0: never")
    eval_problems: int = flag(128, "held-out problems per evaluation, if there are so many")
    eval_samples: int = flag(4, "samples per held-out problem, k: pass@1 is their mean, pass@k needs one right of k")
    save_every: int = flag(10, "steps between checkpoints; the last two are kept")
    show_every: int = flag(10, "steps between printed samples; 0: never")
    track: str = flag("off", "where metrics go besides metrics.jsonl", ("off", "tensorboard", "wandb"))

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "steps", "prompts", "samples", "max_new", "slots", "epochs", "minibatches")
        if self.samples == 1:
            raise UserError("--samples 1: a group of one sample has no variance, so nothing is learned; at least 2")
        check_at_least(self, 1, "micro_tokens", "save_every", "eval_problems", "eval_samples")
        check_above(self, 0, "temperature", "grad_clip")
        check_at_least(self, 0, "temperature", "lr", "kl", "clip_low", "clip_high", "warmup", "weight_decay")
        check_at_least(self, 0, "eval_every", "show_every", "dynamic_sampling", "overlong_penalty", "lora_rank")
        if self.tis_cap != -1:
            check_at_least(self, 0, "tis_cap")
        pick_device(self.device)


# ---------------------------------------------------------------- the mathematics


def advantages(rewards: torch.Tensor, loss: str) -> torch.Tensor:
    """rewards (P, G) float -> advantages (P, G); exactly 0 in zero-variance groups."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if loss != "dr_grpo":
        centred = centred / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
    return centred.where(has_variance(rewards)[:, None], 0.0)


def token_weights(lengths: list[int], loss: str, max_new: int) -> list[float]:
    """lengths of all responses of a mini-batch -> each one's weight per token; the sum so weighted is the loss."""
    if loss in ("grpo", "gspo"):
        return [1 / (len(lengths) * n) for n in lengths]
    weight = 1 / (len(lengths) * max_new) if loss == "dr_grpo" else 1 / sum(lengths)  # dapo, cispo
    return [weight] * len(lengths)


def clip_ratio(logp: torch.Tensor, old: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """Return rho and clip(rho), both (N,)."""
    ratio = (logp - old).exp()
    return ratio, ratio.clamp(1 - config.clip_low, 1 + config.clip_high)


def k3(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the estimate of the KL at each token, (N,)."""
    d = reference - logp
    return d.exp() - d - 1


def policy_loss(logp, old, reference, advantage, weight, config: Config) -> torch.Tensor:
    """Return the weighted sum over tokens: all arguments (N,) -> scalar. reference is None without KL."""
    ratio, clipped = clip_ratio(logp, old, config)
    if config.loss == "cispo":
        loss = -clipped.detach() * advantage * logp
    else:
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if reference is not None:
        loss = loss + config.kl * k3(logp, reference)
    return (weight * loss).sum()


# ---------------------------------------------------------------- the update


def update(model, reference, optimizer, responses, advantage: list[float], step: int, config: Config, worker) -> dict:
    """Make all optimizer steps on one rollout; return figures for the metrics.

    responses: those of all workers, in the same order on each; advantage: one number per response.
    """
    samples = [TrainingSample(r, a) for r, a in zip(responses, advantage) if r.stopped or not config.mask_truncated]
    minibatches = mini_batches(samples, config)
    number = step * config.epochs * config.minibatches  # of optimizer steps so far in the run
    figures = []
    norms = []
    with update_mode(model):
        if worker.tis_cap and config.epochs * len(minibatches) > 1:
            score_old_policy(model, minibatches, optimizer, config, worker)
        for minibatch in minibatches * config.epochs:
            first_update = not norms  # of this rollout
            micro_batches = MicroBatches(minibatch, optimizer, worker)
            for batch in micro_batches:
                with micro_batches.retry_if_out_of_memory():
                    add_gradient(model, reference, batch, first_update, config, worker, micro_batches.stats)
            figures.append(micro_batches.stats)
            norms.append(worker.layout.sum_and_clip(model, config.grad_clip, worker))
            number += 1
            set_lr(optimizer, number, config)
            # the same on all workers. Without samples that teach, Adam's momentum alone would move the weights
            if math.isfinite(norms[-1]) and minibatch:
                optimizer.step()
            optimizer.zero_grad()
    finite = [norm for norm in norms if math.isfinite(norm)]
    my_figures = [stats.read() for stats in figures]
    row = summarise_update([stats for worker_figures in worker.gather(my_figures) for stats in worker_figures])
    row["grad_norm"] = sum(finite) / max(1, len(finite))
    row["skipped"] = len(norms) - len(finite)
    row["lr"] = optimizer.param_groups[0]["lr"]
    return row


def mini_batches(samples: list[TrainingSample], config: Config) -> list[list[TrainingSample]]:
    """Cut the samples into mini-batches, strided, so that each holds samples of every group, and set the weights.

    All samples count in the denominators; those whose gradient is 0 are left out afterwards.
    """
    minibatches = []
    for part in range(min(config.minibatches, len(samples))):
        minibatch = samples[part :: config.minibatches]
        weights = token_weights([len(x.response.tokens) for x in minibatch], config.loss, config.max_new)
        for x, weight in zip(minibatch, weights):
            x.weight = weight
        minibatches.append([x for x in minibatch if x.advantage or config.kl])
    return minibatches


def add_gradient(
    model, reference, batch: MicroBatch, first_update: bool, config: Config, worker, stats: UpdateStats
) -> None:
    """Forward and backward of a micro-batch: its gradient is added to the model's, its figures to stats."""
    worker.timer.enter("update")
    responses = [x.response for x in batch]
    with autocast(worker.device, config.bf16):
        logp, entropy = worker.layout.token_scores(model, responses, config.temperature)  # (N,) both
        ref = None
        if reference is not None:
            with torch.no_grad():
                ref, _ = worker.layout.token_scores(reference, responses, config.temperature)
    present = logp.detach()
    rollout, advantage, weight = per_token(batch, logp.device)
    old = old_logprobs(batch, present, rollout, first_update)
    gap = old - rollout  # 0 where p_old is the rollout's
    if worker.tis_cap:
        advantage = advantage * truncated_importance(gap, worker.tis_cap)
    if config.loss == "gspo":
        old = sequence_old_logprobs(present, old, [len(r.tokens) for r in responses])
    loss = policy_loss(logp, old, ref, advantage, weight, config)
    loss.backward()
    if batch[0].weight:  # weight 0: a sample that fills up a share, see the layout's my_share
        stats.add(loss, entropy, *clip_ratio(present, old, config), None if ref is None else k3(present, ref))
        if first_update or worker.tis_cap:
            stats.compare(gap, worker.tis_cap)


def old_logprobs(batch: MicroBatch, present, rollout, first_update: bool) -> torch.Tensor:
    """Return log p_old of the tokens of a micro-batch, (N,).

    present, rollout (N,): log-probabilities under the trainer as it is now, and under the policy that generated.

                             first update of a rollout           later updates
    --tis-cap 0              the trainer's own, so rho = 1       the rollout's
    --tis-cap above 0        the trainer's own, so rho = 1       the trainer's, scored before the first update
    """
    if first_update:
        return present
    if batch[0].old is None:
        return rollout
    return torch.cat([x.old for x in batch])


def score_old_policy(model, minibatches, optimizer, config: Config, worker) -> None:
    """Before the first update of a rollout, set `old` of this worker's samples. Cut by content, a worker's share is the
    same in every update.
    """
    for minibatch in minibatches:
        micro_batches = MicroBatches(minibatch, optimizer, worker)
        for batch in micro_batches:
            with micro_batches.retry_if_out_of_memory():
                score_batch(model, batch, config, worker)


def score_batch(model, batch: MicroBatch, config: Config, worker) -> None:
    """Set `old` of a micro-batch to the log-probabilities of the trainer as it is now."""
    worker.timer.enter("update")
    with autocast(worker.device, config.bf16), torch.no_grad():
        logp, _ = worker.layout.token_scores(model, [x.response for x in batch], config.temperature)
    for x, old in zip(batch, logp.split([len(x.response.tokens) for x in batch])):
        x.old = old


# ---------------------------------------------------------------- one worker

GRADERS = 32  # threads; they wait for verifiers most of the time


def graded(response: Response, future: Future) -> Response:
    """Wait until the response is graded. Raises what the verifier raised."""
    future.result()
    return response


class Worker:
    """A worker as the training loop sees it. This one is alone, in one process; tlt.TLTWorker is one of many.

    Its layout says how the policy lies on the workers (parts/training/layouts.py).
    """

    rank = 0
    world_size = 1

    def __init__(self, config: Config, heartbeat: Callable[[str], None] | None = None):
        """heartbeat: see WorkerTimer."""
        self.config = config
        self.timer = WorkerTimer(heartbeat)
        self.device = pick_device(config.device)
        if self.device == "cpu":
            keep_freed_memory()
        self.layout = LoRALayout(config) if config.lora_rank else ReplicatedLayout(config.actor_dtype)
        self.micro_batch_size = MicroBatchSize(config, self.rank)

    @property
    def tis_cap(self) -> float:
        """Return the cap of truncated importance sampling; 0: off. By default it is on if rollout or update compute in
        bfloat16.
        """
        if self.config.tis_cap >= 0:
            return self.config.tis_cap
        return 2.0 if self.lowest_precision == torch.bfloat16 else 0.0

    @property
    def lowest_precision(self) -> torch.dtype:
        """Return the dtype that limits how well rollout and update agree."""
        if computes_in_bfloat16(self.device, self.config.bf16):
            return torch.bfloat16
        return actor_dtype(self.config.actor_dtype, self.device)

    def loading(self, name: str) -> contextlib.AbstractContextManager:
        """Return a context for loading a model, given by folder or hub name."""
        return contextlib.nullcontext()

    def make_engine(self, actor, stop: set[int], slots: int, reserve_bytes: int, checkpoint: Path | None) -> Engine:
        """Return the engine that generates. checkpoint: the one that the run continues from."""
        return Engine(actor, stop, slots, reserve_bytes=reserve_bytes)

    def idle_bytes(self) -> int:
        """Return the memory that is needed while other workers still generate."""
        return 0

    def rollout(self, engine: Engine, groups: list[Group], sampling, grade, progress, learn: bool) -> list[Response]:
        """Return all responses to the groups, graded, ordered by (group, sample): the same list on every worker.

        progress(number so far) is called for each response; learn: whether a drafter may be trained on them (not on
        held-out problems).
        """
        responses = []
        for response in self.graded_responses(engine, groups, sampling, grade):
            responses.append(response)
            progress(len(responses))
        return sorted(responses, key=lambda r: (r.group, r.sample))

    def graded_responses(
        self, engine: Engine, groups: Iterable[Group], sampling, grade, strategy: Strategy | None = None
    ) -> Iterator[Response]:
        """Yield this worker's responses, graded, in the order in which they were finished.

        Grading runs in threads beside the engine, so that a slow verifier does not stop generation.
        """
        self.timer.enter("rollout")
        in_grading: deque[tuple[Response, Future]] = deque()
        graders = ThreadPoolExecutor(GRADERS, "grader")
        try:
            for response in engine.generate(groups, sampling, strategy):
                in_grading.append((response, graders.submit(grade, response)))
                while in_grading and in_grading[0][1].done():
                    yield graded(*in_grading.popleft())
            self.timer.enter("reward")
            while in_grading:
                yield graded(*in_grading.popleft())
        finally:
            graders.shutdown(wait=False, cancel_futures=True)

    def take_speculation_stats(self) -> SpeculationStats | None:
        """Return what this worker did for speculation since the last call, for the metrics; None: it cannot draft."""
        return None

    def save(self, folder: Path) -> None:
        """Write into a checkpoint what the workers keep beside the policy. Called only on the worker that writes."""

    def deploy(self, folder: Path) -> None:
        """Write into the final policy's folder whatever else is needed to serve it."""

    def all_reduce(self, tensors: list[torch.Tensor]) -> None:
        """Sum each tensor over the workers, in place."""

    def gather(self, value) -> list:
        """Return the values of all workers, by rank."""
        return [value]


# ---------------------------------------------------------------- the loop

# mean difference of log-probabilities up to which rollout and trainer are the same policy, by the less precise dtype
MEAN_GAP = {torch.float32: 1e-3, torch.bfloat16: 0.1}


NEXT_CANDIDATE, MAX_CANDIDATES = 1_000_003, 100  # a prime: in a data set of any size, other rows come
SEED_STRIDE = 15_485_863  # another prime, so each seed begins elsewhere in the problems
CHECK_SECONDS = 5.0


def readable_prompt(problem: Problem, tokenizer, config: Config, limit: int | None) -> tuple[list[int] | None, str]:
    """Return the token ids of a problem's prompt; or None, and why it cannot be used. limit: of prompt and response."""
    try:
        prompt = encode_prompt(problem, tokenizer, config.prompt_style, config.system, config.chat_args)
    except UserError as error:
        return None, str(error)
    if limit and len(prompt) + config.max_new > limit:
        return None, too_long(len(prompt) + config.max_new, limit)
    return prompt, ""


def check(config: Config) -> None:
    """Raise UserError for everything that can be known to be wrong before anything is started or replaced."""
    if config.track != "off":
        check_package(config.track, f"--track {config.track}")
    if config.lora_rank:
        check_package("peft", "--lora-rank")
    task = make_task(config.task, config.data, config.columns)
    tokenizer = load_tokenizer(config.model)
    limit = context_limit(load_config(config.model))
    for split in ("train", "test"):
        check_problems(task, split, tokenizer, config, limit)
    out = Path(config.out)
    if config.resume and not checkpoints.restarted() and not any(out.glob(checkpoints.PATTERN)):
        raise checkpoints.nothing_to_resume(out)
    if not config.resume:
        checkpoints.check_not_replaced(out, "model", config.model)


def check_problems(task, split: str, tokenizer, config: Config, limit: int | None) -> None:
    """Check the prompts of a split, as many as CHECK_SECONDS allow, and print which will be skipped. Raises UserError
    if none can be used.
    """
    count = task.count(split) or 1
    end = time.time() + CHECK_SECONDS
    unusable = []
    for index in range(count):
        if index and time.time() > end:
            count = index
            break
        problem = task.problem(split, index)
        prompt, why_not = readable_prompt(problem, tokenizer, config, limit)
        if prompt is None:
            unusable.append(f"{problem.name}: {why_not}" if problem.name else why_not)
    if len(unusable) == count:
        raise UserError(unusable[0])
    if unusable:
        more = f", and {len(unusable) - 3} more" if len(unusable) > 3 else ""
        print(f"{len(unusable)} of {count} {split} problems will be skipped: {'; '.join(unusable[:3])}{more}")


class Training:
    """A training run on one worker; rank 0 writes and prints."""

    def __init__(self, config: Config, worker: Worker):
        """Start, or resume. Raises UserError."""
        self.config = config
        self.worker = worker
        self.out = Path(config.out)
        self.writes = worker.rank == 0
        begun = worker.gather(checkpoints.has_begun(self.out))[0]
        checkpoint = checkpoints.start_from(config, tqdm.write if self.writes else lambda text: None, begun)
        self.task = make_task(config.task, config.data, config.columns)
        # a checkpoint of adapters does not hold the policy itself
        source = str(config.model if config.lora_rank or not checkpoint else checkpoint)
        with worker.loading(source):  # on the host: a policy that is to be sharded may not fit a GPU whole
            model, self.tokenizer = load_model(source)
        if self.writes:
            checkpoints.prepare(self.out, config, checkpoint)
        self.model, self.actor = worker.layout.place(model, worker.device)
        if config.gradient_checkpointing:
            checkpoint_layers(self.model)
        self.optimizer = torch.optim.AdamW(
            trainable_parameters(self.model),
            lr=config.lr,
            betas=(0.9, 0.95),
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.first_step, metrics = checkpoints.load(checkpoint, self.model, self.optimizer)
        if checkpoint:  # adapters that were loaded are merged; without them this copies what is there already
            worker.layout.refresh_actor(self.actor, self.model)
        if len(set(worker.gather(self.first_step))) > 1:
            raise UserError(f"--out {self.out}: not every worker finds the same checkpoint; all hosts must share it")
        stop = stop_tokens(self.model, self.tokenizer)
        self.model.generation_config = deployed_sampling(self.model, sorted(stop), config.temperature, config.max_new)
        if self.writes:
            # now, not after hours at the first checkpoint
            checkpoints.try_to_save(self.out, self.model, self.tokenizer)
        self.reference = None
        if config.kl:
            self.reference = worker.layout.place_reference(load_model(config.model)[0], worker.device)
        self.sampling = Sampling(temperature=config.temperature, max_new=config.max_new)
        longest = max(config.micro_tokens, config.max_new)  # a response is never split
        self.update_bytes = worker.layout.update_bytes(self.model, longest)
        self.engine = self.make_engine(stop, checkpoint)
        self.report = RunReport(config, metrics, self.first_step, self.writes)
        self.announce()
        self.bad_steps = 0  # in a row, with a gradient that was not finite
        self.gap_checked = False  # since this process started, see `check_gap`
        self.context_limit = context_limit(self.model.config)
        self.skipped: set[str] = set()  # names of problems that cannot be used
        self.probe: torch.Tensor | None = None  # (1, T) ids that a policy must read without nan before it is saved

    def announce(self) -> None:
        """Say what a user might not expect of this policy."""
        noise = ", ".join(f"{name} {value:g}" for name, value in noise_settings(self.model.config).items())
        if noise:
            self.report.say(f"{noise}: off in training, as GRPO needs the probabilities of the policy that sampled")
        if self.engine.fused_layers is None:
            name = type(self.model.get_decoder().layers[0]).__name__
            self.report.say(
                f"{name}: fused layers do not fit it, so its own modules run in the rollout, which is slower"
            )

    def make_engine(self, stop: set[int], checkpoint: Path | None) -> Engine:
        """Return the engine, which leaves memory for the update and for Adam's moments that are not there yet."""
        config = self.config
        moments = 0 if checkpoint else self.worker.layout.moment_bytes(self.model)
        slots = max(config.slots, config.samples, config.eval_samples)
        return self.worker.make_engine(self.actor, stop, slots, self.update_bytes + moments, checkpoint)

    def grade(self, response: Response) -> None:
        """Set a response's grade."""
        text = decode(response.tokens, self.tokenizer)
        response.grade = self.task.grade(response.problem, text)

    def make_group(self, split: str, index: int, samples: int, seed: tuple) -> Group:
        """Return the group of `samples` samples of a problem. A problem that the model cannot read, or whose prompt is
        too long, is replaced by another one, which follows from the index alone, and reported.
        """
        for candidate in range(index, index + NEXT_CANDIDATE * MAX_CANDIDATES, NEXT_CANDIDATE):
            problem = self.task.problem(split, candidate)
            prompt, why_not = readable_prompt(problem, self.tokenizer, self.config, self.context_limit)
            if prompt:
                seeds = [sequence_seed(self.config.seed, *seed, index, k) for k in range(samples)]
                return Group((split, index), prompt, seeds, problem=problem)
            if problem.name not in self.skipped:
                self.skipped.add(problem.name)
                self.report.say(f"skipped: {problem.name}: {why_not}")
        raise UserError(f"{MAX_CANDIDATES} {split} problems in a row cannot be used, the last one: {why_not}")

    def generate(self, split: str, indices: range, samples: int, *seed) -> list[Response]:
        """Return graded responses to problems of a split, `samples` each. seed: names this rollout."""
        groups = [self.make_group(split, index, samples, seed) for index in indices]
        self.engine.reserve(max(len(group.prompt) for group in groups) + self.config.max_new)
        total = len(groups) * samples

        def progress(count: int) -> None:
            self.report.progress(f"{split} {count}/{total}")

        learn = split == "train"
        return self.worker.rollout(self.engine, groups, self.sampling, self.grade, progress, learn)

    def evaluate(self, step: int) -> None:
        """Evaluate on held-out problems, with the same noise each time, so that evaluations are paired."""
        started = time.time()
        n = self.config.eval_samples
        problems = min(self.config.eval_problems, self.task.count("test") or self.config.eval_problems)
        responses = self.generate("test", range(problems), n, "eval")
        self.report.add_evaluation(evaluation(step, responses, n, time.time() - started))

    def sample(self, step: int) -> tuple[list[Response], torch.Tensor, dict]:
        """Return a step's responses, their rewards (groups, G), and the cost of dynamic sampling: as long as groups
        with variance are missing, as many further prompts are sampled.
        """
        config = self.config
        limit = config.prompts + config.dynamic_sampling  # the prompts of a step follow from its number and the seed
        responses: list[Response] = []
        seconds: list[float] = []
        wanted = config.prompts
        while wanted:
            started = time.time()
            first = config.seed * SEED_STRIDE + step * limit + len(responses) // config.samples
            responses += self.generate("train", range(first, first + wanted), config.samples, step)
            seconds.append(time.time() - started)
            rewards = torch.tensor([r.grade.reward for r in responses]).view(-1, config.samples)
            wanted = min(missing_groups(rewards, config.prompts), limit - len(rewards))
        extra = {"groups": len(rewards) - config.prompts, "seconds": sum(seconds[1:])}
        return responses, rewards, {"extra": extra} if config.dynamic_sampling else {}

    def step(self, step: int) -> None:
        """Make one RL step (from 0): rollout, update, report; then an evaluation and a checkpoint if they are due."""
        config = self.config
        worker = self.worker
        worker.timer.enter("rollout")
        started = time.time()
        responses, rewards, extra = self.sample(step)
        if not all(r.logprobs.isfinite().all() for r in responses):
            raise self.broken_policy(step + 1, "a log-probability of the rollout is not finite")
        self.probe = send(torch.tensor([responses[0].prompt[-64:]]), self.actor.device)
        worker.timer.enter("update")
        batch, shaped = select_groups(responses, rewards, config)
        advantage = advantages(shaped, config.loss).flatten().tolist()
        stats = update(self.model, self.reference, self.optimizer, batch, advantage, step, config, worker) | extra
        self.engine.reserve_bytes = max(self.update_bytes, worker.idle_bytes())  # Adam has its moments now
        worker.layout.refresh_actor(self.actor, self.model)
        worker.timer.enter("idle")
        reports = worker.gather((started, worker.timer.take_spans(), worker.take_speculation_stats()))
        begins, spans, speculation = zip(*reports)
        row = self.report.add_step(step + 1, begins, responses, rewards, stats, spans, speculation)
        self.check_gap(row)
        self.check_gradient(row)
        last = step + 1 == config.steps
        if config.show_every and (step + 1) % config.show_every == 0:
            show_samples(self.report.say, responses, self.tokenizer)
        if config.eval_every and (last or (step + 1) % config.eval_every == 0):
            self.evaluate(step + 1)
        if last or (step + 1) % config.save_every == 0:
            worker.timer.enter("checkpoint")
            self.save(step + 1)

    def check_gap(self, row: dict) -> None:
        """After the first step of this process that trained on tokens, warn if rollout and trainer do not compute the
        same probabilities.
        """
        if self.gap_checked or row["entropy"] is None:
            return
        self.gap_checked = True
        allowed = MEAN_GAP[self.worker.lowest_precision]
        if row["gap_mean"] > allowed:
            self.report.say(
                f"WARNING: log-probabilities of rollout and trainer differ by {row['gap_mean']:.2g} on average, "
                f"expected at most {allowed:g}. They are not the same policy, so ratios, clipping and KL are wrong."
            )

    def check_gradient(self, row: dict) -> None:
        """Raise UserError after three steps in a row whose gradient was not finite. Steps without a gradient, whose
        groups have no variance, do not count.
        """
        if row["skipped"]:
            self.bad_steps += 1
        elif row["grad_norm"]:
            self.bad_steps = 0
        if self.bad_steps == 3:
            raise self.broken_policy(row["step"], "the gradient was not finite in three steps in a row")

    def save(self, step: int) -> None:
        """Write a checkpoint; all workers take part. Raises UserError, without writing, if the policy is broken."""
        broken = [name for name in self.worker.gather(self.worker.layout.find_broken(self.model)) if name]
        if broken:
            raise self.broken_policy(step, f"weight {broken[0]} is not finite")
        with torch.inference_mode():
            logits = head_of(self.actor)(self.actor.get_decoder()(self.probe, use_cache=False).last_hidden_state)
        if not logits.isfinite().all():
            raise self.broken_policy(step, "a logit of the policy is not finite")
        state = (self.model, self.optimizer, self.tokenizer, self.report.metrics, self.config)
        checkpoints.save(self.out, step, *state, self.writes, self.worker.save)

    def broken_policy(self, step: int, problem: str) -> UserError:
        """Return the UserError for a policy that computes nan or inf."""
        self.report.bar.close()
        return UserError(f"step {step}: {problem}; lower --lr and --resume from {checkpoints.newest(self.out)}")

    def finish(self) -> dict:
        """Draw the pictures, write all that deployment needs to out/policy -> the summary, the same on every worker."""
        weights = checkpoints.whole_weights(self.model)
        summary = self.report.finish()

        def fill(folder: Path) -> None:
            checkpoints.save_policy(folder, self.model, self.tokenizer, weights)
            (folder / "README.md").write_text(model_card(self.report.metrics, self.config), encoding="utf-8")
            self.worker.deploy(folder)

        if self.writes:
            checkpoints.save_folder(self.out / "policy", fill)
            self.report.say(summary["text"])
        return summary


def train(config: Config, worker: Worker) -> dict:
    """Run the training loop, on every worker -> the summary, the same on every worker. Raises UserError."""
    training = Training(config, worker)
    if config.eval_every and not training.first_step:
        training.evaluate(0)
    for step in range(training.first_step, config.steps):
        training.step(step)
    return training.finish()


def main() -> None:
    """Train in one process."""
    config = parse_flags(Config, __doc__)
    check(config)
    with checkpoints.claim(config.out):
        torch.manual_seed(config.seed)
        train(config, Worker(config))


if __name__ == "__main__":
    run(main)
