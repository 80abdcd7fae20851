"""The process reward model (PRM): how likely is it that this beginning of a solution leads to the right answer?

    label of a step   share of right answers among c samples that go on from its end      (labels.py)
    features x_k      [h; h*; min log p(x_t); max (log p(best) - log p(x_t))]             over the tokens t of step k
                      h and h* are hidden states of the policy: h predicts the end of the step, h* its least likely
                      token
    score             s_k = right(x_1) ... right(x_k) hope(x_k)                           right, hope: sigmoids of the
                                                                                          two outputs of one MLP
    loss              binary cross-entropy against the SOFT label: 0.3 stays 0.3, since rounding it would teach that
                      the step is wrong

Monte-Carlo labels are those of Wang et al. (2312.08935) and Snell et al. (2408.03314).

Why a product? It says what a chain of reasoning is: all steps so far are right, and the rest will go well. It is
needed, because the policy stays frozen and does not know of its own mistakes: after a slip it goes on as confidently as
before. So a score of step k alone cannot see the slip (within-question AUC 0.60).

Why these features? The rollout has computed all of them anyway, so the verifier costs one small MLP a step. The
log-probabilities matter: a hidden state knows what should come next, not whether what then came was a slip (`python -m
test_time learn` prints both, and the log-probabilities alone). And h* knows what the policy was uncertain about, so the
head can learn where the policy is wrong with confidence: within-question AUC 0.89 without h*, 0.97 with it.

Many questions with few continuations teach more than few questions with many.

How good is it? Over all questions together an AUC flatters: easy questions have good steps. What search needs is to
tell good from bad within a question: `auc` with a `place` compares steps of the same number of attempts at the same
question.

Legend: R responses, N tokens of all responses, S steps of all responses, D model width.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch.nn import functional as F

from parts.engine.forward import head_of
from parts.engine.interfaces import Response
from parts.files import load_weights, save_weights

FILE = "verifier.safetensors"
PIECE = 8192  # tokens whose logits are in memory at once


class Verifier(torch.nn.Module):
    """A score for each step of each attempt."""

    def __init__(self, width: int, hidden: int = 128):
        """width: D of the policy; hidden: width of the MLP."""
        super().__init__()
        inputs = 2 * width + 2
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        self.mlp = torch.nn.Sequential(
            torch.nn.Linear(inputs, hidden),
            torch.nn.GELU(),
            torch.nn.Linear(hidden, hidden),
            torch.nn.GELU(),
            torch.nn.Linear(hidden, 2),
        )

    def forward(self, features: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """features (S, 2 D + 2) of the steps of several attempts, one after the other, and how many steps each attempt
        has -> scores (S,).
        """
        right, hope = F.logsigmoid(self.mlp((features - self.mean) / self.scale)).unbind(1)
        so_far = torch.cat([part.cumsum(0) for part in right.split(counts)])
        return (so_far + hope).exp()

    def save(self, folder) -> None:
        """Write it into the folder. Raises UserError."""
        save_weights(self.state_dict(), folder, FILE)

    @classmethod
    def load(cls, folder, width: int) -> "Verifier":
        """From a folder; width: D of the policy. Raises UserError."""
        verifier = cls(width)
        load_weights(verifier, Path(folder) / FILE, "a verifier (`python -m test_time learn`)")
        return verifier


# ---------------------------------------------------------------- what it reads


class StepFeatures(NamedTuple):
    """What the verifier reads."""

    features: torch.Tensor  # (S, 2 D + 2)
    counts: list[int]  # steps of each response


@torch.no_grad()
def step_features(policy, responses: list[Response], starts: list[int], ends: set[int]) -> StepFeatures:
    """What the verifier reads at the end of each step.

    responses: with their hidden states. starts: for each, where in prompt + tokens the attempt begins (its earlier
    steps may stand in the prompt). ends: ids of the tokens that end a step.
    """
    hidden = torch.cat([r.hidden[start - 1 :] for r, start in zip(responses, starts)]).float()
    # (N, D): the row of token t holds h_{t-1}, which predicts it
    attempts = [(r.prompt + r.tokens)[start:] for r, start in zip(responses, starts)]
    lengths = [len(attempt) for attempt in attempts]
    tokens = torch.cat([torch.tensor(attempt) for attempt in attempts])  # (N,)
    is_end = torch.isin(tokens, torch.tensor(sorted(ends)))
    step_of = number_steps(is_end, lengths)  # (N,)
    logp, gap = surprise(policy, hidden, tokens)
    count = int(step_of[-1]) + 1
    # both start from 0, which changes nothing: log p <= 0, gap >= 0
    lowest = torch.zeros(count).scatter_reduce(0, step_of, logp, "amin")
    widest = torch.zeros(count).scatter_reduce(0, step_of, gap, "amax")
    # the last of a step's least likely tokens
    candidates = torch.where(logp == lowest[step_of], torch.arange(len(tokens)), 0)
    riskiest = torch.zeros(count, dtype=torch.long).scatter_reduce(0, step_of, candidates, "amax")
    steps = step_of[is_end]  # (S,): what follows a response's last end is thrown away here
    features = [hidden[is_end], hidden[riskiest[steps]], lowest[steps, None], widest[steps, None]]
    return StepFeatures(torch.cat(features, 1), [int(part.sum()) for part in is_end.split(lengths)])


def number_steps(is_end: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """Number of the step that each token is in, counted over all responses, (N,).

    is_end (N,) bool; lengths: tokens of each response. What follows a response's last end is a step, too.
    """
    is_last = torch.zeros(len(is_end), dtype=torch.bool)
    is_last[torch.tensor(lengths).cumsum(0) - 1] = True
    closes = (is_end | is_last).long()
    return closes.cumsum(0) - closes


def surprise(policy, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """log p of each token, and how far that is below the likeliest token's, both (N,).

    hidden (N, D) predicts tokens (N,).
    """
    head = head_of(policy)
    logps = []
    gaps = []
    for h, t in zip(hidden.split(PIECE), tokens.split(PIECE)):
        logits = head(h.to(policy.device, policy.dtype)).float().log_softmax(-1).cpu()
        logp = logits.gather(1, t[:, None])[:, 0]
        logps.append(logp)
        gaps.append(logits.amax(1) - logp)
    return torch.cat(logps), torch.cat(gaps)


# ---------------------------------------------------------------- how it is trained, and how good it is


def fit_verifier(
    features: torch.Tensor,
    counts: list[int],
    labels: torch.Tensor,
    steps: int = 3000,
    lr: float = 2e-3,
    batch: int = 64,
    seed: int = 0,
) -> Verifier:
    """Train a verifier on steps: features (S, 2 D + 2), labels (S,) soft. counts: steps of each attempt.

    steps: of the optimizer; batch: attempts in each of them.
    """
    torch.manual_seed(seed)
    verifier = Verifier(features.shape[1] // 2 - 1)
    verifier.mean = features.mean(0)
    verifier.scale = features.std(0).clamp(min=1e-3)
    optimizer = torch.optim.AdamW(verifier.mlp.parameters(), lr=lr, weight_decay=0.05)
    attempts = [(x, y) for x, y in zip(features.split(counts), labels.split(counts)) if len(x)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(attempts), (batch,)).tolist()
        xs, ys = zip(*(attempts[i] for i in chosen))
        scores = verifier(torch.cat(xs), [len(x) for x in xs])
        loss = F.binary_cross_entropy(scores.clamp(1e-6, 1 - 1e-6), torch.cat(ys))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return verifier.eval().requires_grad_(False)


def auc(scores: torch.Tensor, labels: torch.Tensor, place: torch.Tensor | None = None, margin: float = 0.5) -> float:
    """Chance that of two steps whose labels differ by at least `margin` the better one has the higher score; ties
    count half. nan if there is no such pair.

    scores, labels (S,). place (S, 2): compare only steps of the same question and number; None: all with all.
    """
    if place is None:
        place = torch.zeros(len(scores), 1)
    _, which, counts = torch.unique(place, dim=0, return_inverse=True, return_counts=True)
    right = 0.0
    pairs = 0.0
    for members in which.argsort(stable=True).split(counts.tolist()):
        s = scores[members]
        y = labels[members]
        for first in range(0, len(members), 512):  # (512, n) at a time
            some = slice(first, first + 512)
            better = y[some, None] - y >= margin
            lead = s[some, None] - s
            right += ((lead > 0) & better).sum().item() + 0.5 * ((lead == 0) & better).sum().item()
            pairs += better.sum().item()
    return right / pairs if pairs else float("nan")
