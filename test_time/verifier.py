"""The process reward model (PRM): how likely is it that this partial solution leads to the right answer?

    label of a step   share of right answers among c samples that continue from its end   (learn.py)
    features x_k      [h; h*; min log p(x_t); max (log p(best) - log p(x_t))]             over the tokens t of step k
                      h and h* are hidden states of the policy: h predicts the end of the step, h* its least likely
                      token
    score             s_k = correct(x_1) ... correct(x_k) success(x_k)                    correct, success: sigmoids of
                                                                                          the two outputs of one MLP
    loss              binary cross-entropy against the SOFT label: 0.3 stays 0.3, since rounding it would teach that
                      the step is wrong

Monte-Carlo labels are those of Wang et al. (2312.08935) and Snell et al. (2408.03314). Many questions with few
continuations each teach more than few questions with many.

Why a product? All steps so far must be correct, and the rest must succeed. The policy is frozen and does not notice its
own mistakes: after a slip it continues as confidently as before, so a score of step k alone cannot see the slip
(within-question AUC 0.60).

Why these features? The rollout has computed all of them anyway, so the verifier is charged as one small MLP per step.
(`token_logprobs` computes the logits a second time, for simplicity; an engine could keep what is needed.) The
log-probabilities matter: a hidden state encodes which token should come next, not whether the token that was sampled is
a slip (`python -m test_time learn` prints the AUC with and without them, and of log-probabilities alone). h* encodes
what the policy was uncertain about, so the MLP can learn where the policy is confidently wrong: within-question AUC
0.89 without h*, 0.97 with it.

The AUC over the steps of all questions together is too favourable, since easy questions have good steps. Search must
tell good steps from bad ones within a question: `auc` with a `place` compares only steps with the same number in
attempts at the same question.

Legend: N tokens of all responses, S steps of all responses, D model width.
"""

from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from parts.engine.forward import head_of
from parts.engine.interfaces import Response
from parts.files import load_weights, save_weights

FILE = "verifier.safetensors"
CHUNK = 8192  # tokens whose logits are in memory at once


class Verifier(nn.Module):
    """A model that scores each step of each attempt. width: D of the policy; hidden: width of the MLP."""

    def __init__(self, width: int, hidden: int = 128):
        super().__init__()
        inputs = 2 * width + 2
        self.register_buffer("mean", torch.zeros(inputs))
        self.register_buffer("scale", torch.ones(inputs))
        first, second, last = nn.Linear(inputs, hidden), nn.Linear(hidden, hidden), nn.Linear(hidden, 2)
        self.mlp = nn.Sequential(first, nn.GELU(), second, nn.GELU(), last)

    def forward(self, features: torch.Tensor, counts: list[int]) -> torch.Tensor:
        """Return the scores (S,) of steps. features (S, 2 D + 2): of several attempts, one after the other; counts:
        steps of each attempt.
        """
        correct, success = F.logsigmoid(self.mlp((features - self.mean) / self.scale)).unbind(1)
        so_far = torch.cat([part.cumsum(0) for part in correct.split(counts)])
        return (so_far + success).exp()

    def save(self, folder) -> None:
        """Write the weights into the folder. Raises UserError."""
        save_weights(self.state_dict(), folder, FILE)

    @classmethod
    def load(cls, folder, width: int) -> "Verifier":
        """Return the verifier from a folder. width: D of the policy. Raises UserError."""
        verifier = cls(width)
        load_weights(verifier, Path(folder) / FILE, "a verifier (`python -m test_time learn`)")
        return verifier


