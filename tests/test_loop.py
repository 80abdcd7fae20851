"""Around GRPO's sums: memory that runs out, gradients too large or not finite, what the loop asks of a rollout."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import caught, rows_of, tiny
from safetensors.torch import load_file
from test_grpo import CONFIG, Frozen, advantage_of, close, gradient, make_responses, norm_of

import train_grpo
from parts.cli import UserError, run
from parts.engine import model_loading as loading
from parts.training.micro_batches import retry_with_less_memory
from tasks import Countdown, Grade
from train_grpo import Worker, policy_loss, token_scores, update

# ---------------------------------------------------------------- memory


def on_a_small_machine(limit: int, tried: list[int]):
    """A token_scores for which whatever exceeds `limit` tokens does not fit; `tried` gets the sizes."""

    def small(model, responses, *rest):
        tried.append(len(responses) * max(len(r.prompt) + len(r.tokens) for r in responses))
        if tried[-1] > limit:
            raise torch.OutOfMemoryError("no room")
        return token_scores(model, responses, *rest)

    return small


def check_out_of_memory(limit, monkeypatch):
    """The gradient is that of a machine with room."""
    model = tiny()
    responses = make_responses(model)
    wanted, stats = gradient(model, responses)
    tried = []
    monkeypatch.setattr(train_grpo, "token_scores", on_a_small_machine(limit, tried))
    again, stats_again = gradient(model, responses)
    assert close(wanted, again)
    assert abs(stats["gap_max"] - stats_again["gap_max"]) < 1e-6
    assert max(tried) > limit
    monkeypatch.undo()


def test_what_does_not_fit_memory_is_cut_finer_and_done_again(monkeypatch, capsys):
    check_out_of_memory(100, monkeypatch)
    assert "--micro-tokens 100" in capsys.readouterr().out
    with pytest.raises(UserError, match="single response"):
        check_out_of_memory(5, monkeypatch)
    monkeypatch.undo()
    monkeypatch.setattr(torch.nn.Module, "zero_grad", lambda self: None)  # nothing that was summed up goes
    caught(check_out_of_memory, 100, monkeypatch)


def check_late_out_of_memory(monkeypatch):
    """The third micro-batch does not fit: two are summed up by then."""
    model = tiny()
    responses = make_responses(model)
    wanted, _ = gradient(model, responses)
    tries = []

    def third_fails(*args):
        tries.append(len(tries))
        if len(tries) == 3:
            raise torch.OutOfMemoryError("no room")
        return token_scores(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "token_scores", third_fails)
        again, _ = gradient(model, responses)
    assert len(tries) > 6
    assert close(wanted, again)


def test_what_a_failed_try_has_summed_up_goes(monkeypatch):
    check_late_out_of_memory(monkeypatch)

    def nothing_cleared(accumulate, share, clear, worker):
        return retry_with_less_memory(accumulate, share, lambda: None, worker)

    monkeypatch.setattr(train_grpo, "retry_with_less_memory", nothing_cleared)
    caught(check_late_out_of_memory, monkeypatch)


def check_next_update_fits(monkeypatch):
    model = tiny()
    responses = make_responses(model)
    worker = Worker(CONFIG)
    largest = []
    for _ in range(2):
        tried = []
        monkeypatch.setattr(train_grpo, "token_scores", on_a_small_machine(100, tried))
        update(model, None, Frozen(model), responses, advantage_of(responses), 0, CONFIG, worker)
        largest.append(max(tried))
    first, second = largest
    assert first > 100
    assert second <= 100


def test_the_next_update_begins_with_what_fits(monkeypatch):
    check_next_update_fits(monkeypatch)

    def forgets(accumulate, share, clear, worker):
        worker.micro_tokens = CONFIG.micro_tokens
        return retry_with_less_memory(accumulate, share, clear, worker)

    monkeypatch.setattr(train_grpo, "retry_with_less_memory", forgets)
    caught(check_next_update_fits, monkeypatch)


# ---------------------------------------------------------------- the rollout's copy


def check_rotary(cast):
    """The rollout's bfloat16 copy turns by the policy's own angles: rounded to 8 bits they would be others, the further
    on the worse.
    """
    positions = torch.arange(200)[None]
    own, _ = tiny().get_decoder().rotary_emb(torch.zeros(1), positions)
    copied, _ = cast(tiny()).get_decoder().rotary_emb(torch.zeros(1), positions)
    assert torch.equal(own, copied.float())


def test_the_bfloat16_copy_keeps_its_rotary_angles():
    check_rotary(lambda model: loading.cast_weights(model, torch.bfloat16))
    assert {p.dtype for p in loading.cast_weights(tiny(), torch.bfloat16).parameters()} == {torch.bfloat16}
    caught(check_rotary, lambda model: model.bfloat16())


# ---------------------------------------------------------------- runs

SMALL = (
    "--prompts 3 --samples 4 --max-new 20 --eval-problems 4 --eval-samples 2 --eval-every 0 --save-every 1 --device cpu"
).split()


class Parity(Countdown):
    """Rewards that vary even for a random policy: the parity of the text's length."""

    def grade(self, problem, text):
        return Grade(len(text) % 2 == 0, True)


