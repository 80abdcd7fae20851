"""The training loop: gradients that are too large or not finite, and what the loop asks of a rollout."""

import math
import threading
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from conftest import caught, rows_of, run_in_process, tiny
from safetensors.torch import load_file
from test_grpo import CONFIG, NormRecorder, advantage_of, gradient, make_responses, norm_of

import rollout
import train_grpo
from parts.cli import UserError, run
from parts.engine.interfaces import Group
from parts.engine.model_loading import cast_weights
from parts.engine.sampling import Sampling, sequence_seed
from rollout import Engine
from tasks import Countdown, Grade
from train_grpo import Config, Worker, policy_loss, update

# ---------------------------------------------------------------- the rollout's copy


def check_rotary_angles(cast):
    """The copy that generates uses the policy's own rotary angles. Rounded to 8 bits they would differ, the more the
    further from the start.
    """
    positions = torch.arange(200)[None]
    own, _ = tiny().get_decoder().rotary_emb(torch.zeros(1), positions)
    copied, _ = cast(tiny()).get_decoder().rotary_emb(torch.zeros(1), positions)
    assert torch.equal(own, copied.float())


def test_the_bfloat16_copy_keeps_its_rotary_angles():
    check_rotary_angles(lambda model: cast_weights(model, torch.bfloat16))
    assert {p.dtype for p in cast_weights(tiny(), torch.bfloat16).parameters()} == {torch.bfloat16}
    caught(check_rotary_angles, lambda model: model.bfloat16())


# ---------------------------------------------------------------- runs

SMALL = (
    "--prompts 3 --samples 4 --max-new 20 --eval-problems 4 --eval-samples 2 --eval-every 0 --save-every 1 --device cpu"
).split()


class Parity(Countdown):
    """Rewards that vary even for a random policy: 1 where the text's length is even."""

    def grade(self, problem, text):
        return Grade(len(text) % 2 == 0, True)


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.setattr(train_grpo, "make_task", lambda *settings: Parity())


def run_main(monkeypatch, *argv):
    """Run train_grpo.py in this process."""
    monkeypatch.setattr("sys.argv", ["train_grpo.py", *map(str, argv)])
    run(train_grpo.main)


# ---------------------------------------------------------------- gradients that are too large or not finite


def test_the_gradient_is_clipped_to_the_largest_norm():
    model = tiny()
    config = replace(CONFIG, grad_clip=0.01)
    responses = make_responses(model)
    whole, _ = gradient(model, responses, config)
    optimizer = NormRecorder(model)
    stats = update(model, None, optimizer, responses, advantage_of(responses), 0, config, Worker(config))
    assert stats["grad_norm"] == pytest.approx(norm_of(whole))
    assert norm_of(whole) > 0.1
    assert optimizer.norms == [pytest.approx(0.01, rel=1e-3)]


