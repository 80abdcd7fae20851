"""What may be added to the losses of train_grpo.py: a ratio of whole responses, a correction for a rollout that rounds,
a penalty for length, the choice of the groups to learn from, a schedule of the learning rate.

GSPO (arXiv 2507.18071). The ratio of a response y to its old policy is s = (p(y) / p_old(y)) ^ (1 / |y|), one number
for all its tokens: exp(mean over its tokens of log p - log p_old). Each token's gradient is s * A * grad log p. That is
grpo with another old policy, log p_old' = log p (without its gradient) - log s: then p / p_old' is s, and the gradient
of a token's ratio is s * grad log p (the paper's GSPO-token; with one advantage per response it is GSPO).

Truncated importance sampling (Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL
training"). A rollout in bfloat16 samples from a policy that is not quite the trainer's. The policy term of each token
is weighted by

    min(p_old(token) / p_rollout(token), cap)             p_old: the trainer's, with the rollout's weights

The ratio rho of the loss stays p / p_old, both of the trainer, so that clipping measures how far the updates have come,
and not the rounding. The KL term is not weighted.

Soft penalty for overlong responses (DAPO, arXiv 2503.14476, equation 13): 0 up to max_new - tokens, falling linearly to
-1 at max_new.

Dynamic sampling (DAPO): a zero-variance group, whose rewards are all equal, has no gradient; others take its place. See
train_grpo.Training.sample.

Left out: correction ratios of whole responses, masks instead of caps.
"""

import math

import torch


def sequence_old_logprobs(logp: torch.Tensor, old: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """logp, old (N,) without gradients, of responses of these lengths -> log p_old' (N,), see the top of this file."""
    log_s = [part.mean().expand(len(part)) for part in (logp - old).split(lengths)]
    return logp - torch.cat(log_s)


def truncated_importance(gap: torch.Tensor, cap: float) -> torch.Tensor:
    """gap (N,): log p_old - log p_rollout, without a gradient -> the tokens' weights (N,)."""
    return gap.exp().clamp(max=cap)


def overlong_penalty(lengths: torch.Tensor, max_new: int, tokens: int) -> torch.Tensor:
    """lengths in tokens -> the penalties that are added to the rewards, from 0 to -1 over the last `tokens`."""
    return ((max_new - tokens - lengths) / max(1, tokens)).clamp(-1, 0)


def has_variance(rewards: torch.Tensor) -> torch.Tensor:
    """rewards (P, G) -> (P,) bool: the groups whose rewards are not all equal, which have a gradient."""
    return (rewards != rewards[:, :1]).any(1)


def missing_groups(rewards: torch.Tensor, wanted: int) -> int:
    """rewards (P, G), raw -> how many groups with variance are missing to have `wanted` of them."""
    return max(0, wanted - int(has_variance(rewards).sum()))


def select_groups(responses: list, rewards: torch.Tensor, config) -> tuple[list, torch.Tensor]:
    """Select the groups to learn from: the first config.prompts with variance; zero-variance groups fill up the rest.

    responses: in groups of G; rewards (groups, G), raw -> the chosen groups' responses, in their order, and their
    rewards with the penalty for length, (prompts, G).
    """
    varied = has_variance(rewards).tolist()
    ranked = sorted(range(len(varied)), key=lambda i: not varied[i])  # a stable sort
    chosen = sorted(ranked[: config.prompts])
    size = rewards.shape[1]
    batch = [r for i in chosen for r in responses[i * size : (i + 1) * size]]
    lengths = torch.tensor([len(r.tokens) for r in batch]).view(-1, size)
    return batch, rewards[chosen] + overlong_penalty(lengths, config.max_new, config.overlong_penalty)


def lr_factor(schedule: str, done: int, warmup: int, total: int) -> float:
    """Return the share of the full learning rate in update number `done` (from 1) of `total`. It rises over the
    warm-up, then stays, or falls linearly or as half a cosine, so that it would be 0 one update after the last.
    """
    if done <= warmup or schedule == "constant":
        return min(1.0, done / max(1, warmup))
    progress = (done - 1 - warmup) / max(1, total - warmup)
    return 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2


def set_lr(optimizer, done: int, config) -> None:
    """Set learning rate and weight decay for update number `done` of the run (from 1). config: train_grpo.Config."""
    total = config.steps * config.epochs * config.minibatches
    for group in optimizer.param_groups:
        group["lr"] = config.lr * lr_factor(config.schedule, done, config.warmup, total)
        group["weight_decay"] = config.weight_decay  # that of a resumed run may differ
