"""The figures of an update: sums over the tokens of its micro-batches, and what they become in metrics.jsonl."""

from dataclasses import dataclass

import torch


@dataclass
class UpdateStats:
    """Sums over the tokens of some micro-batches."""

    loss: float = 0.0
    tokens: int = 0
    entropy: float = 0.0
    ratio: float = 0.0
    ratio_max: float = 0.0
    clipped: int = 0
    capped: int = 0  # by truncated importance sampling
    kl: float = 0.0
    compared: int = 0  # tokens of the next two; only where trainer and rollout have the same weights
    gap: float = 0.0  # |log p of the trainer - log p of the rollout|
    gap_max: float = 0.0

    def add(self, loss, entropy, ratio, clipped, kl) -> None:
        """Add a micro-batch: its loss, and the rest of its tokens, (N,), without gradients. kl may be None."""
        self.loss += loss.item()
        self.tokens += len(ratio)
        self.entropy += entropy.sum().item()
        self.ratio += ratio.sum().item()
        self.ratio_max = max(self.ratio_max, ratio.max().item())
        self.clipped += (ratio != clipped).sum().item()
        if kl is not None:
            self.kl += kl.sum().item()

    def compare(self, gap: torch.Tensor, cap: float) -> None:
        """Add gap (N,): log p of the trainer - log p of the rollout. cap: of their ratio, 0 if it is not corrected."""
        self.compared += len(gap)
        self.gap += gap.abs().sum().item()
        self.gap_max = max(self.gap_max, gap.abs().max().item())
        if cap:
            self.capped += (gap.exp() > cap).sum().item()


def summarise_update(parts: list[UpdateStats]) -> dict:
    """Return the figures of an update for the metrics, over all workers and optimizer steps. Without tokens, entropy
    and ratio are None.
    """
    count = sum(s.tokens for s in parts)
    tokens = max(1, count)
    return {
        "loss": sum(s.loss for s in parts),
        "gap_max": max((s.gap_max for s in parts), default=0.0),
        "gap_mean": sum(s.gap for s in parts) / max(1, sum(s.compared for s in parts)),
        "clipped": sum(s.clipped for s in parts) / tokens,
        "capped": sum(s.capped for s in parts) / tokens,
        "kl": sum(s.kl for s in parts) / tokens,
        "entropy": sum(s.entropy for s in parts) / count if count else None,
        "ratio_mean": sum(s.ratio for s in parts) / count if count else None,
        "ratio_max": max((s.ratio_max for s in parts), default=0.0) if count else None,
    }
