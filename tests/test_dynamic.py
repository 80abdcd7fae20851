"""Dynamic sampling: which prompts are sampled and which groups are learned from; and runs with it, with a learning rate
schedule and a penalty for overlong responses, that are stopped and resumed.
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
from parts.training.losses import missing_groups, select_groups
from tasks import Countdown, Grade
from train_grpo import Worker

# ---------------------------------------------------------------- the selection


def check_selection(select):
    """Zero-variance groups are in the batch only where no others are left. All groups stay in order, with their own
    rewards.
    """
    rng = random.Random(0)
    for _ in range(200):
        wanted = rng.randint(1, 6)
        sampled = wanted + rng.randint(0, 4)
        size = rng.randint(2, 5)
        rewards = torch.tensor([[rng.choice([0.0, 0.5, 1.0]) for _ in range(size)] for _ in range(sampled)])
        for i in range(sampled):
            if rng.random() < 0.4:
                rewards[i] = rewards[i, 0]
        lengths = [rng.randint(1, 30) for _ in range(sampled * size)]
        responses = [SimpleNamespace(name=i, tokens=[2] * n) for i, n in enumerate(lengths)]
        config = replace(CONFIG, prompts=wanted, overlong_penalty=10)
        batch, shaped = select(responses, rewards, config)

        varied = [i for i in range(sampled) if len(set(rewards[i].tolist())) > 1]
        others = [i for i in range(sampled) if i not in varied]
        chosen = varied[:wanted]
        chosen = sorted(chosen + others[: wanted - len(chosen)])
        names = [i * size + k for i in chosen for k in range(size)]
        assert [r.name for r in batch] == names
        penalties = [min(0.0, (20 - lengths[i]) / 10) for i in names]
        assert torch.allclose(shaped, rewards[chosen] + torch.tensor(penalties).view(wanted, size))
        assert missing_groups(rewards, wanted) == max(0, wanted - len(varied))


def test_groups_with_variance_come_first():
    check_selection(select_groups)

    def the_first(responses, rewards, config):
        return select_groups(responses[: config.prompts * rewards.shape[1]], rewards[: config.prompts], config)

    caught(check_selection, the_first)

    def with_the_penalty_first(responses, rewards, config):  # then responses of unequal lengths give variance
        lengths = torch.tensor([len(r.tokens) for r in responses]).view(rewards.shape)
        shaped = rewards + losses.overlong_penalty(lengths, config.max_new, config.overlong_penalty)
        return select_groups(responses, shaped, replace(config, overlong_penalty=0))

    caught(check_selection, with_the_penalty_first)


# ---------------------------------------------------------------- runs


class ThirdWithoutVariance(Countdown):
    """Every third problem has a zero-variance group; a text of the others is right if its length is even."""

    def problem(self, split, index):
        return replace(super().problem(split, index), answer=index)

    def grade(self, problem, text):
        return Grade(problem.answer % 3 > 0 and len(text) % 2 == 0, True)


@pytest.fixture
def third_without_variance(monkeypatch):
    monkeypatch.setattr(train_grpo, "make_task", lambda *args: ThirdWithoutVariance())


DYNAMIC = [*SMALL, "--dynamic-sampling", 4, "--overlong-penalty", 6]


def recorded_run(model_folder, out, monkeypatch, *flags) -> tuple[list[list[list[int]]], list[list]]:
    """Make a run -> for each step the prompts of its rollouts, and the responses of its batch."""
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
    rounds, batches = recorded_run(model_folder, out, monkeypatch, "--steps", 3)
    rows = rows_of(out)
    for step, (sampled, batch, row) in enumerate(zip(rounds, batches, rows, strict=True)):
        prompts = [i for part in sampled for i in part]
        assert prompts == list(range(7 * step, 7 * step + len(prompts)))
        assert len(sampled[0]) == 3
        assert row["extra"]["groups"] == len(prompts) - 3
        assert row["extra"]["seconds"] > 0
        varied = []
        for i in range(0, len(batch), 4):
            group = batch[i : i + 4]
            assert len({r.group for r in group}) == 1
            varied.append(len({r.grade.strict for r in group}) > 1)
        assert len(varied) == 3
        assert all(varied) or len(prompts) == 7
        assert len(prompts) > 3  # one of three consecutive groups has no variance
    assert any(len(sampled) > 2 for sampled in rounds)  # more than one round of further prompts


def test_zero_variance_groups_are_replaced_until_the_batch_is_full(
    third_without_variance, model_folder, tmp_path, monkeypatch, capsys
):
    check_dynamic_sampling(model_folder, tmp_path / "good", monkeypatch)
    assert "further prompts in the place of" in capsys.readouterr().out
    with monkeypatch.context() as patch:  # one round only
        patch.setattr(train_grpo, "missing_groups", lambda rewards, wanted: 2 * (len(rewards) == 3))
        caught(check_dynamic_sampling, model_folder, tmp_path / "once", monkeypatch)
    right = train_grpo.Training.generate

    def with_overlapping_steps(self, split, indices, samples, *seed):  # no numbers are left for further prompts
        return right(self, split, range(indices.start - 4 * seed[0], indices.stop - 4 * seed[0]), samples, *seed)

    monkeypatch.setattr(train_grpo.Training, "generate", with_overlapping_steps)
    caught(check_dynamic_sampling, model_folder, tmp_path / "overlap", monkeypatch)


def figures(out) -> list[dict]:
    """Return the rows of a run's metrics without times."""
    rows = []
    for row in rows_of(out):
        row["extra"].pop("seconds")
        rows.append({name: value for name, value in row.items() if name not in ("seconds", "tokens_per_second")})
    return rows


