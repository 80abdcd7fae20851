"""`bench gpu`: the whole of it runs without a GPU, and says what it has not tested."""

import pytest
from conftest import caught

from bench import gpu, verdicts
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
    caught(check_verdicts, run_bench("gpu", "--parts", "exact", "round", "--responses", 16)["rows"])


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