def run_with_nan(model_folder, out, bad_steps, steps, monkeypatch):
    """Make a run whose loss is nan in some steps (from 1) -> its exit status; None: it made all its steps."""
    calls = []

    def loss(*args):
        calls.append(len(calls) + 1)
        return policy_loss(*args) * (float("nan") if calls[-1] in bad_steps else 1.0)

    monkeypatch.setattr(train_grpo, "policy_loss", loss)
    try:
        run_main(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--steps", steps)
    except SystemExit as end:
        return end.code
    return None


def check_three_bad_steps(model_folder, out, monkeypatch):
    """The policy stays that of step 1, and the run stops."""
    assert run_with_nan(model_folder, out, (2, 3, 4), 9, monkeypatch) == 2
    assert [row["skipped"] for row in rows_of(out)] == [0, 1, 1, 1]
    weights = load_file(out / "checkpoint-000003/model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_an_update_that_is_not_finite_is_skipped_and_three_steps_stop_the_run(
    parity, model_folder, tmp_path, monkeypatch, capsys
):
    check_three_bad_steps(model_folder, tmp_path / "good", monkeypatch)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "three steps in a row" in error
    assert "checkpoint-000003" in error
    always = SimpleNamespace(**{**vars(math), "isfinite": lambda x: True})
    monkeypatch.setattr(train_grpo, "math", always)
    caught(check_three_bad_steps, model_folder, tmp_path / "broken", monkeypatch)


def check_bad_steps_not_in_a_row(model_folder, out, monkeypatch):
    """Three bad steps that are not in a row do not stop the run."""
    assert run_with_nan(model_folder, out, (1, 2, 4), 4, monkeypatch) is None
    assert [row["skipped"] for row in rows_of(out)] == [1, 1, 0, 1]


def test_a_finite_gradient_in_between_lets_the_run_continue(parity, model_folder, tmp_path, monkeypatch):
    check_bad_steps_not_in_a_row(model_folder, tmp_path / "good", monkeypatch)

    def counting_all_steps(self, row):
        self.bad_steps += row["skipped"]
        if self.bad_steps == 3:
            raise UserError("three bad steps")

    monkeypatch.setattr(train_grpo.Training, "check_gradient", counting_all_steps)
    caught(check_bad_steps_not_in_a_row, model_folder, tmp_path / "broken", monkeypatch)


# ---------------------------------------------------------------- what the loop asks of a rollout


def check_problems(model_folder, out, monkeypatch):
    """One problem of each split is made by `check`, then three new ones in each of two steps."""
    problems = []

    def problem(self, split, index):
        problems.append((split, index))
        return Countdown.problem(self, split, index)

    monkeypatch.setattr(Parity, "problem", problem)
    run_main(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--steps", 2)
    assert problems[:2] == [("train", 0), ("test", 0)]
    assert problems[2:] == [("train", i) for i in range(6)]


def test_the_problem_of_a_prompt_is_made_once(parity, model_folder, tmp_path, monkeypatch):
    check_problems(model_folder, tmp_path / "good", monkeypatch)

    def grade(self, response):
        text = self.tokenizer.decode(response.tokens, skip_special_tokens=False)
        response.grade = self.task.grade(self.task.problem(*response.group), text)

    monkeypatch.setattr(train_grpo.Training, "grade", grade)
    caught(check_problems, model_folder, tmp_path / "broken", monkeypatch)


def test_held_out_rollouts_teach_nothing_and_have_the_same_seeds_each_time(parity, model_folder, tmp_path, monkeypatch):
    learns = []
    seeds = {"train": [], "test": []}
    right = Worker.rollout

    def rollout(self, engine, groups, sampling, grade, progress, learn):
        split, _ = groups[0].key
        learns.append((split, learn))
        seeds[split].append([seed for group in groups for seed in group.seeds])
        return right(self, engine, groups, sampling, grade, progress, learn)

    monkeypatch.setattr(Worker, "rollout", rollout)
    flags = [*SMALL, "--steps", 2, "--eval-every", 1]
    run_main(monkeypatch, "--model", model_folder, "--out", tmp_path, *flags)
    assert learns == [("test", False), ("train", True)] * 2 + [("test", False)]
    first, *others = seeds["test"]
    assert others == [first, first]
    every_seed = first + seeds["train"][0] + seeds["train"][1]
    assert len(set(every_seed)) == 4 * 2 + 2 * 3 * 4


def check_grading_does_not_stop_generation(graded_responses):
    """The verifier of the first response waits until the last one is generated; then 32 verifiers run at once."""
    model = tiny()
    engine = Engine(model, {1}, 8, 64)
    groups = [Group(("train", i), [5, 6, 7 + i], [sequence_seed(i, k) for k in range(8)]) for i in range(4)]
    all_generated = threading.Event()
    all_in_grading = threading.Barrier(32)

    def generate(*args):
        yield from right_generate(*args)
        all_generated.set()

    right_generate = engine.generate
    engine.generate = generate

    def grade(response):
        if not all_generated.wait(2):
            raise AssertionError("generation waits for a verifier")
        all_in_grading.wait(20)
        response.grade = Grade(True, True)

    worker = Worker(Config(device="cpu"))
    responses = list(graded_responses(worker, engine, groups, Sampling(max_new=20), grade))
    assert len(responses) == 32
    assert all(r.grade.strict for r in responses)


def graded_one_by_one(worker, engine, groups, sampling, grade):
    for response in engine.generate(groups, sampling, None):
        grade(response)
        yield response


def test_grading_does_not_stop_generation():
    check_grading_does_not_stop_generation(Worker.graded_responses)
    caught(check_grading_does_not_stop_generation, graded_one_by_one)


def test_an_error_of_a_verifier_ends_the_rollout():
    engine = Engine(tiny(), {1}, 8, 64)

    def grade(response):
        raise UserError("the verifier is broken")

    group = Group(("train", 0), [5, 6, 7], [sequence_seed(0, k) for k in range(8)])
    with pytest.raises(UserError, match="verifier is broken"):
        list(Worker(Config(device="cpu")).graded_responses(engine, [group], Sampling(max_new=20), grade))


def test_layers_that_cannot_be_fused_are_named(model_folder, tmp_path, monkeypatch, capsys):
    flags = ["--steps", 1, "--eval-every", 0, "--show-every", 0]
    run_in_process(train_grpo.main, model_folder, tmp_path / "fused", *flags)
    assert "fused layers" not in capsys.readouterr().out
    monkeypatch.setattr(rollout, "fuse_model", lambda model: None)
    run_in_process(train_grpo.main, model_folder, tmp_path / "own", *flags)
    assert "LlamaDecoderLayer: fused layers do not fit it" in capsys.readouterr().out


def test_the_gap_is_checked_in_the_first_step_that_trained():
    said = []
    training = SimpleNamespace(
        gap_checked=False,
        worker=SimpleNamespace(lowest_precision=torch.float32),
        report=SimpleNamespace(say=said.append),
    )
    check = partial(train_grpo.Training.check_gap, training)
    check({"step": 1, "entropy": None, "gap_mean": 0.0})  # all groups have zero variance
    assert not training.gap_checked
    check({"step": 2, "entropy": 0.5, "gap_mean": 1.0})
    assert len(said) == 1
    check({"step": 3, "entropy": 0.5, "gap_mean": 1.0})
    assert len(said) == 1


@pytest.mark.parametrize(("count", "expected"), [(None, 128), (5, 5), (500, 128)])
def test_no_held_out_problem_is_evaluated_twice(count, expected, monkeypatch):
    monkeypatch.setattr(train_grpo, "evaluation", lambda *args: {})
    asked = []
    training = SimpleNamespace(
        config=train_grpo.Config(device="cpu"),
        task=SimpleNamespace(count=lambda split: count),
        generate=lambda split, problems, *args: asked.extend(problems),
        report=SimpleNamespace(add_evaluation=lambda row: None),
    )
    train_grpo.Training.evaluate(training, 0)
    assert asked == list(range(expected))
