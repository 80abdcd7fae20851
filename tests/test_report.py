"""What a run reports: timers, timelines, idle time, rows of metrics, summaries, pictures."""

import itertools
import json
import math
from dataclasses import replace

import pytest
import torch
from conftest import caught
from hypothesis import given
from hypothesis import strategies as st

import report
from parts.cli import UserError
from parts.engine.interfaces import Response, Stats
from parts.running import timers
from parts.running.pictures import draw_curves, draw_timeline, gantt, trace
from parts.running.timers import Span, WorkerTimer
from report import (
    SpeculationStats,
    evaluation,
    metrics_row,
    model_card,
    pass_at_k,
    speculation_figures,
    summarise,
)
from tasks import Grade
from train_grpo import Config


@given(st.lists(st.floats(0, 5), min_size=1, max_size=8))
def test_a_timer_accounts_for_every_second(durations):
    class FakeTime:
        now = 100.0

        def time(self):
            return self.now

    fake = FakeTime()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(timers, "time", fake)
        timer = WorkerTimer()
        for i, seconds in enumerate(durations):
            timer.enter(f"state {i % 3}")
            fake.now += seconds
        spans = timer.take_spans()
    assert math.isclose(sum(span.seconds for span in spans), sum(durations), abs_tol=1e-6)
    assert all(a.end == b.start for a, b in zip(spans, spans[1:]))


def test_a_timer_sends_heartbeats():
    states = []
    timer = WorkerTimer(states.append)
    for state in ("rollout", "rollout", "idle"):
        timer.enter(state)
    assert states == ["rollout", "rollout", "idle"]


def test_a_timer_records_how_many_sequences_ran():
    """A new span begins where their number changes; a call without the number keeps it within a rollout."""
    timer = WorkerTimer()
    for state, rows in (("rollout", None), ("rollout", 8), ("rollout", 8), ("rollout", 3), ("reward", None)):
        timer.enter(state, rows)
    spans = [(span.state, span.rows) for span in timer.take_spans()]
    assert spans == [("idle", 0), ("rollout", 0), ("rollout", 8), ("rollout", 3), ("reward", 3)]
    for state in ("update", "rollout"):  # the next rollout has no sequences yet
        timer.enter(state)
    assert [(span.state, span.rows) for span in timer.take_spans()] == [("reward", 3), ("update", 0), ("rollout", 0)]


def test_a_timeline_shows_the_state_that_took_most_of_each_moment():
    spans = [Span("rollout", 0, 5), Span("idle", 5, 8), Span("update", 8, 10)]
    assert gantt(spans, 0, 10, 10) == "#####...uu"


# ---------------------------------------------------------------- speculation and idle time

STATS = SpeculationStats(10, 5, 20, 60, 80, [20, 15, 0], [15, 10, 0], 4, 2.0)
WORKERS = [
    [Span("rollout", 0, 4), Span("drafter", 4, 10.1), Span("update", 10.1, 12)],
    [Span("speculative", 0, 9), Span("reward", 9, 10), Span("idle", 10, 10.2), Span("update", 10.2, 12)],
]


def check_idle_time(row: dict):
    """One of two workers trains its drafter from 4 to 10.1 s, while the other one generates until 10. Of 6.3 idle
    seconds 6.1 are used, and training ends 0.1 s after the last response.
    """
    assert math.isclose(row["reclaimed"], 6.1 / 6.3)
    assert math.isclose(row["preempted"], 0.1, abs_tol=1e-9)


def test_a_warm_start_is_no_late_end_of_drafter_training():
    """It begins when all responses exist."""
    warm = [Span("idle", 10.1, 10.2), Span("drafter", 10.2, 130)]
    row = speculation_figures([[*WORKERS[0][:2], *warm], WORKERS[1]], [STATS, STATS])["drafter"]
    assert math.isclose(row["preempted"], 0.1, abs_tol=1e-9)


