"""TLT on one page: the same tokens with and without drafts, the drafter's alignment, the policy, the verifier, runs."""

import multiprocessing
import random

import pytest
import torch
from conftest import caught
from transformers import LlamaForCausalLM

import tlt_one_page as page
from tasks import Countdown, countdown_problem

SAMPLES = 5
LIMIT = 96  # tokens of a response


@pytest.fixture(scope="module")
def weights():
    return page.load_file(page.BASE / "model.safetensors"), page.load_file(page.BASE / "drafter/drafter.safetensors")


def respond(weights, choices) -> list:
    """Responses to two prompts, with these draft lengths to choose from."""
    lengths = page.DraftLength(choices)
    responses = page.rollout(*weights, 0, 0, SAMPLES, LIMIT, lengths) + page.rollout(
        *weights, 0, 1, SAMPLES, LIMIT, lengths
    )
    assert {k for k in page.DRAFT_LENGTHS if lengths.counts[k]} <= set(choices)
    if len(choices) == 1 and choices != (0,):
        assert lengths.counts["tokens"] / lengths.counts["sequences"] > 1 + 0.6 * choices[0]
    return responses


@pytest.fixture(scope="module")
def plain(weights):
    """Responses without drafts."""
    return respond(weights, (0,))


# ---------------------------------------------------------------- losslessness


def check_same_tokens(weights, plain, choices) -> None:
    assert [r.ids for r in respond(weights, choices)] == [r.ids for r in plain]


@pytest.mark.parametrize("choices", [(2,), (4,), (8,), page.DRAFT_LENGTHS])
def test_tokens_are_the_same_with_drafts(weights, plain, choices):
    assert max(len(r.ids) - r.start for r in plain) == LIMIT
    assert any(r.ids[-1] == page.EOS for r in plain)
    check_same_tokens(weights, plain, choices)


def one_too_many(y, ids):
    """The right number of accepted draft tokens and one more."""
    return ((y[:, :-1] == ids[:, 1:]).cumprod(1).sum(1) + 1).clamp(max=ids.shape[1] - 1)


def with_gaps(y, ids):
    """Also those after a difference."""
    return (y[:, :-1] == ids[:, 1:]).sum(1)


@pytest.mark.parametrize("broken", [one_too_many, with_gaps])
def test_wrong_verification_is_caught(weights, plain, monkeypatch, broken):
    monkeypatch.setattr(page, "count_accepted", broken)
    caught(check_same_tokens, weights, plain, (4,))


def check_samples(w, responses, shift: int = 0) -> None:
    """Every token is argmax(logits + g) of one forward pass over the whole response."""
    rng = random.Random("0 0")
    page.make_problem(rng)
    seeds = sorted(rng.getrandbits(32) for _ in range(SAMPLES))
    for seed, r in zip(seeds, responses):
        with torch.no_grad():
            logits = page.logits(w, page.policy(w, torch.tensor([r.ids[:-1]])))
        noise = page.gumbel_noise(torch.tensor([seed]), torch.arange(1, len(r.ids))[None] + shift)
        assert (logits + noise).argmax(-1)[0, r.start - 1 :].tolist() == r.ids[r.start :]


def test_tokens_are_the_policys_samples(weights, plain):
    check_samples(weights[0], plain)
    caught(check_samples, weights[0], plain, shift=1)


def test_noise_is_gumbel_noise():
    g = page.gumbel_noise(torch.arange(60), torch.arange(40).expand(60, 40))  # (60, 40, V)
    assert abs(g.mean() - 0.5772) < 0.01  # Euler's constant
    assert abs(g.var() - 1.6449) < 0.02  # pi^2 / 6
    assert len(g.unique()) > 0.97 * g.numel()
    assert torch.equal(g[7:9, 3:5], page.gumbel_noise(torch.arange(7, 9), torch.arange(3, 5).expand(2, 2)))


def test_the_draft_length_follows_speed_and_acceptance(monkeypatch):
    monkeypatch.setattr(random, "random", lambda: 1.0)  # nothing is tried at random
    lengths = page.DraftLength()
    for _ in range(60):
        k = lengths.choose(4)
        lengths.observe(k, torch.full((4,), k), 0.01 + 0.0001 * k)  # all draft tokens are right
    assert lengths.choose(4) == 8
    for _ in range(400):
        k = lengths.choose(4)
        lengths.observe(k, torch.zeros(4, dtype=torch.long), 0.01 + 0.0001 * k)  # all are wrong
    assert lengths.choose(4) == 0
    assert lengths.choose(1) != 0  # of other batch sizes no time is known: each length is tried


# ---------------------------------------------------------------- drafter


def check_alignment(weights, monkeypatch, shift: int) -> None:
    """What the drafter estimates during rounds equals what it estimates in training, at the same entries."""
    w, d = weights
    calls = []
    drafter = page.drafter

    def recorded(*args):
        calls.append(drafter(*args))
        return calls[-1]

    monkeypatch.setattr(page, "drafter", recorded)
    estimates = []  # (row, entry, what it estimated)
    with torch.no_grad():
        batch = page.Batch(w, page.TOKENIZER.encode("3,7,8=29<think>").ids, [1, 2, 3], LIMIT)
        for k in (4, 8, 0, 0, 2, 4, 0, 8, 2):  # after plain rounds there are more entries to compute
            before = batch.lens
            calls.clear()
            page.run_round(w, d, batch, k)
            if k:
                lens_of_entries = calls[0].shape[1]
                first = (before - 1 - lens_of_entries).clamp(min=0)
                estimates += [(b, n - 2, calls[0][b, n - 2 - first[b]]) for b, n in enumerate(before.tolist())]
    assert len(batch.lens.unique()) == 3  # the sequences have become of different length
    start = len(page.TOKENIZER.encode("3,7,8=29<think>").ids)
    trained = {name: p.clone().requires_grad_() for name, p in d.items()}
    for row, n in enumerate(batch.lens.tolist()):
        ids = batch.tokens[row, :n].tolist()
        response = page.Response(0, ids[:1] * shift + ids[: n - shift], start, 0.0, batch.features[row, : n - 1])
        calls.clear()
        page.train_drafter(w, trained, torch.optim.SGD(trained.values(), 0.0), [response])
        for other, entry, estimate in estimates:
            if other == row:
                torch.testing.assert_close(calls[0][0, entry].detach(), estimate, atol=1e-3, rtol=1e-3)


