"""The process reward model (PRM): how likely is it that this beginning of a solution leads to the right answer?

    label of a step   share of right answers among c samples that go on from its end         (Monte-Carlo; Wang et al. 2312.08935, Snell et al. 2408.03314)
    features x_k      [h; h*; min log p(x_t); max (log p(best) - log p(x_t))]                over the tokens t of step k; h and h* are hidden states of the policy:
                                                                                             h predicts the end of the step, h* its least likely token
    score             s_k = right(x_1) ... right(x_k) hope(x_k)                              right, hope: sigmoids of one MLP's two outputs
    loss              binary cross-entropy against the SOFT label                            0.3 stays 0.3: rounding it would teach that the step is wrong

The product says what a chain of reasoning is: all steps so far are right, and the rest will go well. It is needed, because the policy stays frozen and does not know
of its own mistakes: after a slip it goes on as confidently as before, so a score of step k alone cannot see it (within-question AUC 0.60).
Everything that the verifier reads the rollout has computed anyway: it costs one small MLP per step. The log-probabilities matter: a
hidden state knows what should come next, not whether what then came was a slip (`python test_time.py learn` prints both, and the log-probabilities alone). And h*
knows what the policy was uncertain about, so that the head can learn where it is wrong with confidence: within-question AUC 0.89 without h*, 0.97 with it.
Many questions with few continuations teach more than few questions with many.

How good is it? Over all questions together an AUC flatters: easy questions have good steps. What search needs is to tell good from bad within a question:
`within` compares steps of the same number of attempts at the same question.
"""

from pathlib import Path

import torch

from drafter import load_weights, save_weights
from rollout import Group, sequence_seed


class Verifier(torch.nn.Module):
    """features (S, 2 D + 2) of the steps of several attempts, one after the other, and how many each has -> scores (S,)."""

    def __init__(self, width, hidden=128):
        super().__init__()
        self.register_buffer("mean", torch.zeros(2 * width + 2))
        self.register_buffer("scale", torch.ones(2 * width + 2))
        self.mlp = torch.nn.Sequential(torch.nn.Linear(2 * width + 2, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, hidden), torch.nn.GELU(), torch.nn.Linear(hidden, 2))

    def forward(self, features, counts):
        right, hope = torch.nn.functional.logsigmoid(self.mlp((features - self.mean) / self.scale)).unbind(1)
        so_far = torch.cat([part.cumsum(0) for part in right.split(counts)])
        return (so_far + hope).exp()

    def save(self, folder):
        save_weights(self.state_dict(), folder, "verifier.safetensors")

    @classmethod
    def load(cls, folder, width):
        made = cls(width)
        load_weights(made, Path(folder) / "verifier.safetensors", "a verifier (`python test_time.py learn`)")
        return made


@torch.no_grad()
def step_features(policy, responses, starts, ends):
    """What the verifier reads at the end of each step of an attempt. responses: with hidden states; starts: for each, where in prompt + tokens the attempt
    begins (its earlier steps may stand in the prompt); ends: ids of the tokens that end a step. -> features (S, 2 D + 2), number of steps of each response."""
    hidden = torch.cat([r.hidden[s - 1:] for r, s in zip(responses, starts)]).float()  # (N, D): row of token t holds h_{t-1}, which predicts it
    tokens = torch.tensor([t for r, s in zip(responses, starts) for t in (r.prompt + r.tokens)[s:]])
    lengths = [len(r.prompt) + len(r.tokens) - s for r, s in zip(responses, starts)]
    last = torch.zeros(len(tokens), dtype=torch.bool)
    last[torch.tensor(lengths).cumsum(0) - 1] = True
    end = torch.isin(tokens, torch.tensor(sorted(ends)))
    step = (end | last).long().cumsum(0) - (end | last).long()  # number of the step that a token is in; what follows a response's last end is thrown away below
    head, logp, gap = policy.get_output_embeddings(), [], []
    for h, t in zip(hidden.split(8192), tokens.split(8192)):
        logits = head(h.to(policy.device, policy.dtype)).float().log_softmax(-1).cpu()
        logp.append(logits.gather(1, t[:, None])[:, 0])
        gap.append(logits.amax(1) - logp[-1])
    logp, gap, count = torch.cat(logp), torch.cat(gap), int(step[-1]) + 1
    low = torch.zeros(count).scatter_reduce(0, step, logp, "amin")  # starting from 0 changes nothing: log p <= 0, gap >= 0
    wide = torch.zeros(count).scatter_reduce(0, step, gap, "amax")
    riskiest = torch.zeros(count, dtype=torch.long).scatter_reduce(0, step, torch.where(logp == low[step], torch.arange(len(step)), 0), "amax")
    of = step[end]
    return torch.cat([hidden[end], hidden[riskiest[of]], low[of, None], wide[of, None]], 1), [int(part.sum()) for part in end.split(lengths)]


