import contextlib
import copy
import io
import itertools
import json
import math
import random
import re
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import cases, caught, tiny
from hypothesis import given
from hypothesis import strategies as st

import tlt
import train_grpo
from report import describe, gantt, speculation
from rollout import Engine, Group, Sampling, run, sequence_seed
from tasks import Countdown, Grade, UserError
from train_grpo import Alone, Clock, Config, advantages, micro_batches, parse_flags, pass_at_k, policy_loss, token_logprobs, token_weights, update

CONFIG = Config(prompts=4, samples=6, max_new=30, micro_tokens=200, device="cpu")


def make_responses(model, temperature=1.0, prompts=4, samples=6):
    rng = random.Random(0)
    groups = [Group(("train", i), [rng.randrange(2, 118) for _ in range(rng.randint(2, 9))], [sequence_seed(i, k) for k in range(samples)]) for i in range(prompts)]
    found = sorted(Engine(model, {1}, 24, 64).generate(groups, Sampling(temperature=temperature, max_new=30)), key=lambda r: (r.group, r.sample))
    for r in found:
        r.grade = Grade(rng.random() < 0.4, True)
    return found


def rewards_of(responses, samples=6):
    return torch.tensor([float(r.grade.strict) for r in responses]).view(-1, samples)


def gradient(model, responses, config=CONFIG, size=1):
    """The gradient that `update` hands to the optimizer, with `size` workers played one after the other."""
    total = None

    class Rank(Alone):
        def __init__(self, rank):
            super().__init__(config)
            self.rank, self.size = rank, size

        def sum(self, tensors):
            self.seen = [t.clone() for t in tensors]

    class Frozen:
        param_groups = [{}]

        def step(self):
            pass

        def zero_grad(self):
            model.zero_grad()

    for rank in range(size):
        team = Rank(rank)
        stats = update(model, None, Frozen(), responses, advantages(rewards_of(responses), config.loss).flatten().tolist(), 0, config, team)
        total = team.seen if total is None else [a + b for a, b in zip(total, team.seen)]
    return total, stats


def close(a, b, tolerance=1e-5):
    scale = max(x.abs().max() for x in a)
    return all(torch.allclose(x, y, atol=tolerance * scale) for x, y in zip(a, b))


# ---------------------------------------------------------------- masks, log-probabilities, temperature


def check_scoring(model, scorer, sampled_at=1.0, scored_at=1.0):
    responses = make_responses(model, sampled_at)
    assert any(r.stopped for r in responses) and len({len(r.tokens) for r in responses}) >= 3
    logp = scorer(model, responses, scored_at)
    behaviour = torch.cat([r.logprobs for r in responses])
    assert logp.shape == behaviour.shape  # one for every token, the stop token included
    assert torch.allclose(logp, behaviour, atol=1e-4)


def test_rollout_logprobs_equal_recomputed_ones(monkeypatch):
    model = tiny()
    check_scoring(model, token_logprobs)
    check_scoring(model, token_logprobs, 0.7, 0.7)
    caught(check_scoring, model, token_logprobs, 0.7, 1.0)  # another temperature in scoring
    caught(check_scoring, model, lambda m, r, t: token_logprobs(m, [replace(x, prompt=x.prompt[1:]) for x in r], t))  # shifted positions


def check_stop_token_learns(model, scorer):
    responses = [r for r in make_responses(model) if r.stopped][:2]
    bias = torch.zeros(118, requires_grad=True)
    hook = model.lm_head.register_forward_hook(lambda module, args, out: out + bias)
    scorer(model, responses, 1.0).sum().backward()
    hook.remove()
    counts = torch.bincount(torch.tensor([t for r in responses for t in r.tokens]), minlength=118)
    with torch.no_grad():  # d/dbias of sum log softmax = counts - sum of probabilities: only right if every stop token is in
        p = sum(model(input_ids=torch.tensor([(r.prompt + r.tokens)[:-1]])).logits[0, len(r.prompt) - 1:].softmax(-1).sum(0) for r in responses)
    assert torch.allclose(bias.grad, counts - p, atol=1e-3)


def test_the_stop_token_gets_its_gradient():
    model = tiny()
    check_stop_token_learns(model, token_logprobs)

    def masked_by_pad(m, responses, t):  # what `ids != pad` does when pad and stop token are the same
        return token_logprobs(m, [replace(r, tokens=[x for x in r.tokens if x != 1]) for r in responses], t)
    caught(check_stop_token_learns, model, masked_by_pad)


