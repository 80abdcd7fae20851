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

    (1) no bias towards short right and long wrong answers   (2) every token counts the same

    k3 = exp(d) - d - 1,  d = log p_ref - log p:  an unbiased, positive estimate of KL(policy || reference)

Rules that keep the sums right (each has a test):
- The denominators are those of the whole mini-batch, worked out before it is cut: the loss does not depend on
  micro-batches or workers.
- Masks come from lengths, never from `!= pad`: the stop token is a decision and gets its gradient.
- Scoring uses the sampling temperature. The first update of a rollout takes its own log-probabilities as the old ones,
  so rho is exactly 1; the rollout's are compared with them (`gap_max` in metrics.jsonl: the alarm that rollout and
  trainer are the same policy) and serve as p_old in later updates.
- A gradient that is not finite changes nothing: that update is skipped and counted, and after three such steps in a row
  training stops and names the last checkpoint.
- Only token ids cross from rollout to update. Who made a response, when, in which batch, must not reach the sums, so
  mini- and micro-batches are cut by content.

Left out: a critic, DAPO's dynamic sampling and overlong shaping, reward models, replay of old rollouts.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from parts import checkpoints
from parts.batches import Example, UpdateStats, combine, micro_batches, with_less_memory
from parts.common import UserError, check_at_least, flag, flag_name, parse_flags, run
from parts.interfaces import Group, Response
from parts.journal import Journal
from parts.loading import check_context, load_model, load_tokenizer, stop_tokens
from parts.logprobs import checkpoint_layers, token_logprobs
from parts.sampling import Sampling, sequence_seed
from parts.workers import Alone
from report import evaluation, model_card, show_samples
from tasks import Problem, TaskFlags, encode_prompt, make_task


@dataclass(frozen=True)
class Config(TaskFlags):
    """All settings, each a command-line flag."""

    model: str = flag("base", "policy to start from: a folder or a hub name")
    out: str = flag("runs/grpo", "folder for metrics, pictures, checkpoints and the final policy")
    resume: bool = flag(False, "go on from the newest checkpoint in --out; without it an earlier run there is replaced")
    seed: int = flag(0, "seed of prompts and samples")
    device: str = flag("auto", "auto takes a GPU if there is one", ("auto", "cpu", "cuda"))

    steps: int = flag(30, "RL steps")
    prompts: int = flag(16, "prompts per step")
    samples: int = flag(16, "samples per prompt, the group size G")
    max_new: int = flag(512, "longest response in tokens")
    temperature: float = flag(1.0, "sampling temperature, also used in scoring")
    slots: int = flag(64, "rows that a worker generates at once")

    loss: str = flag("grpo", "which weights and advantages (see above)", ("grpo", "dr_grpo", "dapo"))
    clip_low: float = flag(0.2, "how far the ratio may fall below 1")
    clip_high: float = flag(0.2, "how far the ratio may rise above 1 (dapo's authors use 0.28)")
    kl: float = flag(0.0, "weight of the KL penalty to the starting policy; 0 keeps no reference model")
    mask_truncated: bool = flag(False, "give no gradient to responses cut at max_new")
    lr: float = flag(1e-4, "learning rate, constant after the warm-up")
    warmup: int = flag(3, "updates until the learning rate is reached")
    grad_clip: float = flag(1.0, "largest gradient norm")
    epochs: int = flag(1, "passes over each rollout")
    minibatches: int = flag(1, "updates per pass")
    micro_tokens: int = flag(2048, "tokens, padding included, in one forward-backward")
    gradient_checkpointing: bool = flag(False, "keep only the inputs of layers in the update: less memory, more time")
    bf16: bool = flag(False, "bfloat16 autocast in the update (always on for GPUs)")

    eval_every: int = flag(15, "steps between evaluations (also before the first step and after the last); 0: never")
    eval_problems: int = flag(128, "held-out problems per evaluation")
    eval_samples: int = flag(4, "samples per held-out problem: pass@1 is their mean, pass@k for k up to this many")
    save_every: int = flag(10, "steps between checkpoints; the last two are kept")
    show_every: int = flag(10, "steps between printed samples; 0: never")

    def __post_init__(self):
        """Raises UserError."""
        check_at_least(self, 1, "steps", "prompts", "samples", "max_new", "slots", "epochs", "minibatches")
        check_at_least(self, 1, "micro_tokens", "save_every", "eval_problems", "eval_samples")
        if not 0 < self.temperature < math.inf:
            raise UserError(
                f"--temperature {self.temperature}: learning needs samples that differ, so it must be above 0"
            )
        for name in ("lr", "kl", "clip_low", "clip_high", "grad_clip", "eval_every", "show_every", "warmup"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"{flag_name(name)} {getattr(self, name)}: must be a number that is not negative")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise UserError("--device cuda: torch sees no GPU here; use --device cpu")