def labelled_steps(solver, asked, attempts, continuations, seed):
    """Steps with Monte-Carlo labels. asked: (problem, prompt ids) of each question; `attempts` at each, and from the end of each step so many continuations.

    -> features (S, 2 D + 2), steps of each attempt, labels (S,), outcomes (S,): was the attempt right in the end, place (S, 2): question, step number.
    """
    right = lambda r, tokens: float(solver.grade(asked[r.group][0], tokens))
    groups = [Group(i, ids, [sequence_seed(seed, "attempt", i, k) for k in range(attempts)]) for i, (_, ids) in enumerate(asked)]
    made = sorted(solver.generate(groups, "attempts"), key=lambda r: (r.group, r.sample))
    features, counts = step_features(solver.policy, made, [len(r.prompt) for r in made], solver.ends)
    ends = [[j + 1 for j, t in enumerate(r.tokens) if t in solver.ends] for r in made]
    onward = [Group((n, j), r.prompt + r.tokens[:j], [sequence_seed(seed, "onward", r.group, r.sample, j, k) for k in range(continuations)], begun=j)
              for n, r in enumerate(made) for j in ends[n] if j < len(r.tokens)]
    labels = {(n, len(r.tokens)): right(r, r.tokens) for n, r in enumerate(made)}
    for r in solver.generate(onward, "continuations"):
        n, j = r.group
        labels[n, j] = labels.get((n, j), 0.0) + right(made[n], made[n].tokens[:j] + r.tokens) / continuations
    flat = [(labels[n, j], right(r, r.tokens), r.group, number) for n, r in enumerate(made) for number, j in enumerate(ends[n])]
    labels, outcomes, *place = (torch.tensor(column) for column in zip(*flat))
    return features, counts, labels, outcomes, torch.stack(place, 1)


def fit(features, counts, labels, steps=3000, lr=2e-3, batch=64, seed=0):
    """Train a verifier -> Verifier. counts: steps of each attempt; batch: attempts."""
    torch.manual_seed(seed)
    made = Verifier(features.shape[1] // 2 - 1)
    made.mean, made.scale = features.mean(0), features.std(0).clamp(min=1e-3)
    optimizer = torch.optim.AdamW(made.mlp.parameters(), lr=lr, weight_decay=0.05)
    parts = [(x, y) for x, y in zip(features.split(counts), labels.split(counts)) if len(x)]
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - step / steps)
        x, y = zip(*(parts[i] for i in torch.randint(len(parts), (batch,)).tolist()))
        loss = torch.nn.functional.binary_cross_entropy(made(torch.cat(x), [len(part) for part in x]).clamp(1e-6, 1 - 1e-6), torch.cat(y))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return made.eval().requires_grad_(False)


def auc(scores, labels, place=None, margin=0.5):
    """Chance that of two steps whose labels differ by at least `margin` the better one has the higher score; ties count half. place (S, 2): compare only steps
    of the same question and number. None: all with all. nan if there is no such pair."""
    right = pairs = 0.0
    which, counts = torch.unique(torch.zeros(len(scores), 1) if place is None else place, dim=0, return_inverse=True, return_counts=True)[1:]
    for g in which.argsort(stable=True).split(counts.tolist()):
        s, y = scores[g], labels[g]
        for part in range(0, len(g), 512):  # (512, n) at a time
            better = y[part:part + 512, None] - y >= margin
            diff = s[part:part + 512, None] - s
            right += ((diff > 0) & better).sum().item() + 0.5 * ((diff == 0) & better).sum().item()
            pairs += better.sum().item()
    return right / pairs if pairs else float("nan")