@torch.no_grad()
def step_features(policy, responses: list[Response], starts: list[int], ends: set) -> tuple[torch.Tensor, list[int]]:
    """Return the features (S, 2 D + 2) of all steps, and the number of steps of each response.

    responses: with their hidden states. starts: for each, where in prompt + tokens the attempt begins (its first steps
    may be in the prompt). ends: ids of the tokens that end a step.
    """
    hidden = torch.cat([r.hidden[start - 1 :] for r, start in zip(responses, starts)]).float()
    # (N, D): the row of token t holds h_{t-1}, which predicts it
    attempts = [torch.tensor((r.prompt + r.tokens)[start:]) for r, start in zip(responses, starts)]
    lengths = [len(attempt) for attempt in attempts]
    tokens = torch.cat(attempts)  # (N,)
    is_end = torch.isin(tokens, torch.tensor(sorted(ends)))
    # the step that each token is in, numbered over all responses; what follows a response's last end is a step, too
    closes = is_end.clone()
    closes[torch.tensor(lengths).cumsum(0) - 1] = True
    step_of = closes.long().cumsum(0) - closes.long()  # (N,)
    logp, gap = token_logprobs(policy, hidden, tokens)
    count = int(step_of[-1]) + 1
    # both start from 0, which changes nothing: log p <= 0, gap >= 0
    lowest = torch.zeros(count).scatter_reduce(0, step_of, logp, "amin")
    widest = torch.zeros(count).scatter_reduce(0, step_of, gap, "amax")
    # index of each step's least likely token, of equal ones the last
    candidates = torch.where(logp == lowest[step_of], torch.arange(len(tokens)), 0)
    least_likely = torch.zeros(count, dtype=torch.long).scatter_reduce(0, step_of, candidates, "amax")
    steps = step_of[is_end]  # (S,): tokens behind a response's last end are dropped here
    features = [hidden[is_end], hidden[least_likely[steps]], lowest[steps, None], widest[steps, None]]
    return torch.cat(features, 1), [int(part.sum()) for part in is_end.split(lengths)]


def token_logprobs(policy, hidden: torch.Tensor, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log p of each token, and how far that is below the likeliest token's, both (N,). hidden (N, D) predicts
    tokens (N,).
    """
    head = head_of(policy)
    logps = []
    gaps = []
    for h, t in zip(hidden.split(CHUNK), tokens.split(CHUNK)):
        logits = head(h.to(policy.device, policy.dtype)).float().log_softmax(-1).cpu()
        logp = logits.gather(1, t[:, None])[:, 0]
        logps.append(logp)
        gaps.append(logits.amax(1) - logp)
    return torch.cat(logps), torch.cat(gaps)


def fit_verifier(features, counts: list[int], labels, steps: int = 3000, lr: float = 2e-3, batch: int = 64) -> Verifier:
    """Return a verifier trained on features (S, 2 D + 2) and soft labels (S,) of steps. counts: steps of each attempt;
    steps: optimizer steps; batch: attempts in each of them.
    """
    torch.manual_seed(0)
    verifier = Verifier(features.shape[1] // 2 - 1)
    verifier.mean = features.mean(0)
    verifier.scale = features.std(0).clamp(min=1e-3)
    optimizer = torch.optim.AdamW(verifier.mlp.parameters(), lr=lr, weight_decay=0.05)
    attempts = [(x, y) for x, y in zip(features.split(counts), labels.split(counts)) if len(x)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        chosen = torch.randint(len(attempts), (batch,)).tolist()
        xs, ys = zip(*(attempts[i] for i in chosen))
        scores = verifier(torch.cat(xs), [len(x) for x in xs]).clamp(1e-6, 1 - 1e-6)
        loss = F.binary_cross_entropy(scores, torch.cat(ys))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return verifier.eval().requires_grad_(False)


def auc(scores: torch.Tensor, labels: torch.Tensor, place: torch.Tensor | None = None, margin: float = 0.5) -> float:
    """Return the chance that of two steps whose labels differ by at least `margin` the better one has the higher score;
    ties count half. nan if there is no such pair.

    scores, labels (S,). place (S, 2): compare only steps with the same question and step number; None: all with all.
    """
    if place is None:
        place = torch.zeros(len(scores), 1)
    _, which, counts = torch.unique(place, dim=0, return_inverse=True, return_counts=True)
    right = 0.0
    pairs = 0.0
    for members in which.argsort(stable=True).split(counts.tolist()):
        for some in members.split(512):  # (512, n) at a time
            better = labels[some, None] - labels[members] >= margin
            lead = scores[some, None] - scores[members]
            right += ((lead > 0) & better).sum().item() + 0.5 * ((lead == 0) & better).sum().item()
            pairs += better.sum().item()
    return right / pairs if pairs else float("nan")
