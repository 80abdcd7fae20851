"""Dynamic sampling: which prompts are asked, which groups are learned from; and runs with it, a schedule and a penalty
for length that stop and go on.
"""

import random
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import caught, rows_of
from safetensors.torch import load_file
from test_grpo import CONFIG
from test_loop import SMALL, run_main

import train_grpo
from parts.running import checkpoints
from parts.training import losses
from parts.training.losses import choose, missing_groups
from tasks import Countdown, Grade
from train_grpo import Worker

# ---------------------------------------------------------------- the choice


def check_choice(choose):
    """Flat groups are in the batch only where nothing else is left; all stay in order, with their own rewards."""
    rng = random.Random(0)
    for _ in range(200):
        wanted = rng.randint(1, 6)
        asked = wanted + rng.randint(0, 4)
        size = rng.randint(2, 5)
        rewards = torch.tensor([[rng.choice([0.0, 0.5, 1.0]) for _ in range(size)] for _ in range(asked)])
        for i in range(asked):
            if rng.random() < 0.4:
                rewards[i] = rewards[i, 0]
        lengths = [rng.randint(1, 30) for _ in range(asked * size)]
        responses = [SimpleNamespace(name=i, tokens=[2] * n) for i, n in enumerate(lengths)]
        config = replace(CONFIG, prompts=wanted, overlong_penalty=10)
        batch, shaped = choose(responses, rewards, config)

        teaching = [i for i in range(asked) if len(set(rewards[i].tolist())) > 1]
        flat = [i for i in range(asked) if i not in teaching]
        chosen = teaching[:wanted]
        chosen = sorted(chosen + flat[: wanted - len(chosen)])
        names = [i * size + k for i in chosen for k in range(size)]
        assert [r.name for r in batch] == names
        penalties = [min(0.0, (20 - lengths[i]) / 10) for i in names]
        assert torch.allclose(shaped, rewards[chosen] + torch.tensor(penalties).view(wanted, size))
        assert missing_groups(rewards, wanted) == max(0, wanted - len(teaching))


def test_groups_that_teach_come_first(monkeypatch):
    check_choice(choose)

    def the_first(responses, rewards, config):
        return choose(responses[: config.prompts * rewards.shape[1]], rewards[: config.prompts], config)

    caught(check_choice, the_first)

    def penalised_first(responses, rewards, config):  # then groups of unequal lengths seem to teach
        lengths = torch.tensor([len(r.tokens) for r in responses]).view(rewards.shape)
        shaped = rewards + losses.overlong_penalty(lengths, config.max_new, config.overlong_penalty)
        return choose(responses, shaped, replace(config, overlong_penalty=0))

    caught(check_choice, penalised_first)


# ---------------------------------------------------------------- runs


class Patchy(Countdown):
    """Every third problem has a flat group; the others are graded by the parity of the text's length."""

    def problem(self, split, index):
        return replace(super().problem(split, index), answer=index)

    def grade(self, problem, text):
        return Grade(problem.answer % 3 > 0 and len(text) % 2 == 0, True)


@pytest.fixture
def patchy(monkeypatch):
    monkeypatch.setattr(train_grpo, "make_task", lambda *args: Patchy())


DYNAMIC = [*SMALL, "--dynamic-sampling", 4, "--overlong-penalty", 6]


def watched_run(model_folder, out, monkeypatch, *flags) -> tuple[list[list[list[int]]], list[list]]:
    """A run -> for each step the prompts of its rollouts, and the responses of its batch."""
    rounds: list[list[list[int]]] = []
    batches: list[list] = []
    right_rollout = Worker.rollout
    right_update = train_grpo.update
    right_step = train_grpo.Training.step

    def rollout(self, engine, groups, *rest, **named):
        rounds[-1].append([group.key[1] for group in groups])
        return right_rollout(self, engine, groups, *rest, **named)

    def update(model, reference, optimizer, responses, *rest):
        batches.append(responses)
        return right_update(model, reference, optimizer, responses, *rest)

    def step(self, number):
        rounds.append([])
        right_step(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "rollout", rollout)
        patch.setattr(train_grpo, "update", update)
        patch.setattr(train_grpo.Training, "step", step)
        run_main(patch, "--model", model_folder, "--out", out, *DYNAMIC, *flags)
    return rounds, batches