# ---------------------------------------------------------------- denominators


def check_partition_invariance(loss):
    model, config = tiny(), replace(CONFIG, loss=loss)
    responses = make_responses(model)
    whole, _ = gradient(model, responses, replace(config, micro_tokens=10_000))
    for size, tokens in ((1, 60), (2, 200), (3, 90)):
        assert close(whole, gradient(model, responses, replace(config, micro_tokens=tokens), size)[0])


@pytest.mark.parametrize("loss", ["grpo", "dr_grpo", "dapo"])
def test_gradient_does_not_depend_on_micro_batches_or_workers(loss, monkeypatch):
    check_partition_invariance(loss)
    scorer = train_grpo.token_logprobs

    def local(model, responses, t):  # denominators of the micro-batch instead of the whole
        for r, w in zip(responses, token_weights([len(r.tokens) for r in responses], loss, 30)):
            r.weight = w
        return scorer(model, responses, t)
    monkeypatch.setattr(train_grpo, "token_logprobs", local)
    caught(check_partition_invariance, loss)


def check_content_order(cut):
    model = tiny()
    responses = make_responses(model)
    shuffled = random.Random(3).sample(responses, len(responses))
    key = lambda shares: [[[(r.group, r.sample) for r in batch] for batch in share] for share in shares]
    assert key(cut(responses, 150, 2)) == key(cut(shuffled, 150, 2))
    seen = [r for share in cut(responses, 150, 2) for batch in share for r in batch]
    assert sorted((r.group, r.sample) for r in seen) == [(r.group, r.sample) for r in responses]
    assert all(len(b) == 1 or len(b) * max(len(r.prompt) + len(r.tokens) for r in b) <= 150 for share in cut(responses, 150, 2) for b in share)


def test_micro_batches_are_cut_by_content():
    check_content_order(micro_batches)
    caught(check_content_order, lambda responses, tokens, workers: [[[r] for r in responses[i::workers]] for i in range(workers)])  # by arrival
    assert micro_batches([], 100, 3) == [[], [], []]


# ---------------------------------------------------------------- advantages and losses


def check_flat_groups(function):
    rewards = torch.tensor([[0.1] * 7, [1.0] * 7, [0.0] * 7, [0, 1, 0, 0, 1, 0, 0]])
    a = function(rewards, "grpo")
    assert (a[:3] == 0).all() and (a[3] != 0).all()


def test_groups_without_variance_contribute_exactly_zero_and_are_counted():
    check_flat_groups(advantages)
    caught(check_flat_groups, lambda r, loss: (r - r.mean(1, keepdim=True)) / (r.std(1, keepdim=True, correction=0) + 1e-6))
    model = tiny()
    responses = make_responses(model)
    for r in responses[:6]:
        r.grade = Grade(True, True)
    with_flat, _ = gradient(model, responses)
    for r in responses[:6]:
        r.tokens = r.tokens[::-1]  # other tokens, same lengths: a flat group must not matter
    assert all(torch.equal(a, b) for a, b in zip(with_flat, gradient(model, responses)[0]))
    row = describe(1, responses, rewards_of(responses), {}, [[("rollout", 0.0, 1.0), ("update", 1.0, 3.0)]], [{}])
    assert row["flat_groups"] >= 1 and row["seconds"]["step"] == 3.0


def check_first_update(loss_function, monkeypatch):
    monkeypatch.setattr(train_grpo, "policy_loss", loss_function)
    model = tiny()
    grads, stats = gradient(model, make_responses(model))
    assert abs(stats["loss"]) < 1e-6 and stats["gap_max"] < 1e-4 and stats["clipped"] == 0
    assert max(g.abs().max() for g in grads) > 1e-4


def test_first_update_has_loss_zero_and_a_gradient(monkeypatch):
    check_first_update(policy_loss, monkeypatch)
    caught(check_first_update, lambda logp, old, *rest: policy_loss(logp * 0 + old, old, *rest), monkeypatch)  # ratio without gradient
    caught(check_first_update, lambda logp, old, *rest: policy_loss(logp, old * 0.9, *rest), monkeypatch)  # ratio not 1


def test_weights_and_advantages_of_the_variants():
    assert token_weights([2, 8], "grpo", 30) == [1 / 4, 1 / 16]
    assert token_weights([2, 8], "dr_grpo", 30) == [1 / 60, 1 / 60]
    assert token_weights([2, 8], "dapo", 30) == [1 / 10, 1 / 10]
    r = torch.tensor([[1.0, 0, 0, 0]])
    assert torch.allclose(advantages(r, "dr_grpo"), torch.tensor([[0.75, -0.25, -0.25, -0.25]]))
    assert torch.allclose(advantages(r, "grpo").std(1, correction=0), torch.tensor([1.0]), atol=1e-4)


