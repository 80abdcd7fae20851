"""GRPO, plain: a policy learns from its own graded samples. Runs alone in one process; tlt.py puts workers under the
same loop.

One step:

    rollout   G samples from each of P prompts                                  rollout.py
    reward    r = 1 if the verifier accepts the answer, else 0, or any number   tasks.py
    advantage A = (r - mean of its group) / std of its group                    0 where all rewards of a group are equal
    update    maximise  sum_t w * min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)  - kl * w * k3
              rho = p(token) / p_old(token)

    loss      w, the weight of each token                     advantage
    grpo      1 / (number of responses * its length)          divided by std      DeepSeekMath, arXiv 2402.03300
    dr_grpo   1 / (number of responses * max_new)             not divided         Dr. GRPO, 2503.20783 (1)
    dapo      1 / (number of tokens)                          divided by std      DAPO, 2503.14476 (2)
    gspo      as grpo                                         as grpo             GSPO, 2507.18071 (3)
    cispo     as dapo                                         as grpo             MiniMax-M1, 2506.13585 (4)

    (1) no bias towards short right and long wrong answers   (2) every token counts the same
    (3) rho is the response's, the geometric mean of its tokens' (parts/losses.py). Equals grpo in the first update of a
        rollout, where rho = 1, so always with one update per rollout
    (4) w * clip(rho) A log p instead of w * min(...), no gradient through clip(rho): no token is left out. Its gradient
        equals dapo's in the first update of a rollout

    k3 = exp(d) - d - 1,  d = log p_ref - log p:  an unbiased, positive estimate of KL(policy || reference)

Rules that keep the sums right (each has a test):
- The denominators are those of the whole mini-batch, worked out before it is cut: the loss does not depend on
  micro-batches or workers.
- Masks come from lengths, never from `!= pad`: the stop token is a decision and gets its gradient.
- Scoring uses the sampling temperature. The first update of a rollout takes its own log-probabilities as the old ones,
  so rho is exactly 1; the rollout's are compared with them (`gap_max` in metrics.jsonl: the alarm that rollout and
  trainer are the same policy) and serve as p_old in later updates. Where they are corrected (`--tis-cap`, see
  parts/losses.py), p_old is the trainer's in all updates: it scores the responses once before the first.
- A gradient that is not finite changes nothing: that update is skipped and counted, and after three such steps in a row
  training stops and names the last checkpoint.
- Only token ids cross from rollout to update. Who made a response, when, in which batch, must not reach the sums, so
  mini- and micro-batches are cut by content.

Left out: a critic, reward models, replay of old rollouts.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from parts.cli import UserError, check_above, check_at_least, check_package, flag, parse_flags, run
from parts.devices import pick_device
from parts.engine.interfaces import Group, Response, Strategy
from parts.engine.model_loading import ACTOR_DTYPES, check_context, load_model, load_tokenizer, stop_tokens
from parts.engine.sampling import Sampling, sequence_seed
from parts.running import checkpoints
from parts.running.timers import Clock
from parts.training.layouts import Adapted, Replicated, trainable
from parts.training.logprobs import checkpoint_layers, token_logprobs, token_scores
from parts.training.losses import choose, missing_groups, sequence_old, set_rate, truncated_importance, uneven
from parts.training.micro_batches import Example, micro_batches, per_token, precision, score, with_less_memory
from parts.training.update_stats import UpdateStats, combine
from report import Journal, WorkerNotes, evaluation, model_card, show_samples
from rollout import Engine
from tasks import Problem, TaskFlags, encode_prompt, make_task


@dataclass(frozen=True)
class Config(TaskFlags):
    """All settings, each a command-line flag."""

    model: str = flag("base", "policy to start from: a folder or a hub name")
    out: str = flag("runs/grpo", "folder for metrics, pictures, checkpoints and the final policy")
    config: str = flag("", "a JSON file with settings, such as an earlier run's config.json; other flags override it")
    resume: bool = flag(False, "go on from the newest checkpoint in --out; without it an earlier run there is replaced")
    seed: int = flag(0, "seed of the samples; the prompts are the same for every seed")
    device: str = flag("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))

    steps: int = flag(30, "RL steps")
    prompts: int = flag(16, "prompts per step")
    samples: int = flag(16, "samples per prompt, the group size G")
    max_new: int = flag(512, "longest response in tokens")
    temperature: float = flag(1.0, "of sampling and scoring; above 0, since samples have to differ to teach something")
    slots: int = flag(64, "rows that a worker generates at once")
    dynamic_sampling: int = flag(0, "further prompts of a step, at most, for groups whose rewards are all equal")
    overlong_penalty: int = flag(0, "tokens before --max-new over which the reward falls by up to 1; 0: it does not")
    actor_dtype: str = flag("auto", "weights that generate: auto is bfloat16 on a GPU, float32 on a CPU", ACTOR_DTYPES)

    loss: str = flag("grpo", "see the table at the top of train_grpo.py", ("grpo", "dr_grpo", "dapo", "gspo", "cispo"))
    clip_low: float = flag(0.2, "how far the ratio may fall below 1")
    clip_high: float = flag(0.2, "how far the ratio may rise above 1 (dapo's authors use 0.28)")
    kl: float = flag(0.0, "weight of the KL penalty to the starting policy; 0 keeps no reference model")
    tis_cap: float = flag(-1.0, "correct the rollout by weights up to this; 0: off; -1: 2 if it is bfloat16, else off")
    mask_truncated: bool = flag(False, "give no gradient to responses cut at max_new")
    lr: float = flag(1e-4, "learning rate after the warm-up")
    warmup: int = flag(3, "updates until the learning rate is reached")
    schedule: str = flag("constant", "of the learning rate, over all --steps", ("constant", "linear", "cosine"))
    weight_decay: float = flag(0.0, "AdamW's, of all weights that learn")
    grad_clip: float = flag(1.0, "largest gradient norm; inf: no limit")
    epochs: int = flag(1, "passes of the update over each rollout")
    minibatches: int = flag(1, "parts that a rollout is cut into, with an update each")
    micro_tokens: int = flag(2048, "most tokens, padding included, in one forward-backward")
    gradient_checkpointing: bool = flag(False, "keep only the inputs of layers in the update: less memory, more time")
    lora_rank: int = flag(0, "rank of adapters (LoRA, needs peft), with --lr 10 times as high; 0: all weights learn")
    bf16: bool = flag(False, "bfloat16 autocast in the update (always on for GPUs)")

    eval_every: int = flag(15, "steps between evaluations (also before the first step and after the last); 0: never")
    eval_problems: int = flag(128, "held-out problems per evaluation")
    eval_samples: int = flag(4, "samples per held-out problem, k: pass@1 is their mean, pass@k counts one right of k")
    save_every: int = flag(10, "steps between checkpoints; the last two are kept")
    show_every: int = flag(10, "steps between printed samples; 0: never")
    track: str = flag("off", "where metrics go beside metrics.jsonl", ("off", "tensorboard", "wandb"))

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "steps", "prompts", "samples", "max_new", "slots", "epochs", "minibatches")
        check_at_least(self, 1, "micro_tokens", "save_every", "eval_problems", "eval_samples")
        check_above(self, 0, "temperature", "grad_clip")
        check_at_least(self, 0, "temperature", "lr", "kl", "clip_low", "clip_high", "warmup", "weight_decay")
        check_at_least(self, 0, "eval_every", "show_every", "dynamic_sampling", "overlong_penalty", "lora_rank")
        if self.tis_cap != -1:
            check_at_least(self, 0, "tis_cap")
        pick_device(self.device)


# ---------------------------------------------------------------- the mathematics


def advantages(rewards: torch.Tensor, loss: str) -> torch.Tensor:
    """rewards (P, G) float -> advantages (P, G); exactly 0 in groups whose rewards are all equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if loss != "dr_grpo":
        centred = centred / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
    return centred.where(uneven(rewards)[:, None], 0.0)


