"""The figures of an update: sums over the tokens of its micro-batches, and what they become in metrics.jsonl.

The sums stay on the device until the update is over, so that the host does not wait for each micro-batch: on a GPU it
prepares the next one meanwhile.
"""

from dataclasses import dataclass, replace

import torch

Scalar = float | torch.Tensor


@dataclass
class UpdateStats:
    """Sums over the tokens of some micro-batches: numbers, or until `read` scalars in float64 on the device."""

    loss: Scalar = 0.0
    tokens: int = 0
    entropy: Scalar = 0.0
    ratio: Scalar = 0.0
    ratio_max: Scalar = 0.0
    clipped: Scalar = 0.0
    capped: Scalar = 0.0  # by truncated importance sampling
    kl: Scalar = 0.0
    compared: int = 0  # tokens of the next two; only where trainer and rollout have the same weights
    gap: Scalar = 0.0  # |log p of the trainer - log p of the rollout|
    gap_max: Scalar = 0.0

    def add(self, loss, entropy, ratio, clipped, kl) -> None:
        """Add a micro-batch: its loss, and the rest of its tokens, (N,), without gradients. kl may be None."""
        self.loss += loss.detach().double()
        self.tokens += len(ratio)
        self.entropy += entropy.sum().double()
        self.ratio += ratio.sum().double()
        self.ratio_max = ratio.max().double().clamp(min=self.ratio_max)
        self.clipped += (ratio != clipped).sum().double()
        if kl is not None:
            self.kl += kl.sum().double()

    def compare(self, gap: torch.Tensor, cap: float) -> None:
        """Add gap (N,): log p of the trainer - log p of the rollout. cap: of their ratio, 0 if it is not corrected."""
        self.compared += len(gap)
        self.gap += gap.abs().sum().double()
        self.gap_max = gap.abs().max().double().clamp(min=self.gap_max)
        if cap:
            self.capped += (gap.exp() > cap).sum().double()

    def read(self) -> "UpdateStats":
        """Return the same with numbers. The host waits for the device, once."""
        names = [name for name, value in vars(self).items() if isinstance(value, torch.Tensor)]
        if not names:
            return self
        numbers = torch.stack([getattr(self, name) for name in names]).tolist()
        return replace(self, **dict(zip(names, numbers)))


def summarise_update(parts: list[UpdateStats]) -> dict:
    """Return the figures of an update for the metrics, over all workers and optimizer steps, which have been read.
    Without tokens, entropy and ratio are None.
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