WITH_SCHEDULE = [*DYNAMIC, "--steps", 3, "--schedule", "cosine", "--weight-decay", 0.1, "--epochs", 2, "--lr", 1e-2]


def check_resumed(whole, model_folder, parts, monkeypatch):
    """A run of three steps equals one that was stopped after the second and resumed."""
    shutil.copytree(whole, parts)
    for name in ("checkpoint-000003", "policy"):
        shutil.rmtree(parts / name)
    assert checkpoints.newest(parts).name == "checkpoint-000002"
    run_main(monkeypatch, "--model", model_folder, "--out", parts, *WITH_SCHEDULE, "--resume")
    assert figures(whole) == figures(parts)
    wanted = load_file(whole / "policy/model.safetensors")
    got = load_file(parts / "policy/model.safetensors")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_a_run_with_a_schedule_and_dynamic_sampling_resumes_exactly(
    third_without_variance, model_folder, tmp_path, monkeypatch
):
    whole = tmp_path / "whole"
    run_main(monkeypatch, "--model", model_folder, "--out", whole, *WITH_SCHEDULE)
    check_resumed(whole, model_folder, tmp_path / "good", monkeypatch)
    right_init = train_grpo.Training.__init__
    updates = []

    def begin(self, *args):
        updates.clear()
        right_init(self, *args)

    def counting_this_process_only(optimizer, done, config):
        updates.append(done)
        losses.set_lr(optimizer, len(updates), config)

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo.Training, "__init__", begin)
        patch.setattr(train_grpo, "set_lr", counting_this_process_only)
        caught(check_resumed, whole, model_folder, tmp_path / "lr", monkeypatch)
    right_generate = train_grpo.Training.generate

    def with_the_next_problems(self, split, indices, samples, *seed):  # counted from the start of this process
        self.next = getattr(self, "next", 0)
        ours = range(self.next, self.next + len(indices))
        self.next += len(indices)
        return right_generate(self, split, ours, samples, *seed)

    monkeypatch.setattr(train_grpo.Training, "generate", with_the_next_problems)
    caught(check_resumed, whole, model_folder, tmp_path / "prompts", monkeypatch)


def test_a_resumed_run_takes_the_new_weight_decay(third_without_variance, model_folder, tmp_path, monkeypatch):
    """It does not take the one in the checkpoint's optimizer."""
    seen = []
    right = losses.set_lr

    def recording(optimizer, done, config):
        right(optimizer, done, config)
        seen.append(optimizer.param_groups[0]["weight_decay"])

    monkeypatch.setattr(train_grpo, "set_lr", recording)
    flags = ["--model", model_folder, "--out", tmp_path, *DYNAMIC]
    run_main(monkeypatch, *flags, "--steps", 1, "--weight-decay", 0.1)
    run_main(monkeypatch, *flags, "--steps", 2, "--weight-decay", 0.2, "--resume")
    assert seen == [0.1, 0.2]