def token_weights(lengths: list[int], loss: str, max_new: int) -> list[float]:
    """lengths: of all responses of the mini-batch -> weight of a token of each, so that weighted sums are the loss."""
    if loss in ("grpo", "gspo"):
        return [1 / (len(lengths) * n) for n in lengths]
    weight = 1 / (len(lengths) * max_new) if loss == "dr_grpo" else 1 / sum(lengths)  # dapo, cispo
    return [weight] * len(lengths)


def clip_ratio(logp: torch.Tensor, old: torch.Tensor, config: Config) -> tuple[torch.Tensor, torch.Tensor]:
    """rho and clip(rho), both (N,)."""
    ratio = (logp - old).exp()
    return ratio, ratio.clamp(1 - config.clip_low, 1 + config.clip_high)


def k3(logp: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Estimate of the KL at each token, (N,)."""
    d = reference - logp
    return d.exp() - d - 1


def policy_loss(logp, old, reference, advantage, weight, config: Config) -> torch.Tensor:
    """Weighted sum over tokens, all arguments (N,) -> scalar. reference is None without KL."""
    ratio, clipped = clip_ratio(logp, old, config)
    if config.loss == "cispo":
        loss = -clipped.detach() * advantage * logp
    else:
        loss = -torch.minimum(ratio * advantage, clipped * advantage)
    if reference is not None:
        loss = loss + config.kl * k3(logp, reference)
    return (weight * loss).sum()


# ---------------------------------------------------------------- the update


def update(model, reference, optimizer, responses, advantage: list[float], step: int, config: Config, team) -> dict:
    """All optimizer steps on one rollout -> statistics for the metrics.

    responses: of all workers, in the same order everywhere; advantage: one number for each.
    """
    examples = [Example(r, a) for r, a in zip(responses, advantage) if r.stopped or not config.mask_truncated]
    parts = mini_batches(examples, config)
    updates = config.epochs * len(parts)
    totals = []
    norms = []
    model.train()
    if team.tis_cap and updates > 1:
        for part in parts:
            score(model, part, team)
    for i in range(updates):
        totals.append(gradients(model, reference, optimizer, parts[i % len(parts)], i == 0, config, team))
        norms.append(team.layout.sum_and_clip(model, config.grad_clip, team))
        done = step * config.epochs * config.minibatches + i + 1  # updates so far, this one included
        set_rate(optimizer, done, config)
        if math.isfinite(norms[-1]):  # the same on all workers
            optimizer.step()
        optimizer.zero_grad()
    model.eval()
    finite = [norm for norm in norms if math.isfinite(norm)]
    row = combine([stats for worker in team.gather(totals) for stats in worker])
    row["grad_norm"] = sum(finite) / max(1, len(finite))
    row["skipped"] = len(norms) - len(finite)
    row["lr"] = optimizer.param_groups[0]["lr"]
    return row


def mini_batches(examples: list[Example], config: Config) -> list[list[Example]]:
    """Strided: each holds samples of every group. All count in the weights; those with a gradient of 0 are left out."""
    parts = []
    for part in range(min(config.minibatches, len(examples))):
        batch = examples[part :: config.minibatches]
        weights = token_weights([len(x.response.tokens) for x in batch], config.loss, config.max_new)
        for x, weight in zip(batch, weights):
            x.weight = weight
        parts.append([x for x in batch if x.advantage or config.kl])
    return parts


def gradients(model, reference, optimizer, examples, on_policy: bool, config: Config, team: Alone) -> UpdateStats:
    """Gradients of this worker's share of the examples, added up in the model."""
    share = team.layout.my_share(micro_batches(examples, config.micro_tokens, team.size), team.rank)

    def work(batches: list[list[Example]]) -> UpdateStats:
        return accumulate(model, reference, batches, on_policy, config, team)

    return with_less_memory(work, share, optimizer.zero_grad, team)


def accumulate(model, reference, batches, on_policy: bool, config: Config, team) -> UpdateStats:
    """Forward and backward of this worker's micro-batches; gradients add up in the model.

    on_policy: the first update of a rollout, whose old policy is the present one.
    """
    stats = UpdateStats()
    for batch in batches:
        team.clock.enter("update")
        responses = [x.response for x in batch]
        with precision(team):
            logp, entropy = token_scores(model, responses, config.temperature, team.layout.logprobs_at)
            ref = None
            if reference is not None:
                with torch.no_grad():
                    ref = token_logprobs(reference, responses, config.temperature)
        present = logp.detach()
        rollout, old, advantage, weight = per_token(batch, logp.device)
        if on_policy:
            old = present
        gap = old - rollout  # 0 where p_old is the rollout's
        if team.tis_cap:
            advantage = advantage * truncated_importance(gap, team.tis_cap)
        if config.loss == "gspo":
            old = sequence_old(present, old, [len(r.tokens) for r in responses])
        loss = policy_loss(logp, old, ref, advantage, weight, config)
        loss.backward()
        if batch[0].weight:  # else it only fills up a share
            stats.add(loss, entropy, *clip_ratio(present, old, config), None if ref is None else k3(present, ref))
            if on_policy or team.tis_cap:
                stats.compare(gap, team.tis_cap)
    return stats


# ---------------------------------------------------------------- one worker


class Alone:
    """One process."""

    rank = 0
    size = 1

    def __init__(self, config, tell: Callable[[str], None] | None = None):
        """config: train_grpo.Config; tell: see report.Clock."""
        self.config = config
        self.clock = Clock(tell)
        self.micro_tokens = config.micro_tokens  # falls when memory runs out
        self.tis_cap = max(0.0, config.tis_cap)  # 0: no correction; -1 is settled when it is known what generates
        self.device = pick_device(config.device)
        self.layout = Adapted(config) if config.lora_rank else Replicated(config.actor_dtype)
        self.start: Path | None = None  # the checkpoint that the run goes on from

    def loading(self, name: str) -> contextlib.AbstractContextManager:
        """Around the loading of a model, a folder or a hub name."""
        return contextlib.nullcontext()

    def engine(self, actor, stop: set[int], slots: int, reserve_bytes: int) -> Engine:
        """The engine that generates."""
        return Engine(actor, stop, slots, reserve_bytes=reserve_bytes)

    def idle_bytes(self) -> int:
        """Memory that is needed while others still generate."""
        return 0

    def rollout(self, engine: Engine, groups: list[Group], sampling, grade, progress, learn: bool) -> list[Response]:
        """All responses to the groups, graded, ordered by (group, sample): the same list on every worker.

        progress(number so far) hears of each; learn: whether a drafter may be trained on them (not on held-out ones).
        """
        responses = []
        for response in self.work(engine, groups, sampling, grade):
            responses.append(response)
            progress(len(responses))
        return sorted(responses, key=lambda r: (r.group, r.sample))

    def work(
        self, engine: Engine, groups: Iterable[Group], sampling, grade, strategy: Strategy | None = None
    ) -> Iterator[Response]:
        """This worker's responses, graded as they end."""
        self.clock.enter("rollout")
        for response in engine.generate(groups, sampling, strategy):
            self.clock.enter("reward")
            grade(response)
            yield response
            self.clock.enter("rollout")

    def notes(self) -> WorkerNotes | None:
        """What this worker did for speculation since the last call, for the metrics."""
        return None

    def save(self, folder: Path) -> None:
        """Into each checkpoint: whatever the workers keep beside the policy. Only the worker that writes is asked."""

    def deploy(self, folder: Path) -> None:
        """Into the final policy's folder: whatever else serves it."""

    def all_reduce(self, tensors: list[torch.Tensor]) -> None:
        """Add up each tensor over the workers, in place."""

    def gather(self, value) -> list:
        """The values of all workers, by rank."""
        return [value]


# ---------------------------------------------------------------- the loop


def check(config: Config) -> None:
    """Everything that can be known to be wrong before anything is started or replaced. Raises UserError."""
    if config.track != "off":
        check_package(config.track, f"--track {config.track}")
    if config.lora_rank:
        check_package("peft", "--lora-rank")
    task = make_task(config.task, config.data, config.columns)
    tokenizer = load_tokenizer(config.model)
    for split in ("train", "test"):
        prompt = encode_prompt(task.problem(split, 0), tokenizer, config.prompt_style, config.system, config.chat_args)
        check_context(config.model, len(prompt) + config.max_new)
    out = Path(config.out)
    if config.resume and not checkpoints.restarted() and not any(out.glob(checkpoints.PATTERN)):
        raise checkpoints.nothing_to_resume(out)


class Training:
    """A training run on one worker; rank 0 writes and prints."""

    def __init__(self, config: Config, team: Alone):
        """Start, or resume. Raises UserError."""
        self.config = config
        self.team = team
        self.out = Path(config.out)
        self.writes = team.rank == 0
        start = team.start = checkpoints.start_from(config, tqdm.write if self.writes else lambda text: None)
        self.task = make_task(config.task, config.data, config.columns)
        self.problems: dict[tuple[str, int], Problem] = {}  # of the rollout that is running
        source = str(config.model if config.lora_rank or not start else start)  # a checkpoint of adapters holds no more
        with team.loading(source):  # on the host: a policy that is to be sharded may not fit a GPU whole
            model, self.tokenizer = load_model(source)
        if self.writes:
            checkpoints.prepare(self.out, config, start)
        self.model, self.actor = team.layout.place(model, team.device)
        if config.tis_cap < 0 and self.actor.dtype != self.model.dtype:
            team.tis_cap = 2.0
        if config.gradient_checkpointing:
            checkpoint_layers(self.model)
        self.optimizer = torch.optim.AdamW(
            trainable(self.model), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay, fused=True
        )
        self.first_step, metrics = checkpoints.load(start, self.model, self.optimizer)
        if start:  # adapters that were loaded are merged; without them this copies what is there already
            team.layout.refresh(self.actor, self.model)
        if len(set(team.gather(self.first_step))) > 1:
            raise UserError(f"--out {self.out}: not every worker finds the same checkpoint; all hosts must share it")
        stop = stop_tokens(self.model, self.tokenizer)
        self.model.generation_config.update(**self.deployed_sampling(sorted(stop)))
        self.reference = load_model(config.model, team.device)[0].requires_grad_(False) if config.kl else None
        self.sampling = Sampling(temperature=config.temperature, max_new=config.max_new)
        longest = max(config.micro_tokens, config.max_new)  # a response is never split
        self.update_bytes = team.layout.update_bytes(self.model, longest)
        moments = 0 if start else team.layout.moment_bytes(self.model)
        slots = max(config.slots, config.samples, config.eval_samples)
        self.engine = team.engine(self.actor, stop, slots, self.update_bytes + moments)
        self.journal = Journal(config, metrics, self.first_step, self.writes)
        self.bad_steps = 0  # in a row, with a gradient that was not finite

    def deployed_sampling(self, stop: list[int]) -> dict:
        """Settings with which the saved policy's `generate` samples, and stops, as it was trained."""
        limits = {"max_new_tokens": self.config.max_new, "eos_token_id": stop if len(stop) > 1 else stop[0]}
        narrowed = {"top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0}
        return {"do_sample": True, "temperature": self.config.temperature, **narrowed, **limits}

    def grade(self, response: Response) -> None:
        """Fill in a response's grade."""
        text = self.tokenizer.decode(response.tokens, skip_special_tokens=False)
        response.grade = self.task.grade(self.problems[response.group], text)

    def ask(self, split: str, indices: range, samples: int, *seed) -> list[Response]:
        """Graded responses to problems of a split, `samples` each; `seed` names this rollout."""
        config = self.config
        self.problems = {(split, i): self.task.problem(split, i) for i in indices}
        groups = []
        for (_, i), problem in self.problems.items():
            prompt = encode_prompt(problem, self.tokenizer, config.prompt_style, config.system, config.chat_args)
            groups.append(Group((split, i), prompt, [sequence_seed(config.seed, *seed, i, k) for k in range(samples)]))
        self.engine.reserve(max(len(group.prompt) for group in groups) + config.max_new)
        total = len(groups) * samples

        def progress(count: int) -> None:
            self.journal.progress(f"{split} {count}/{total}")

        return self.team.rollout(self.engine, groups, self.sampling, self.grade, progress, learn=split == "train")

    def evaluate(self, step: int) -> None:
        """Held-out problems, with the same noise each time: paired."""
        started = time.time()
        n = self.config.eval_samples
        responses = self.ask("test", range(self.config.eval_problems), n, "eval")
        self.journal.evaluation(evaluation(step, responses, n, time.time() - started))

    def sample(self, step: int) -> tuple[list[Response], torch.Tensor, dict]:
        """A step's responses, their rewards (groups, G), and what dynamic sampling took: as long as groups are missing
        whose rewards are not all equal, as many further prompts are asked.
        """
        config = self.config
        limit = config.prompts + config.dynamic_sampling  # the prompts of a step follow from its number alone
        responses: list[Response] = []
        seconds: list[float] = []
        wanted = config.prompts
        while wanted:
            started = time.time()
            first = step * limit + len(responses) // config.samples
            responses += self.ask("train", range(first, first + wanted), config.samples, step)
            seconds.append(time.time() - started)
            rewards = torch.tensor([r.grade.reward for r in responses]).view(-1, config.samples)
            wanted = min(missing_groups(rewards, config.prompts), limit - len(rewards))
        extra = {"groups": len(rewards) - config.prompts, "seconds": sum(seconds[1:])}
        return responses, rewards, {"extra": extra} if config.dynamic_sampling else {}

    def step(self, step: int) -> None:
        """One RL step: rollout, update, report; then an evaluation and a checkpoint where they are due. From 0."""
        config = self.config
        team = self.team
        team.clock.enter("rollout")
        started = time.time()
        responses, rewards, extra = self.sample(step)
        team.clock.enter("update")
        batch, shaped = choose(responses, rewards, config)
        advantage = advantages(shaped, config.loss).flatten().tolist()
        stats = update(self.model, self.reference, self.optimizer, batch, advantage, step, config, team) | extra
        self.engine.reserve_bytes = max(self.update_bytes, team.idle_bytes())  # Adam has its moments now
        team.layout.refresh(self.actor, self.model)
        team.clock.enter("idle")
        reports = team.gather((started, team.clock.take(), team.notes()))
        begins, spans, notes = zip(*reports)
        self.watch(self.journal.step(step + 1, begins, responses, rewards, stats, spans, notes))
        last = step + 1 == config.steps
        if config.show_every and (step + 1) % config.show_every == 0:
            show_samples(self.journal.say, responses, self.tokenizer)
        if config.eval_every and (last or (step + 1) % config.eval_every == 0):
            self.evaluate(step + 1)
        if last or (step + 1) % config.save_every == 0:
            team.clock.enter("checkpoint")
            self.save(step + 1)

    def watch(self, row: dict) -> None:
        """Raises UserError after three steps in a row whose gradient was not finite."""
        self.bad_steps = self.bad_steps + 1 if row["skipped"] else 0
        if self.bad_steps == 3:
            self.journal.bar.close()
            problem = f"step {row['step']}: the gradient was not finite in three steps in a row"
            raise UserError(f"{problem}; lower --lr and --resume from {checkpoints.newest(self.out)}")

    def save(self, step: int) -> None:
        """A checkpoint; all workers take part."""
        state = (self.model, self.optimizer, self.tokenizer, self.journal.metrics, self.config)
        checkpoints.save(self.out, step, *state, self.writes, self.team.save)

    def finish(self) -> dict:
        """Pictures, and all that deployment needs in out/policy -> the summary, the same on every worker."""
        weights = checkpoints.whole_weights(self.model)
        summary = self.journal.finish()

        def fill(folder: Path) -> None:
            checkpoints.save_policy(folder, self.model, self.tokenizer, weights)
            (folder / "README.md").write_text(model_card(self.journal.metrics, self.config))
            self.team.deploy(folder)

        if self.writes:
            checkpoints.save_folder(self.out / "policy", fill)
            self.journal.say(summary["text"])
        return summary


def train(config: Config, team: Alone) -> dict:
    """The training loop; every worker runs it -> the summary, the same on every worker. Raises UserError."""
    training = Training(config, team)
    if config.eval_every and not training.first_step:
        training.evaluate(0)
    for step in range(training.first_step, config.steps):
        training.step(step)
    return training.finish()


def main() -> None:
    """See above."""
    config = parse_flags(Config, __doc__)
    check(config)
    with checkpoints.claim(config.out):
        torch.manual_seed(config.seed)
        train(config, Alone(config))


if __name__ == "__main__":
    run(main)