@pytest.fixture
def parity(monkeypatch):
    monkeypatch.setattr(train_grpo, "make_task", lambda *settings: Parity())


def run_main(monkeypatch, *argv):
    monkeypatch.setattr("sys.argv", ["train_grpo.py", *map(str, argv)])
    run(train_grpo.main)


# ---------------------------------------------------------------- gradients that are too large or not finite


def test_the_gradient_is_cut_to_the_largest_norm():
    model = tiny()
    config = replace(CONFIG, grad_clip=0.01)
    responses = make_responses(model)
    whole, _ = gradient(model, responses, config)
    optimizer = Frozen(model)
    stats = update(model, None, optimizer, responses, advantage_of(responses), 0, config, Worker(config))
    assert stats["grad_norm"] == pytest.approx(norm_of(whole))
    assert norm_of(whole) > 0.1
    assert optimizer.norms == [pytest.approx(0.01, rel=1e-3)]


def poisoned_run(model_folder, out, bad_steps, steps, monkeypatch):
    """A run whose loss is nan in some steps (from 1) -> its exit status; None: it went on to the end."""
    calls = []

    def poisoned(*args):
        calls.append(len(calls) + 1)
        return policy_loss(*args) * (float("nan") if calls[-1] in bad_steps else 1.0)

    monkeypatch.setattr(train_grpo, "policy_loss", poisoned)
    try:
        run_main(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--steps", steps)
    except SystemExit as end:
        return end.code
    return None


def check_poison(model_folder, out, monkeypatch):
    """The policy stays that of step 1, and the run stops."""
    assert poisoned_run(model_folder, out, (2, 3, 4), 9, monkeypatch) == 2
    assert [row["skipped"] for row in rows_of(out)] == [0, 1, 1, 1]
    weights = load_file(out / "checkpoint-000003/model.safetensors")
    assert all(w.isfinite().all() for w in weights.values())


def test_a_gradient_that_is_not_finite_is_skipped_and_three_stop_the_run(
    parity, model_folder, tmp_path, monkeypatch, capsys
):
    check_poison(model_folder, tmp_path / "good", monkeypatch)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "three steps in a row" in error
    assert "checkpoint-000003" in error
    always = SimpleNamespace(**{**vars(math), "isfinite": lambda x: True})
    monkeypatch.setattr(train_grpo, "math", always)
    caught(check_poison, model_folder, tmp_path / "broken", monkeypatch)


def check_poison_with_a_pause(model_folder, out, monkeypatch):
    """Three steps, but not in a row."""
    assert poisoned_run(model_folder, out, (1, 2, 4), 4, monkeypatch) is None
    assert [row["skipped"] for row in rows_of(out)] == [1, 1, 0, 1]


def test_a_finite_gradient_between_them_lets_the_run_go_on(parity, model_folder, tmp_path, monkeypatch):
    check_poison_with_a_pause(model_folder, tmp_path / "good", monkeypatch)

    def never_forgets(self, row):
        self.bad_steps += row["skipped"]
        if self.bad_steps == 3:
            raise UserError("three bad steps")

    monkeypatch.setattr(train_grpo.Training, "watch", never_forgets)
    caught(check_poison_with_a_pause, model_folder, tmp_path / "broken", monkeypatch)


# ---------------------------------------------------------------- what a rollout is asked


def check_problems(model_folder, out, monkeypatch):
    """One of each split in the check, then three new ones in each of two steps."""
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


def test_held_out_rollouts_teach_nothing_and_are_the_same_each_time(parity, model_folder, tmp_path, monkeypatch):
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