def test_clip_is_asymmetric_and_one_sided():
    config = replace(CONFIG, clip_low=0.2, clip_high=0.3)
    for ratio, advantage, clipped in ((1.4, 1, True), (1.25, 1, False), (0.7, 1, False), (0.7, -1, True), (0.85, -1, False), (1.4, -1, False)):
        logp = torch.tensor([math.log(ratio)], requires_grad=True)
        policy_loss(logp, torch.zeros(1), None, torch.tensor([float(advantage)]), torch.ones(1), config).backward()
        assert (logp.grad.item() == 0) == clipped, (ratio, advantage)


def test_k3_is_an_unbiased_positive_estimate_of_the_kl():
    p, q = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    each = [policy_loss(p.log()[i:i + 1], p.log()[i:i + 1], q.log()[i:i + 1], torch.zeros(1), torch.ones(1), replace(CONFIG, kl=1.0)) for i in range(3)]
    assert all(x > 0 for x in each)
    assert torch.isclose(sum(p[i] * each[i] for i in range(3)), (p * (p / q).log()).sum(), atol=1e-6)


def test_truncated_responses_are_counted_and_maskable():
    model = tiny()
    responses = make_responses(model)
    cut = [r for r in responses if not r.stopped]
    assert cut
    assert describe(1, responses, rewards_of(responses), {}, [[("rollout", 0.0, 1.0)]], [{}])["truncated"] == len(cut) / len(responses)
    masked, _ = gradient(model, responses, replace(CONFIG, mask_truncated=True))
    for r in cut:
        r.tokens = r.tokens[::-1]
    assert all(torch.equal(a, b) for a, b in zip(masked, gradient(model, responses, replace(CONFIG, mask_truncated=True))[0]))
    for r in cut:
        r.tokens = r.tokens[::-1]
    assert not close(masked, gradient(model, responses)[0])


@pytest.mark.parametrize("changes", [dict(epochs=2, minibatches=3), dict(kl=0.1), dict(bf16=True), dict(loss="dapo", clip_high=0.28)])
def test_update_improves_the_likelihood_of_what_was_right(changes):
    model, config = tiny(), replace(CONFIG, lr=3e-4, warmup=1, **changes)
    responses, optimizer = make_responses(model), None
    a = advantages(rewards_of(responses), config.loss).flatten()
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, weight_decay=0.0)
    score = lambda: sum(x * token_logprobs(model, [r], 1.0).mean() for x, r in zip(a.tolist(), responses)).item()
    before = score()
    stats = update(model, tiny() if config.kl else None, optimizer, responses, a.tolist(), 0, config, Alone(config))
    assert score() > before and math.isfinite(stats["grad_norm"])


def check_pass_at_k(estimator):
    for right in range(6):
        for k in range(1, 6):
            draws = list(itertools.combinations([1] * right + [0] * (5 - right), k))
            assert math.isclose(estimator(5, right, k), sum(any(d) for d in draws) / len(draws), abs_tol=1e-12)


def test_pass_at_k_is_unbiased():
    check_pass_at_k(pass_at_k)
    caught(check_pass_at_k, lambda n, c, k: 1 - (1 - c / n) ** k)  # the biased plug-in estimate


# ---------------------------------------------------------------- reporting and the whole loop


@given(st.lists(st.floats(0, 5), min_size=1, max_size=8))
def test_a_clock_accounts_for_every_second(durations):
    clock, now = Clock(), 100.0
    clock.spans, clock.since = [], now
    real = train_grpo.time.time
    try:
        for i, d in enumerate(durations):
            train_grpo.time.time = lambda now=now: now
            clock.enter(f"state {i % 3}")
            now += d
        train_grpo.time.time = lambda: now
        spans = clock.take()
    finally:
        train_grpo.time.time = real
    assert math.isclose(sum(end - start for _, start, end in spans), sum(durations), abs_tol=1e-6)


def test_gantt_shows_what_held_most_of_each_moment():
    assert gantt([("rollout", 0, 5), ("idle", 5, 8), ("update", 8, 10)], 0, 10, 10) == "#####...uu"


