"""`bench gpu`: all of it runs without a GPU, and it names what it has not tested."""

import subprocess

import pytest
import torch
from conftest import caught

from base import pretrain
from bench import anatomy, gpu, harness, verdicts
from rollout import Engine


def check_verdicts(rows: list[dict]) -> None:
    """Without a GPU nothing is refuted, speeds are not tested, and what a CPU can show is confirmed."""
    verdicts = {row["claim"]: row["verdict"] for row in rows if "verdict" in row}
    assert "REFUTED" not in verdicts.values()
    assert verdicts["float32: bucketed, chain of 4 makes plain decoding's responses"] == "CONFIRMED"
    assert verdicts["operators of a plain round, fused / modules"] == "CONFIRMED"
    for row in rows:
        if "verdict" in row and row["measured"] is None:
            assert row["verdict"] == "NOT TESTED"
    speeds = (
        "four draft tokens over none, batch 8",
        "a GRPO step, plain / TLT",
        "bytes of a slot, counted / taken",
    )
    assert all(verdicts[claim] == "NOT TESTED" for claim in speeds)


def test_the_gpu_bench_runs_whole_without_a_gpu(run_bench, monkeypatch):
    result = run_bench("gpu", "--device", "cpu", "--responses", 16)
    assert {row["part"] for row in result["rows"]} == set(gpu.PARTS)
    check_verdicts(result["rows"])
    monkeypatch.setattr(Engine, "commit", harmed_commit(Engine.commit))
    caught(check_verdicts, run_bench("gpu", "--parts", "exact", "--responses", 16)["rows"])


def check_a_failing_part_is_refuted(monkeypatch, capsys):
    """The reason is printed, and the other parts run."""

    def fails(config):
        raise RuntimeError("an odd driver")

    with monkeypatch.context() as patch:
        patch.setitem(gpu.FUNCTIONS, "machine", fails)
        patch.setitem(gpu.FUNCTIONS, "memory", lambda config: [verdicts.claim("others", 1.0, ">=", 1.0)])
        rows = gpu.measure(gpu.Config(parts=("machine", "memory"), device="cpu")).rows
    found = {row["claim"]: row["verdict"] for row in rows if "verdict" in row}
    assert found == {"the part runs to its end (an odd driver)": "REFUTED", "others": "CONFIRMED"}
    assert "an odd driver" in capsys.readouterr().err


def test_a_failing_part_is_refuted(monkeypatch, capsys):
    check_a_failing_part_is_refuted(monkeypatch, capsys)
    monkeypatch.setattr(gpu, "attempt", lambda name, config: [])
    caught(check_a_failing_part_is_refuted, monkeypatch, capsys)


def test_tokens_of_a_round_follow_from_the_stated_acceptance():
    model = anatomy.random_model("tiny", "cpu", torch.float32)
    rows = anatomy.time_ways(model, (2,), (0, 4), 4, 8, anatomy.WAYS[:2])
    assert [(row["batch"], row["k"], row["way"]) for row in rows] == [
        (2, 0, "modules"),
        (2, 0, "fused layers"),
        (2, 4, "modules"),
        (2, 4, "fused layers"),
    ]
    assert all(row["ms"] > 0 for row in rows)
    tokens = 1 + 0.8 + 0.8 * 0.75 + 0.8 * 0.75 * 0.7 + 0.8 * 0.75 * 0.7 * 0.65
    assert [row["tokens"] for row in rows] == pytest.approx([1, 1, tokens, tokens])


def check_steps_see_what_was_learned(monkeypatch, folder):
    """A policy that learns in autocast uses its newest weights."""

    def learn(model, plan, lr, title):
        ids = torch.arange(2, 20)[None]
        before = model(input_ids=ids).logits
        with torch.no_grad():
            model.lm_head.weight.mul_(1.5)
        assert not before.equal(model(input_ids=ids).logits)
        assert before.dtype == torch.bfloat16

    with monkeypatch.context() as patch:
        new_policy = pretrain.new_policy
        patch.setattr(pretrain, "new_policy", lambda tokenizer, layers, width: new_policy(tokenizer, 1, 64))
        patch.setattr(pretrain, "plan_of", lambda settings: [])
        patch.setattr(pretrain, "learn", learn)
        patch.setattr(subprocess, "run", lambda command, **settings: subprocess.CompletedProcess(command, 0))
        gpu.learn_policy(gpu.Config(device="cpu", traces=100), folder)
    assert (folder / "config.json").exists()


def test_steps_see_what_was_learned(monkeypatch, tmp_path):
    check_steps_see_what_was_learned(monkeypatch, tmp_path)
    right = torch.autocast
    monkeypatch.setattr(torch, "autocast", lambda device, dtype, **settings: right(device, dtype))
    caught(check_steps_see_what_was_learned, monkeypatch, tmp_path)


def test_what_makes_a_run_slow_is_shown(monkeypatch, capsys):
    said = "step 1\nrounds are not replayed as CUDA graphs, and slower for it: asks the host\nstep 2\n"
    monkeypatch.setattr(subprocess, "run", lambda command, **settings: subprocess.CompletedProcess(command, 0, said))
    monkeypatch.setattr(harness, "read_metrics", lambda folder: None)
    harness.train(["--steps", 1], "nowhere")
    shown = capsys.readouterr().out
    assert "asks the host" in shown
    assert "step" not in shown


def harmed_commit(commit):
    """Return a commit that, in bucketed rounds, takes one token more than was accepted."""

    def harmed(self, verification, index, sampling):
        one_more = verification.accepted + (1 if self.bucketed else 0)
        one_more = one_more.clamp(max=verification.tokens.shape[1] - 1)
        return commit(self, verification._replace(accepted=one_more), index, sampling)

    return harmed


@pytest.mark.parametrize(
    ("measured", "sign", "word"),
    [
        (2.0, ">=", "CONFIRMED"),
        (1.5, ">=", "CONFIRMED"),
        (1.0, ">=", "REFUTED"),
        (1.0, "<=", "CONFIRMED"),
        (2.0, "<=", "REFUTED"),
        (None, ">=", "NOT TESTED"),
        (float("nan"), ">=", "REFUTED"),
        (float("nan"), "<=", "REFUTED"),
    ],
)
def test_verdicts(measured, sign, word):
    assert verdicts.claim("a claim", measured, sign, 1.5)["verdict"] == word