def test_idle_time_by_hand():
    check_idle_time(speculation_figures(WORKERS, [STATS, STATS])["drafter"])
    first, second = WORKERS
    caught(check_idle_time, speculation_figures([first[:1] + second[2:], first], [STATS, STATS])["drafter"])


def test_speculation_by_hand():
    row = speculation_figures(WORKERS, [STATS, STATS])
    assert row["speculation"] == {"tokens_per_round": 3.0, "k": 4.0, "share": 0.5, "acceptance": [0.75, 10 / 15, None]}
    assert row["drafter"]["steps"] == 8
    assert row["drafter"]["loss"] == 0.5
    assert speculation_figures(WORKERS, [None, None]) == {}


def test_the_rollouts_of_a_step_are_summed():
    total = SpeculationStats()
    stats = Stats(rounds=3, spec_rounds=2, spec_sequence_rounds=5, spec_tokens=9, spec_drafts=8)
    total.add_rollout(stats)
    total.add_rollout(stats)
    assert (total.rounds, total.spec_rounds, total.spec_sequence_rounds) == (6, 4, 10)
    assert (total.spec_tokens, total.spec_drafts) == (18, 16)


# ---------------------------------------------------------------- rows


def step_of(rewards: list[list[float]], lengths: list[int], stopped: list[bool]):
    """Return responses with these rewards, lengths and ends, and the rewards as a tensor."""
    responses = []
    grades = [reward for group in rewards for reward in group]
    for i, (reward, length, end) in enumerate(zip(grades, lengths, stopped)):
        tokens = list(range(i, i + length))
        responses.append(Response(0, i, [1], tokens, None, end, grade=Grade(reward > 0, True)))
    return responses, torch.tensor(rewards)


def check_row(metrics_row):
    """There are three groups of two; in two of them the rewards are equal. The last response is truncated."""
    grades = [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]]
    responses, rewards = step_of(grades, [2, 4, 6, 8, 10, 12], [True] * 5 + [False])
    row = metrics_row(7, responses, rewards, {"loss": 0.5}, WORKERS, [STATS, STATS])
    assert (row["step"], row["reward"], row["solved"], row["zero_variance_groups"]) == (7, 0.5, pytest.approx(2 / 3), 2)
    assert (row["lenient"], row["truncated"], row["tokens"], row["loss"]) == (1.0, 1 / 6, 42, 0.5)
    assert row["length"] == {"mean": 7.0, "p50": 8, "p95": 12, "p99": 12, "max": 12}
    seconds = row["seconds"]
    assert seconds["step"] == pytest.approx(12.0)
    assert seconds["rollout"] == 2.0
    assert seconds["speculative"] == 4.5
    assert seconds["update"] == pytest.approx(1.85)
    assert sum(seconds.values()) == pytest.approx(2 * seconds["step"])
    assert row["tokens_per_second"] == pytest.approx(42 / (12 - 1.85))
    assert row["drafter"]["steps"] == 8


def test_the_row_of_a_step_by_hand():
    check_row(metrics_row)

    def of_the_first_worker(step, responses, rewards, stats, spans, speculation):
        return metrics_row(step, responses, rewards, stats, spans[:1], speculation)

    def with_transposed_groups(step, responses, rewards, *rest):
        return metrics_row(step, responses, rewards.T, *rest)

    caught(check_row, of_the_first_worker)
    caught(check_row, with_transposed_groups)


def test_equal_digests_mean_equal_tokens():
    def digest(responses) -> int:
        return metrics_row(1, responses, rewards, {}, WORKERS, [None, None])["digest"]

    responses, rewards = step_of([[1.0, 0.0]], [3, 5], [True, True])
    first = digest(responses)
    assert first == digest(responses)
    responses[1].tokens[2] += 1
    assert first != digest(responses)


# ---------------------------------------------------------------- evaluations and summaries