def check_dynamic_sampling(model_folder, out, monkeypatch):
    rounds, batches = watched_run(model_folder, out, monkeypatch, "--steps", 3)
    rows = rows_of(out)
    for step, (asked, batch, row) in enumerate(zip(rounds, batches, rows, strict=True)):
        prompts = [i for part in asked for i in part]
        assert prompts == list(range(7 * step, 7 * step + len(prompts)))
        assert len(asked[0]) == 3
        assert row["extra"]["groups"] == len(prompts) - 3
        assert row["extra"]["seconds"] > 0
        teaching = []
        for i in range(0, len(batch), 4):
            group = batch[i : i + 4]
            assert len({r.group for r in group}) == 1
            teaching.append(len({r.grade.strict for r in group}) > 1)
        assert len(teaching) == 3
        assert all(teaching) or len(prompts) == 7
        assert len(prompts) > 3  # of three in a row one is flat
    assert any(len(asked) > 2 for asked in rounds)  # more than one round of further prompts


def test_flat_groups_are_replaced_until_the_batch_is_full(patchy, model_folder, tmp_path, monkeypatch, capsys):
    check_dynamic_sampling(model_folder, tmp_path / "good", monkeypatch)
    assert "further prompts in the place of flat groups" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # one round only
        patch.setattr(train_grpo, "missing_groups", lambda rewards, wanted: 2 * (len(rewards) == 3))
        caught(check_dynamic_sampling, model_folder, tmp_path / "once", monkeypatch)
    right = train_grpo.Training.ask

    def from_the_step_alone(self, split, indices, samples, *seed):  # without room for further prompts
        return right(self, split, range(indices.start - 4 * seed[0], indices.stop - 4 * seed[0]), samples, *seed)

    monkeypatch.setattr(train_grpo.Training, "ask", from_the_step_alone)
    caught(check_dynamic_sampling, model_folder, tmp_path / "overlap", monkeypatch)


def figures(out) -> list[dict]:
    """Of a run, without times."""
    rows = []
    for row in rows_of(out):
        row["extra"].pop("seconds")
        rows.append({name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second")})
    return rows


CHANGING = [*DYNAMIC, "--steps", 3, "--schedule", "cosine", "--weight-decay", 0.1, "--epochs", 2, "--lr", 1e-2]


def check_resumed(whole, model_folder, parts, monkeypatch):
    """A run of three steps that was left alone, and one that was stopped after the second."""
    shutil.copytree(whole, parts)
    for name in ("checkpoint-000003", "policy"):
        shutil.rmtree(parts / name)
    assert checkpoints.newest(parts).name == "checkpoint-000002"
    run_main(monkeypatch, "--model", model_folder, "--out", parts, *CHANGING, "--resume")
    assert figures(whole) == figures(parts)
    wanted = load_file(whole / "policy/model.safetensors")
    got = load_file(parts / "policy/model.safetensors")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_run_with_a_schedule_and_further_prompts_resumes_exactly(patchy, model_folder, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    run_main(monkeypatch, "--model", model_folder, "--out", whole, *CHANGING)
    check_resumed(whole, model_folder, tmp_path / "good", monkeypatch)
    right_init = train_grpo.Training.__init__
    updates = []

    def begin(self, *args):
        updates.clear()
        right_init(self, *args)

    def of_this_process(optimizer, done, config):
        updates.append(done)
        losses.set_lr(optimizer, len(updates), config)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo.Training, "__init__", begin)
        patch.setattr(train_grpo, "set_lr", of_this_process)
        caught(check_resumed, whole, model_folder, tmp_path / "rate", monkeypatch)
    right_ask = train_grpo.Training.ask

    def where_the_last_ended(self, split, indices, samples, *seed):
        self.next = getattr(self, "next", 0)
        ours = range(self.next, self.next + len(indices))
        self.next += len(indices)
        return right_ask(self, split, ours, samples, *seed)

    monkeypatch.setattr(train_grpo.Training, "ask", where_the_last_ended)
    caught(check_resumed, whole, model_folder, tmp_path / "prompts", monkeypatch)


def test_a_resumed_run_takes_the_new_weight_decay(patchy, model_folder, tmp_path, monkeypatch):
    """Not the one in the checkpoint's optimizer."""
    seen = []
    right = losses.set_lr

    def watched(optimizer, done, config):
        right(optimizer, done, config)
        seen.append(optimizer.param_groups[0]["weight_decay"])

    monkeypatch.setattr(train_grpo, "set_lr", watched)
    flags = ["--model", model_folder, "--out", tmp_path, *DYNAMIC]
    run_main(monkeypatch, *flags, "--steps", 1, "--weight-decay", 0.1)
    run_main(monkeypatch, *flags, "--steps", 2, "--weight-decay", 0.2, "--resume")
    assert seen == [0.1, 0.2]