def test_training_and_drafting_agree(weights, monkeypatch):
    check_alignment(weights, monkeypatch, shift=0)


def test_shifted_pairs_are_caught(weights, monkeypatch):
    caught(check_alignment, weights, monkeypatch, shift=1)  # trains on (x_t, h_t) in place of (x_{t+1}, h_t)


def test_training_lowers_the_loss_and_changes_the_drafter_alone(weights, plain):
    w = {name: p.clone().requires_grad_() for name, p in weights[0].items()}
    d = {name: (0.5 * p).requires_grad_() for name, p in weights[1].items()}
    optimizer = torch.optim.Adam(d.values(), 1e-3)

    def agreement() -> float:
        """Share of entries whose likeliest token is the policy's."""
        r = max(plain, key=lambda r: len(r.ids))
        with torch.no_grad():
            estimates = page.drafter(w, d, torch.tensor([r.ids[1:-1]]), r.features[None, :-1])[0]
            right = page.logits(w, estimates).argmax(-1) == page.logits(w, r.features[1:]).argmax(-1)
        return right.float().mean().item()

    before = agreement()
    for _ in range(25):
        page.train_drafter(w, d, optimizer, plain)
    assert agreement() > before + 0.1
    assert all(p.grad is None and torch.equal(p, weights[0][name]) for name, p in w.items())


# ---------------------------------------------------------------- policy and verifier


def check_policy(weights, shift: int = 0) -> None:
    """Logits equal those of transformers: of whole sequences, and through a cache with different lengths."""
    model = LlamaForCausalLM.from_pretrained(page.BASE)
    ids = torch.randint(2, page.V, (3, 40), generator=torch.Generator().manual_seed(0))
    w = weights[0]
    with torch.no_grad():
        wanted = model(input_ids=ids).logits
        torch.testing.assert_close(page.logits(w, page.policy(w, ids)), wanted, atol=1e-3, rtol=0)
        kv = torch.zeros(3, page.LAYERS, 2, 50, 1, page.HD)
        page.policy(w, ids[:, :30], kv=kv)
        lens = torch.tensor([30, 12, 21])  # entries behind are rolled back
        columns = lens[:, None] + torch.arange(5)
        logits = page.logits(w, page.policy(w, ids.gather(1, columns), lens + shift, kv))
    rows = torch.arange(3)[:, None]
    torch.testing.assert_close(logits, wanted[rows, columns], atol=1e-3, rtol=0)


def test_policy_equals_transformers(weights):
    check_policy(weights)
    caught(check_policy, weights, shift=1)


RIGHT = ["(7*3)+8", " 8 + 7 * 3 ", "(8)+(7)*3", "8+(3*7)"]
WRONG = [
    "7*3+8+0",
    "7*3",
    "29",
    "7*8-3",
    "3*7+8)",
    "8+21",
    "78-3",
    "07*3+8",
    "7*3+8.0",
    "7**3+8",
    "7//3+8",
    "-7*-3+8",
    "",
]
HOSTILE = ["97**98**99", "(" * 90 + "7*3+8", "7/(3-3)+8", "__import__('os').abort()", "9" * 5000, "7*3+8\n", "7(3)+8"]


def test_verifier():
    for expression in RIGHT:
        assert page.grade(f"7*3=21!</think><answer>{expression}</answer><eos>", [3, 7, 8], 29) == 1.0, expression
    for expression in WRONG + HOSTILE:
        assert page.grade(f"7*3=21!</think><answer>{expression}</answer><eos>", [3, 7, 8], 29) == 0.0, expression
    for text in ("", "7*3+8", "<answer>7*3+8", "<answer>7*3+8</answer>21", "<answer>" * 10_000):
        assert page.grade(text, [3, 7, 8], 29) == 0.0, text
    assert page.grade("<answer>8/(3-8/3)</answer><eos>", [8, 3, 8, 3], 24) == 1.0  # exact


def test_problems_can_be_solved_and_are_graded_as_elsewhere(weights, plain):
    assert {r.reward for r in plain} == {0.0, 1.0}
    for r in plain:
        numbers, target = page.make_problem(random.Random(f"0 {r.group}"))
        problem = countdown_problem(numbers, target)
        assert page.TOKENIZER.decode(r.ids[: r.start], skip_special_tokens=False) == problem.trace
        text = page.TOKENIZER.decode(r.ids[r.start :], skip_special_tokens=False)
        assert r.reward == Countdown().grade(problem, text).reward, text


# ---------------------------------------------------------------- two processes


def test_two_workers_print_a_line_for_each_step_and_leave_nothing(capfd):
    page.main(steps=2, prompts=3, samples=4, limit=40)
    lines = capfd.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["step  1", "step  2"]
    assert all("tokens per round" in line for line in lines)
    assert not multiprocessing.active_children()