def check_idle_time(found):
    """Two workers: one trains the drafter from 4 to 10.1, while the other generates until 10. Of 6.3 idle seconds 6.1 are used, and training ends 0.1 s after the last response."""
    assert math.isclose(found["reclaimed"], 6.1 / 6.3) and math.isclose(found["preempted"], 0.1, abs_tol=1e-9)


def test_idle_time_by_hand():
    spans = [[("rollout", 0, 4), ("drafter", 4, 10.1), ("update", 10.1, 12)], [("speculative", 0, 9), ("reward", 9, 10), ("idle", 10, 10.2), ("update", 10.2, 12)]]
    counts = dict.fromkeys(["rounds", "spec_rounds", "spec_row_rounds", "spec_tokens", "spec_drafts", "drafter_steps", "drafter_loss", *(f"{x}{j}" for x in ("tried", "right") for j in range(12))], 1)
    check_idle_time(speculation(spans, [counts, counts])["drafter"])
    caught(check_idle_time, speculation([spans[0][:1] + spans[1][2:], spans[0]], [counts, counts])["drafter"])


def run_main(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["train_grpo.py", *map(str, argv)])
    run(train_grpo.main)


SMALL = ["--prompts", 3, "--samples", 4, "--max-new", 20, "--eval-problems", 4, "--eval-samples", 2, "--eval-every", 2, "--save-every", 2, "--device", "cpu"]


def weights(folder):
    from safetensors.torch import load_file
    return load_file(folder / "model.safetensors")


class Parity(Countdown):
    """Rewards that vary even for a random policy."""

    def grade(self, problem, text):
        return Grade(len(text) % 2 == 0, True)