# ---------------------------------------------------------------- the mathematics


def advantages(rewards: torch.Tensor, loss: str) -> torch.Tensor:
    """rewards (P, G) float -> advantages (P, G); exactly 0 in groups whose rewards are all equal."""
    centred = rewards - rewards.mean(1, keepdim=True)
    if loss != "dr_grpo":
        centred = centred / (rewards.std(1, keepdim=True, correction=0) + 1e-6)
    flat = (rewards == rewards[:, :1]).all(1, keepdim=True)
    return torch.where(flat, torch.zeros_like(rewards), centred)


def token_weights(lengths: list[int], loss: str, max_new: int) -> list[float]:
    """lengths: of all responses of the mini-batch -> weight of a token of each, so that weighted sums are the loss."""
    if loss == "grpo":
        return [1 / (len(lengths) * n) for n in lengths]
    weight = 1 / (len(lengths) * max_new) if loss == "dr_grpo" else 1 / sum(lengths)
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
    totals = []
    norms = []
    model.train()
    for epoch in range(config.epochs):
        for part in range(config.minibatches):
            batch = examples[part :: config.minibatches]  # strided: each mini-batch holds samples of every group
            if not batch:
                continue
            weights = token_weights([len(x.response.tokens) for x in batch], config.loss, config.max_new)
            for x, weight in zip(batch, weights):
                x.weight = weight
            useful = [x for x in batch if x.advantage or config.kl]  # else the gradient is exactly 0
            totals.append(gradients(model, reference, optimizer, useful, epoch == part == 0, config, team))
            norms.append(team.layout.sum_and_clip(model, config.grad_clip, team))
            done = step * config.epochs * config.minibatches + len(norms)  # updates so far, this one included
            for group in optimizer.param_groups:
                group["lr"] = config.lr * min(1.0, done / max(1, config.warmup))
            if math.isfinite(norms[-1]):  # the same on all workers
                optimizer.step()
            optimizer.zero_grad()
    model.eval()
    finite = [norm for norm in norms if math.isfinite(norm)]
    row = combine([stats for worker in team.gather(totals) for stats in worker])
    row["grad_norm"] = sum(finite) / max(1, len(finite))
    row["skipped"] = len(norms) - len(finite)
    return row


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
    bf16 = config.bf16 or team.device != "cpu"
    for batch in batches:
        team.clock.enter("update")
        responses = [x.response for x in batch]
        # without its cache: there the gradients of several uses of a weight would be summed in bfloat16
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bf16, cache_enabled=False):
            logp = token_logprobs(model, responses, config.temperature, team.layout.logprobs_at)
            ref = None
            if reference is not None:
                with torch.no_grad():
                    ref = token_logprobs(reference, responses, config.temperature)
        behaviour = torch.cat([r.logprobs for r in responses]).to(logp.device)
        counts = torch.tensor([len(r.tokens) for r in responses], device=logp.device)
        advantage = torch.tensor([x.advantage for x in batch], device=logp.device).repeat_interleave(counts)
        weight = torch.tensor([x.weight for x in batch], device=logp.device).repeat_interleave(counts)
        loss = policy_loss(logp, logp.detach() if on_policy else behaviour, ref, advantage, weight, config)
        loss.backward()
        if batch[0].weight:
            add_up(stats, loss.detach(), logp.detach(), behaviour, ref, on_policy, config)
    return stats


