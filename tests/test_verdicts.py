"""`bench gpu`: the whole of it runs without a GPU, and says what it has not tested."""

import subprocess

import pytest
import torch
from conftest import caught

from base import pretrain
from bench import anatomy, gpu, harness, verdicts
from rollout import Engine


def check_verdicts(rows: list[dict]) -> None:
    """Without a GPU nothing is refuted, speeds are not tested, and what a CPU can tell is confirmed."""
    verdicts = {row["claim"]: row["verdict"] for row in rows if "verdict" in row}
    assert "REFUTED" not in verdicts.values()
    assert verdicts["float32: rounded, chain of 4 makes plain decoding's responses"] == "CONFIRMED"
    assert verdicts["operators of a plain round, fused / modules"] == "CONFIRMED"
    for row in rows:
        if "verdict" in row and row["measured"] is None:
            assert row["verdict"] == "NOT TESTED"
    speeds = ("four drafts over none, 8 rows", "a GRPO step, plain / TLT", "bytes of a row, counted / taken")
    assert all(verdicts[claim] == "NOT TESTED" for claim in speeds)


def test_the_gpu_bench_runs_whole_without_a_gpu(run_bench, monkeypatch):
    result = run_bench("gpu", "--device", "cpu", "--responses", 16)
    assert {row["part"] for row in result["rows"]} == set(gpu.PARTS)
    check_verdicts(result["rows"])
    monkeypatch.setattr(Engine, "commit", harmed_commit(Engine.commit))
    caught(check_verdicts, run_bench("gpu", "--parts", "exact", "--responses", 16)["rows"])


def check_a_failing_part_is_refuted(monkeypatch, capsys):
    """It is told why, and the other parts run."""

    def fails(place):
        raise RuntimeError("an odd driver")

    with monkeypatch.context() as patch:
        patch.setitem(gpu.FUNCTIONS, "machine", fails)
        patch.setitem(gpu.FUNCTIONS, "memory", lambda place: verdicts.Found([], [verdicts.Verdict("others", 1.0, 1.0)]))
        rows = gpu.measure(gpu.Config(parts=("machine", "memory"), device="cpu")).rows
    found = {row["claim"]: row["verdict"] for row in rows if "verdict" in row}
    assert found == {"the part runs to its end (an odd driver)": "REFUTED", "others": "CONFIRMED"}
    assert "an odd driver" in capsys.readouterr().err


def test_a_failing_part_is_refuted(monkeypatch, capsys):
    check_a_failing_part_is_refuted(monkeypatch, capsys)
    monkeypatch.setattr(gpu, "attempt", lambda name, place: verdicts.Found([], []))
    caught(check_a_failing_part_is_refuted, monkeypatch, capsys)


@torch.no_grad()
def check_rounding_parts_no_response(scale: float):
    """The oracle knows what comes, also where weights are a tenth off, which is more than rounding is."""
    model = anatomy.random_model("tiny", "cpu", torch.float32)
    model.get_output_embeddings().weight.mul_(scale)
    known = anatomy.subject_of(model, 8, 4, 32).engine.proposers["eagle"].responses
    torch.manual_seed(3)
    for p in model.parameters():
        p.mul_(1 + 0.1 * torch.randn_like(p))
    assert anatomy.subject_of(model, 8, 4, 32).engine.proposers["eagle"].responses == known


def test_rounding_parts_no_response_from_what_the_oracle_knows():
    check_rounding_parts_no_response(1.0)
    caught(check_rounding_parts_no_response, 1000.0)  # as large as logits are in such a model


def check_steps_see_what_was_learned(monkeypatch, folder):
    """A policy that learns in autocast is computed with the weights that it has now."""

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
        gpu.learn_policy(verdicts.Place("cpu", 16, 100), folder)
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
    """A commit that, in rounded rounds, takes one token more than was accepted."""

    def harmed(self, verdict, index, sampling):
        one_more = verdict.accepted + (1 if self.bucketed else 0)
        return commit(self, verdict._replace(accepted=one_more.clamp(max=verdict.tokens.shape[1] - 1)), index, sampling)

    return harmed


@pytest.mark.parametrize(
    ("measured", "bound", "at_least", "word"),
    [
        (2.0, 1.5, True, "CONFIRMED"),
        (1.0, 1.5, True, "REFUTED"),
        (1.0, 1.5, False, "CONFIRMED"),
        (None, 0, True, "NOT TESTED"),
    ],
)
def test_verdicts(measured, bound, at_least, word):
    assert verdicts.Verdict("a claim", measured, bound, at_least).word == word
    assert verdicts.Verdict("a claim", float("nan"), bound, at_least).word == "REFUTED"