def check_pass_at_k(estimator):
    """The estimate equals the mean over all draws of k samples out of 5."""
    for right in range(6):
        for k in range(1, 6):
            draws = list(itertools.combinations([1] * right + [0] * (5 - right), k))
            wanted = sum(any(draw) for draw in draws) / len(draws)
            assert math.isclose(estimator(5, right, k), wanted, abs_tol=1e-12)


def test_pass_at_k_is_unbiased():
    check_pass_at_k(pass_at_k)
    caught(check_pass_at_k, lambda n, c, k: 1 - (1 - c / n) ** k)  # the biased plug-in estimate


def responses(*grades: bool) -> list[Response]:
    return [Response(0, i, [1], [2, 3], None, True, grade=Grade(good, True)) for i, good in enumerate(grades)]


def test_the_row_of_an_evaluation_by_hand():
    row = evaluation(5, responses(True, False, False, False), 2, 1.5)
    assert row["eval"] == {"pass@1": 0.25, "pass@2": 0.5}
    assert row["lenient"] == 1.0
    assert (row["problems"], row["samples"], row["length"], row["step"]) == (2, 2, 2.0, 5)


def step_row(step: int) -> dict:
    seconds = {"rollout": 1.0, "update": 0.5, "step": 1.5}
    return {"step": step, "seconds": seconds, "speculation": {"share": 0.5, "tokens_per_round": 3.0, "k": 4.0}}


def test_summary_and_model_card_show_the_figures_of_the_run():
    first = evaluation(0, responses(False, True), 2, 1.0)
    last = evaluation(2, responses(True, True), 2, 1.0)
    config = replace(Config(device="cpu"), out="somewhere")
    metrics = [first, step_row(1), step_row(2), last]
    text = summarise(metrics, config)["text"]
    assert "held-out pass@1: 0.500 -> 1.000 (+0.500)" in text
    assert "2 steps in 3 s: rollout 67%, update 33%" in text
    card = model_card(metrics, config)
    assert "| 2 | 1.000 | 1.000 | 2 |" in card
    assert "3.00 tokens per round" in card


def test_a_run_without_steps_or_evaluations_has_a_summary():
    config = Config(device="cpu")
    assert "0 steps in 0 s" in summarise([], config)["text"]
    assert "0 GRPO steps" in model_card([], config)
    assert json.loads(trace([])) == {"traceEvents": []}


@pytest.mark.parametrize("metrics", [[], [step_row(1)]])
def test_pictures_are_drawn(metrics, tmp_path):
    for row in metrics:
        row.update(reward=0.5, length={"mean": 1, "p50": 1, "p95": 1, "max": 1})
    draw_curves(metrics, tmp_path / "curves.png", Config(device="cpu"))
    counted = [[span._replace(rows=7) for span in worker] for worker in WORKERS]
    draw_timeline({"one": WORKERS, "two": counted}, tmp_path / "timeline.png")
    assert (tmp_path / "curves.png").exists()
    assert (tmp_path / "timeline.png").exists()


def test_a_resume_with_other_eval_samples_can_be_reported(monkeypatch, tmp_path):
    """pass@2 before, pass@4 after: only pass@1 is in all rows. A variant that goes by the first row fails."""
    right = [True, True, False, True]
    metrics = [evaluation(0, responses(False, True), 2, 1.0), evaluation(2, responses(*right), 4, 1.0)]
    config = Config(device="cpu")

    def check() -> None:
        try:
            text = summarise(metrics, config)["text"]
            assert "held-out pass@1: 0.500 -> 0.750" in text and "pass@2" not in text
            assert "| 2 | 0.750 | 2 |" in model_card(metrics, config)
            draw_curves(metrics, tmp_path / "curves.png", config)
        except KeyError as error:
            raise AssertionError(error) from error

    check()
    monkeypatch.setattr(report, "score_names", lambda evals: list(evals[0]["eval"]))
    caught(check)


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "curves.png").mkdir()
    with pytest.raises(UserError, match="cannot write .*curves.png"):
        draw_curves([], tmp_path / "curves.png", Config(device="cpu"))