def check_resume(folder, model_folder, monkeypatch):
    run_main(monkeypatch, "--model", model_folder, "--out", folder / "whole", "--steps", 4, *SMALL)
    run_main(monkeypatch, "--model", model_folder, "--out", folder / "parts", "--steps", 2, *SMALL)
    with open(folder / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n')  # a step that was done after the last checkpoint and then lost
    run_main(monkeypatch, "--model", model_folder, "--out", folder / "parts", "--steps", 4, "--resume", *SMALL)
    rows = [[{k: v for k, v in json.loads(line).items() if "seconds" not in k and k != "tokens_per_second"} for line in (folder / part / "metrics.jsonl").open()]
            for part in ("whole", "parts")]
    assert rows[0] == rows[1] and [r["step"] for r in rows[0]] == [0, 1, 2, 2, 3, 4, 4]
    a, b = weights(folder / "whole/policy"), weights(folder / "parts/policy")
    assert all(torch.equal(a[k], b[k]) for k in a)


def test_a_resumed_run_equals_an_uninterrupted_one(model_folder, tmp_path, monkeypatch):
    # rewards must vary for the weights to move: grade by the parity of the text's length
    monkeypatch.setattr(train_grpo, "make_task", lambda name, data: Parity())
    check_resume(tmp_path, model_folder, monkeypatch)
    assert {p.name for p in (tmp_path / "parts").iterdir()} == {"config.json", "metrics.jsonl", "curves.png", "timeline.png", "trace.json", "policy", "checkpoint-000002", "checkpoint-000004"}
    monkeypatch.setattr(train_grpo, "set_optimizer_state_dict", lambda *args, **kwargs: None)
    caught(check_resume, tmp_path / "broken", model_folder, monkeypatch)  # the optimizer's moments are lost


@pytest.mark.parametrize("argv, words", [
    (["--model", "no/such/folder"], "no/such/folder"), (["--task", "sudoku"], "sudoku"), (["--prompts", 0], "--prompts 0"), (["--temperature", 0], "--temperature 0"),
    (["--prompt-style", "chat"], "no chat template"), (["--max-new", 5000], "context of 256"), (["--resume"], "no checkpoint"), (["--out", __file__], "cannot write"),
    (["--task", "gsm8k", "--data", "no/such"], "no/such/"), (["--task", "gsm8k"], "no trace form|cannot load"), (["--device", "cuda"], "no GPU")])
def test_mistakes_get_one_line_and_status_2(argv, words, model_folder, tmp_path, monkeypatch, capsys):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    base = [] if "--model" in argv else ["--model", model_folder]
    out = [] if "--out" in argv else ["--out", tmp_path]
    with pytest.raises(SystemExit) as exit_info:
        run_main(monkeypatch, *base, *out, "--steps", 1, *argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert exit_info.value.code == 2 and re.search(words, error) and error.startswith("train_grpo.py: ")


@cases(100)
@given(st.lists(st.sampled_from(["--steps", "--lr", "--loss", "--workers", "--strategy", "--temperature", "--shard", "--no-resume", "--drafter", "--patience", "--bf16", "-1", "0", "3", "1e-3",
                                 "nan", "dapo", "goodput", "off", "4"]) | st.text(max_size=5), max_size=6))
def test_any_command_line_is_a_config_or_a_mistake_with_status_2(argv):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            config = parse_flags(tlt.TLTConfig, "", argv)
        except SystemExit as end:
            assert end.code == 2 or "-h" in argv
        except UserError as error:
            assert str(error).startswith("--")
        else:
            assert config.steps >= 1 and config.temperature > 0 and config.patience > 0 and math.isfinite(config.lr)


def test_unknown_flags_and_values_exit_with_2(capsys):
    for argv in (["--no-such-flag", "1"], ["--loss", "ppo"], ["--steps", "many"]):
        with pytest.raises(SystemExit) as exit_info:
            parse_flags(Config, "", argv)
        assert exit_info.value.code == 2
    config = parse_flags(Config, "", ["--lr", "3e-5", "--loss", "dapo", "--mask-truncated"])
    assert config.lr == 3e-5 and config.loss == "dapo" and config.mask_truncated


def checkpoint(folder, step, content="good"):
    def fill(f):
        (f / "x").write_text(content)
        (f / "state.json").write_text(json.dumps({"format": train_grpo.FORMAT, "step": step, "metrics": []}))
        (f / "checksums.json").write_text(json.dumps({name: train_grpo.checksum(f / name) for name in ("x", "state.json")}))
    train_grpo.save_folder(folder / f"checkpoint-{step:06d}", fill)
    return folder / f"checkpoint-{step:06d}"


def test_a_failed_checkpoint_write_leaves_the_last_one(tmp_path):
    checkpoint(tmp_path, 1)
    with pytest.raises(RuntimeError):
        train_grpo.save_folder(tmp_path / "checkpoint-000002", lambda f: [(f / "x").write_text("half"), (_ for _ in ()).throw(RuntimeError("killed"))])
    assert train_grpo.newest_checkpoint(tmp_path).name == "checkpoint-000001"


@pytest.mark.parametrize("harm", [lambda f: (f / "x").write_text("goof"), lambda f: (f / "x").write_text("go"), lambda f: (f / "x").unlink(), lambda f: (f / "state.json").write_text('{"form'),
                                  lambda f: (f / "state.json").unlink(), lambda f: (f / "state.json").write_text('{"format": 0}'), lambda f: (f / "state.json").write_text("[]"),
                                  lambda f: (f / "y").write_text("what is this?"), lambda f: (f / "checksums.json").unlink(), lambda f: (f / "checksums.json").write_text("[" * 100_000)])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, tmp_path):
    checkpoint(tmp_path, 1)
    harm(checkpoint(tmp_path, 2))
    said = []
    assert train_grpo.newest_checkpoint(tmp_path, said.append).name == "checkpoint-000001"
    assert len(said) == 1 and "checkpoint-000002 is damaged" in said[0]


@cases(40)
@given(st.sampled_from(["x", "state.json", "checksums.json"]), st.integers(0, 10**6), st.integers(0, 255) | st.none())
def test_a_byte_that_changes_anywhere_is_noticed(name, where, byte):
    """byte: what one byte becomes; None: the file ends there."""
    with tempfile.TemporaryDirectory() as folder:
        file = checkpoint(Path(folder), 1) / name
        old = file.read_bytes()
        where %= len(old)
        new = old[:where] if byte is None else old[:where] + bytes([byte]) + old[where + 1:]
        file.write_bytes(new)
        assert bool(train_grpo.damage(file.parent)) == (new != old)


def test_a_resumed_run_passes_over_a_damaged_checkpoint(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_grpo, "make_task", lambda name, data: Parity())
    argv = ["--model", model_folder, "--out", tmp_path, *SMALL, "--save-every", 1, "--eval-every", 0]
    run_main(monkeypatch, *argv, "--steps", 2)
    whole = weights(tmp_path / "policy")
    with open(tmp_path / "checkpoint-000002/model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"rot")
    run_main(monkeypatch, *argv, "--steps", 2, "--resume")  # makes step 2 again
    again = weights(tmp_path / "policy")
    assert "checkpoint-000002 is damaged (model.safetensors)" in capsys.readouterr().out and all(torch.equal(whole[k], again[k]) for k in whole)


def test_a_restart_by_torchrun_goes_on_and_other_settings_are_told(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_grpo, "make_task", lambda name, data: Parity())
    argv = ["--model", model_folder, "--out", tmp_path, *SMALL, "--save-every", 1, "--eval-every", 0]
    first = lambda: json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_main(monkeypatch, *argv, "--steps", 1)  # killed before the first checkpoint: there is nothing to go on from
    made = first()
    run_main(monkeypatch, *argv, "--steps", 2)
    assert first() == made and "other settings" not in capsys.readouterr().out  # with its seconds: it was not made again
    run_main(monkeypatch, *argv, "--steps", 3, "--resume", "--lr", 0.5)
    assert "lr 0.0001 -> 0.5" in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run_main(monkeypatch, *argv, "--steps", 1)
    assert first() != made and [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"]


def test_a_disk_that_is_full_gives_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1)
    monkeypatch.setattr(train_grpo, "save_policy", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(UserError, match="No space left on device.*checkpoint-000001"):
        train_grpo.save_checkpoint(tmp_path, 2, None, None, ({}, {}), [])
    assert [p.name for p in tmp_path.iterdir()] == ["checkpoint-000001"]


def check_poison(model_folder, out, monkeypatch):
    """The loss is nan in steps 2 to 4: the policy stays that of step 1, and the run stops."""
    calls, real = [0], train_grpo.policy_loss

    def poisoned(*args):
        calls[0] += 1
        return real(*args) * (float("nan") if calls[0] > 1 else 1.0)

    monkeypatch.setattr(train_grpo, "policy_loss", poisoned)
    status = None
    try:
        run_main(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--save-every", 1, "--eval-every", 0, "--steps", 9)
    except SystemExit as end:
        status = end.code
    assert status == 2
    rows = [json.loads(line) for line in (out / "metrics.jsonl").open()]
    assert [r["skipped"] for r in rows] == [0, 1, 1, 1]
    assert all(x.isfinite().all() for x in weights(out / "checkpoint-000003").values())


def test_a_gradient_that_is_not_finite_is_skipped_and_three_stop_the_run(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_grpo, "make_task", lambda name, data: Parity())
    check_poison(model_folder, tmp_path / "good", monkeypatch)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "three steps in a row" in error and "checkpoint-000003" in error
    monkeypatch.undo()
    monkeypatch.setattr(train_grpo, "make_task", lambda name, data: Parity())
    monkeypatch.setattr(train_grpo.math, "isfinite", lambda x: True)
    caught(check_poison, model_folder, tmp_path / "broken", monkeypatch)


def check_out_of_memory(limit, monkeypatch, cut=micro_batches):
    """Whatever exceeds `limit` tokens does not fit: the gradient is that of a machine with room, the next update begins with what fits."""
    model = tiny()
    responses = make_responses(model)
    wanted, stats = gradient(model, responses)
    real, tried = train_grpo.token_logprobs, []

    def small(model, micro, temperature):
        tried.append(len(micro) * max(len(r.prompt) + len(r.tokens) for r in micro))
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("no room")
        return real(model, micro, temperature)

    monkeypatch.setattr(train_grpo, "token_logprobs", small)
    found, again = gradient(model, responses)
    assert close(wanted, found) and abs(stats["gap_max"] - again["gap_max"]) < 1e-6 and max(tried) > limit
    monkeypatch.undo()


def test_what_does_not_fit_memory_is_cut_finer_and_done_again(monkeypatch, capsys):
    check_out_of_memory(100, monkeypatch)
    assert "--micro-tokens 100" in capsys.readouterr().out
    with pytest.raises(UserError, match="single response"):
        check_out_of_memory(5, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda self: None)  # what a failed try has summed up stays
    caught(check_out_of_memory, 100, monkeypatch)


def check_rotary(cast):
    """The rollout's bfloat16 copy turns by the policy's own angles: rounded to 8 bits they would be others, the further on the worse."""
    model = tiny()
    own, copied = (m.get_decoder().rotary_emb(torch.zeros(1), torch.arange(200)[None])[0] for m in (model, cast(copy.deepcopy(model))))
    assert torch.equal(own, copied.float())


def test_the_bfloat16_copy_keeps_its_rotary_angles():
    check_rotary(train_grpo.bfloat16)
    assert {p.dtype for p in train_grpo.bfloat16(tiny()).parameters()} == {torch.bfloat16}
    caught(check_rotary, lambda model: model.bfloat16())