def add_up(stats: UpdateStats, loss, logp, behaviour, ref, on_policy: bool, config: Config) -> None:
    """Statistics of one micro-batch; all tensors but the loss (N,)."""
    stats.loss += loss.item()
    stats.tokens += len(logp)
    if on_policy:
        stats.gap_max = max(stats.gap_max, (logp - behaviour).abs().max().item())
    else:
        ratio, clipped = clip_ratio(logp, behaviour, config)
        stats.clipped += (ratio != clipped).sum().item()
    if ref is not None:
        stats.kl += k3(logp, ref).sum().item()


# ---------------------------------------------------------------- the loop


def check(config: Config) -> None:
    """Everything that can be known to be wrong before anything is started or replaced. Raises UserError."""
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
        start = checkpoints.start_from(self.out, config.resume, tqdm.write if self.writes else lambda text: None)
        self.task = make_task(config.task, config.data, config.columns)
        self.problems: dict[tuple[str, int], Problem] = {}  # of the rollout that is running
        # on the host: a policy that is to be sharded may not fit a GPU whole
        model, self.tokenizer = load_model(str(start or config.model))
        if self.writes:
            checkpoints.prepare(self.out, config, start)
        self.model, self.actor = team.layout.place(model, team.device)
        if config.gradient_checkpointing:
            checkpoint_layers(self.model)
        self.optimizer = torch.optim.AdamW(
            self.model.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )
        self.first_step, metrics = checkpoints.load(start, self.model, self.optimizer)
        if len(set(team.gather(self.first_step))) > 1:
            raise UserError(f"--out {self.out}: not every worker finds the same checkpoint; all hosts must share it")
        self.model.generation_config.update(**self.deployed_sampling())
        self.reference = load_model(config.model, team.device)[0].requires_grad_(False) if config.kl else None
        self.sampling = Sampling(temperature=config.temperature, max_new=config.max_new)
        longest = max(config.micro_tokens, config.max_new)  # a response is never split
        self.update_bytes = team.layout.update_bytes(self.model, longest)
        moments = 0 if start else team.layout.moment_bytes(self.model)
        slots = max(config.slots, config.samples, config.eval_samples)
        stop = stop_tokens(self.model, self.tokenizer)
        self.engine = team.engine(self.actor, stop, slots, self.update_bytes + moments)
        self.journal = Journal(config, metrics, self.first_step, self.writes)
        self.bad_steps = 0  # in a row, with a gradient that was not finite

    def deployed_sampling(self) -> dict:
        """Settings with which the saved policy's `generate` samples as it was trained."""
        limits = {"temperature": self.config.temperature, "max_new_tokens": self.config.max_new}
        return {"do_sample": True, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0, **limits}

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

    def step(self, step: int) -> None:
        """One RL step: rollout, update, report; then an evaluation and a checkpoint where they are due. From 0."""
        config = self.config
        team = self.team
        team.clock.enter("rollout")
        started = time.time()
        indices = range(step * config.prompts, (step + 1) * config.prompts)
        responses = self.ask("train", indices, config.samples, step)
        team.clock.enter("update")
        rewards = torch.tensor([r.grade.reward for r in responses]).view(config.prompts, config.samples)
        advantage = advantages(rewards, config.loss).flatten().tolist()
        stats = update(self.model, self.reference, self.optimizer, responses, advantage, step, config, team)
        self.engine.reserve_bytes = self.update_bytes  # Adam has its moments now
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
        metrics = self.journal.metrics
        checkpoints.save(self.out, step, self.model, self.optimizer, self.tokenizer, metrics, self.config, self.writes)
        self.team.save(self.out)

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
