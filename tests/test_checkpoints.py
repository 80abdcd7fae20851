"""A run's folder: checkpoints are complete or absent, a run resumes exactly, and no mistake destroys a run."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cases, caught, rows_of, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_loop import SMALL, Parity, run_main

import train_grpo
from base.pretrain import make_tokenizer
from parts.cli import UserError
from parts.running import checkpoints
from parts.running.checkpoints import claim, newest, save_folder


@pytest.fixture
def parity(monkeypatch):
    """The task is Parity: rewards must vary for the weights to change."""
    monkeypatch.setattr(train_grpo, "make_task", lambda *settings: Parity())


@pytest.fixture(scope="module")
def finished(model_folder, tmp_path_factory):
    """The folder of a finished run."""
    out = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        run_main(patch, "--model", model_folder, "--out", out, *SMALL, "--steps", 1)
    return out


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def snapshot(folder: Path) -> dict[str, bytes]:
    """Return the content of all files but the lock."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def refused(monkeypatch, *argv) -> None:
    """Assert that the command ends with status 2."""
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *argv)
    assert end.value.code == 2


def checkpoint(folder: Path, step: int, content: str = "good") -> Path:
    """Write a checkpoint with a file, and one in a subfolder -> its folder."""

    def fill(part):
        (part / "x").write_text(content)
        (part / "deep").mkdir()
        (part / "deep/y").write_text(content)
        state = {"format": checkpoints.FORMAT, "step": step, "config": {}, "metrics": []}
        (part / "state.json").write_text(json.dumps(state))
        sums = {name: checkpoints.checksum(part / name) for name in ("x", "deep/y", "state.json")}
        (part / "checksums.json").write_text(json.dumps(sums))

    save_folder(folder / f"checkpoint-{step:06d}", fill)
    return folder / f"checkpoint-{step:06d}"


# ---------------------------------------------------------------- complete or absent


def test_a_failed_write_leaves_the_last_checkpoint(tmp_path):
    checkpoint(tmp_path, 1)

    def fill(part):
        (part / "x").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(UserError, match="killed"):
        save_folder(tmp_path / "checkpoint-000002", fill)
    assert newest(tmp_path).name == "checkpoint-000001"


def test_a_full_disk_is_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
    checkpoint(tmp_path, 1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_policy", full)
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(UserError, match="disk is full.*checkpoint-000001"):
        checkpoints.save(tmp_path, 2, model, optimizer, make_tokenizer(), [])
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-000001"]


HARMS = {
    "other content": lambda f: (f / "x").write_text("goof"),
    "cut": lambda f: (f / "x").write_text("go"),
    "a file is gone": lambda f: (f / "x").unlink(),
    "half a state": lambda f: (f / "state.json").write_text('{"form'),
    "no state": lambda f: (f / "state.json").unlink(),
    "another format": lambda f: (f / "state.json").write_text('{"format": 0}'),
    "a list": lambda f: (f / "state.json").write_text("[]"),
    "an unknown file": lambda f: (f / "y").write_text("what is this?"),
    "other content in a subfolder": lambda f: (f / "deep/y").write_text("goof"),
    "a file is gone in a subfolder": lambda f: (f / "deep/y").unlink(),
    "an unknown file in a subfolder": lambda f: (f / "deep/z").write_text("what is this?"),
    "no checksums": lambda f: (f / "checksums.json").unlink(),
    "deeply nested checksums": lambda f: (f / "checksums.json").write_text("[" * 100_000),
    "checksums in a list": lambda f: (f / "checksums.json").write_text("[]"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_reported_and_the_one_before_is_used(harm, tmp_path):
    checkpoint(tmp_path, 1)
    HARMS[harm](checkpoint(tmp_path, 2))
    messages = []
    assert newest(tmp_path, messages.append).name == "checkpoint-000001"
    assert len(messages) == 1
    assert "checkpoint-000002 is damaged" in messages[0]


@cases(40)
@given(
    st.sampled_from(["x", "deep/y", "state.json", "checksums.json"]),
    st.integers(0, 10**6),
    st.integers(0, 255) | st.none(),
)
def test_a_byte_that_changes_anywhere_is_detected(name, where, byte):
    """byte: the new value of one byte; None: the file ends there."""
    with tempfile.TemporaryDirectory() as folder:
        whole = checkpoint(Path(folder), 1)
        file = whole / name
        old = file.read_bytes()
        where %= len(old)
        new = old[:where] if byte is None else old[:where] + bytes([byte]) + old[where + 1 :]
        file.write_bytes(new)
        assert bool(checkpoints.damage(whole)) == (new != old)


# ---------------------------------------------------------------- exact resume


def steady(row: dict) -> dict:
    """Return a row of metrics without times."""
    return {name: value for name, value in row.items() if "seconds" not in name and name != "tokens_per_second"}


def check_resume(folder, model_folder, monkeypatch):
    """A resumed run equals an uninterrupted one, also with a KL penalty, whose reference is the policy that the run
    started from.
    """
    flags = ["--model", model_folder, *SMALL, "--eval-every", 2, "--save-every", 2, "--kl", 0.1]
    run_main(monkeypatch, *flags, "--out", folder / "whole", "--steps", 4)
    run_main(monkeypatch, *flags, "--out", folder / "parts", "--steps", 2)
    with open(folder / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n')  # a step that was done after the last checkpoint, and is lost
    run_main(monkeypatch, *flags, "--out", folder / "parts", "--steps", 4, "--resume")
    whole = [steady(row) for row in rows_of(folder / "whole")]
    assert whole == [steady(row) for row in rows_of(folder / "parts")]
    assert [row["step"] for row in whole] == [0, 1, 2, 2, 3, 4, 4]
    assert same(weights(folder / "whole/policy"), weights(folder / "parts/policy"))


def test_a_resumed_run_equals_an_uninterrupted_one(parity, model_folder, tmp_path, monkeypatch):
    check_resume(tmp_path, model_folder, monkeypatch)
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    pictures = {"curves.png", "timeline.png"}
    files = {".lock", ".launch", "config.json", "metrics.jsonl", "trace.json"}
    assert names == {"policy", "checkpoint-000002", "checkpoint-000004"} | pictures | files
    monkeypatch.setattr(checkpoints, "set_optimizer_state_dict", lambda *args, **settings: None)
    caught(check_resume, tmp_path / "broken", model_folder, monkeypatch)  # the optimizer's moments are lost


def test_a_resumed_run_skips_a_damaged_checkpoint(parity, model_folder, tmp_path, monkeypatch, capsys):
    flags = ["--model", model_folder, "--out", tmp_path, *SMALL, "--steps", 2]
    run_main(monkeypatch, *flags)
    whole = weights(tmp_path / "policy")
    with open(tmp_path / "checkpoint-000002/model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"rot")
    run_main(monkeypatch, *flags, "--resume")  # step 2 is made again
    assert "checkpoint-000002 is damaged (model.safetensors)" in capsys.readouterr().out
    assert same(whole, weights(tmp_path / "policy"))
    for step in (1, 2):
        (tmp_path / f"checkpoint-{step:06d}/optimizer.pt").unlink()
    before = snapshot(tmp_path)
    refused(monkeypatch, *flags, "--resume")  # no checkpoint is intact
    assert "no checkpoint in" in capsys.readouterr().err
    assert snapshot(tmp_path) == before


def of_another_run(path: Path) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), "lr": 0.5, "seed": 9}))


@pytest.mark.parametrize("harm", [None, Path.unlink, of_another_run], ids=["as it was", "gone", "of another run"])
def test_changed_settings_of_a_resumed_run_are_printed(harm, finished, model_folder, tmp_path, monkeypatch, capsys):
    """They are compared with those in the checkpoint, whatever config.json says."""
    out = shutil.copytree(finished, tmp_path / "run")
    if harm:
        harm(out / "config.json")
    run_main(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--steps", 2, "--resume", "--lr", 0.5)
    assert "continues with other settings than before: lr 0.0001 -> 0.5\n" in capsys.readouterr().out
    assert json.loads((out / "config.json").read_text())["lr"] == 0.5


def test_a_run_that_torchrun_restarts_resumes_by_itself(parity, model_folder, tmp_path, monkeypatch, capsys):
    flags = ["--model", model_folder, "--out", tmp_path, *SMALL]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_main(monkeypatch, *flags, "--steps", 1)  # killed before the first checkpoint: nothing to resume
    first = rows_of(tmp_path)[0]
    run_main(monkeypatch, *flags, "--steps", 2)
    assert rows_of(tmp_path)[0] == first  # seconds included: it was not made again
    assert "other settings" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run_main(monkeypatch, *flags, "--steps", 1)
    assert rows_of(tmp_path)[0] != first
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"]


def check_a_restart_before_anything_was_written(finished, model_folder, out, monkeypatch, has_begun):
    """torchrun's first attempt dies before `prepare`, in a folder with checkpoints of an earlier run: the second
    attempt starts from the beginning, too.
    """
    shutil.copytree(finished, out)
    (out / ".launch").write_text("none 1 another-host")
    monkeypatch.setattr(checkpoints, "has_begun", has_begun)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_main(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--steps", 1)
    steps = [row for row in rows_of(out) if "step" in row]
    assert steps[0] not in rows_of(finished)  # its seconds are others: it was made again


def test_a_restart_does_not_continue_an_earlier_run(finished, model_folder, tmp_path, monkeypatch):
    check = check_a_restart_before_anything_was_written
    check(finished, model_folder, tmp_path / "right", monkeypatch, checkpoints.has_begun)
    caught(check, finished, model_folder, tmp_path / "broken", monkeypatch, lambda out: True)


# ---------------------------------------------------------------- nothing is destroyed

MISTAKES = {
    "an unknown task": ["--task", "typo"],
    "no such model": ["--model", "nowhere"],
    "too long": ["--max-new", 5000],
    "no chat template": ["--prompt-style", "chat"],
}


def check_refused_command_changes_nothing(mistake, finished, model_folder, out, monkeypatch):
    shutil.copytree(finished, out)
    before = snapshot(out)
    assert "checkpoint-000001/model.safetensors" in before
    try:
        run_main(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--steps", 1, *mistake)
    except SystemExit as end:
        assert end.code == 2
    assert snapshot(out) == before


@pytest.mark.parametrize("mistake", MISTAKES.values(), ids=MISTAKES)
def test_a_refused_command_destroys_nothing(mistake, finished, model_folder, tmp_path, monkeypatch):
    check_refused_command_changes_nothing(mistake, finished, model_folder, tmp_path / "good", monkeypatch)
    assert (tmp_path / "good/.lock").read_bytes() == (finished / ".lock").read_bytes()

    def noticed_too_late(self, step):
        raise UserError("noticed too late")

    def changing_the_folder_first(config):
        checkpoints.prepare(Path(config.out), config, None)

    monkeypatch.setattr(train_grpo, "check", changing_the_folder_first)
    monkeypatch.setattr(train_grpo.Training, "step", noticed_too_late)  # 5000 tokens would take long
    caught(check_refused_command_changes_nothing, mistake, finished, model_folder, tmp_path / "broken", monkeypatch)


def check_earlier_run(finished, model_folder, out, monkeypatch, capsys):
    """A run is stopped in its first step: --resume must not continue the run that was here before."""
    shutil.copytree(finished, out)
    flags = ["--model", model_folder, "--out", out, *SMALL]

    def stopped(self, step):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo.Training, "step", stopped)
        with pytest.raises(SystemExit) as end:
            run_main(patch, *flags, "--steps", 2, "--seed", 7)
    assert end.value.code == 130
    assert not list(out.glob("checkpoint-*"))
    aside = out / "earlier-run"
    assert snapshot(aside) == {name: content for name, content in snapshot(finished).items() if "checkpoint-" in name}
    before = snapshot(out)
    refused(monkeypatch, *flags, "--steps", 5, "--resume")
    assert str(aside) in capsys.readouterr().err.splitlines()[-1]
    assert snapshot(out) == before


def test_a_stopped_run_does_not_continue_the_one_before(finished, model_folder, tmp_path, monkeypatch, capsys):
    check_earlier_run(finished, model_folder, tmp_path / "good", monkeypatch, capsys)
    monkeypatch.setattr(checkpoints, "prepare", lambda out, config, start: None)  # they stay where they are
    caught(check_earlier_run, finished, model_folder, tmp_path / "broken", monkeypatch, capsys)


def check_first_new_checkpoint(finished, model_folder, out, monkeypatch):
    """The earlier run is still there when the files of the first new checkpoint are written, but not yet in place."""
    shutil.copytree(finished, out)
    aside = out / "earlier-run"
    flags = ["--model", model_folder, "--out", out, *SMALL, "--steps", 2, "--seed", 7]
    still_there = []
    right = checkpoints.save_folder

    def recording(folder, fill):
        def filled(part):
            fill(part)
            still_there.append((folder.name, aside.exists()))

        right(folder, filled)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "save_folder", recording)
        run_main(patch, *flags)
    trial, *written = still_there
    assert trial == ("trial", True)  # of `try_to_save`
    assert written == [("checkpoint-000001", True), ("checkpoint-000002", False), ("policy", False)]
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-000001", "checkpoint-000002"]


def test_earlier_checkpoints_stay_until_the_first_new_one_is_complete(finished, model_folder, tmp_path, monkeypatch):
    check_first_new_checkpoint(finished, model_folder, tmp_path / "good", monkeypatch)
    right = checkpoints.save

    def too_early(out, *rest):
        shutil.rmtree(out / "earlier-run", ignore_errors=True)
        right(out, *rest)

    monkeypatch.setattr(checkpoints, "save", too_early)
    caught(check_first_new_checkpoint, finished, model_folder, tmp_path / "broken", monkeypatch)


def test_a_disk_that_is_full_at_the_first_checkpoint_keeps_the_earlier_run(
    finished, model_folder, tmp_path, monkeypatch
):
    out = shutil.copytree(finished, tmp_path / "run")

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, "save_policy", full)
    refused(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--steps", 1, "--seed", 7)
    assert newest(out) is None
    assert snapshot(out / "earlier-run/checkpoint-000001") == snapshot(finished / "checkpoint-000001")


# ---------------------------------------------------------------- one run in a folder

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from parts.running.checkpoints import claim
with claim(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_cannot_use_one_folder(finished, model_folder, tmp_path, monkeypatch, capsys):
    """After kill -9 of the process that held the folder, it is free."""
    out = shutil.copytree(finished, tmp_path / "run")
    before = snapshot(out)
    flags = ["--model", model_folder, "--out", out, *SMALL, "--steps", 1]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(ROOT), str(out)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        refused(monkeypatch, *flags)
        refused(monkeypatch, *flags, "--resume")
        for line in capsys.readouterr().err.strip().splitlines():
            assert f"--out {out}: in use by process {holder.pid} on " in line
        assert snapshot(out) == before
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
        holder.stdout.close()
    run_main(monkeypatch, *flags)


def check_claim(out, hold):
    """A folder is held once, and is free again afterwards."""
    with hold(out), pytest.raises(UserError, match=f"in use by process {os.getpid()} on "), hold(out):
        raise AssertionError("it is held twice")
    with hold(out):
        pass


def test_a_folder_is_held_by_one_process_and_is_free_afterwards(tmp_path):
    check_claim(tmp_path, claim)
    caught(check_claim, tmp_path, lambda out: contextlib.nullcontext())


# ---------------------------------------------------------------- old files, other errors


def test_a_new_checkpoint_is_never_the_one_that_is_removed(tmp_path, monkeypatch):
    """That could happen after a restart that has found only damaged checkpoints with larger numbers."""
    for step in (9, 10):
        (checkpoint(tmp_path, step) / "x").write_text("rot")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    config = train_grpo.Config(out=str(tmp_path), device="cpu")
    start = checkpoints.start_from(config, print)
    assert start is None
    checkpoints.prepare(tmp_path, config, start)
    model = tiny()
    optimizer = torch.optim.AdamW(model.parameters())
    for step in (1, 2, 3):
        checkpoints.save(tmp_path, step, model, optimizer, make_tokenizer(), [], config)
        assert newest(tmp_path).name == f"checkpoint-{step:06d}"
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-000002", "checkpoint-000003"]


def test_a_file_system_without_locks_is_one_line(tmp_path, monkeypatch):
    def no_locks(*args):
        raise OSError(37, "No locks available")

    monkeypatch.setattr(checkpoints.fcntl, "flock", no_locks)
    with pytest.raises(UserError, match="No locks available"), claim(tmp_path):
        pass


def test_weights_that_cannot_be_read_end_a_run_before_anything_is_moved(model_folder, tmp_path, monkeypatch):
    flags = ["--model", model_folder, "--out", tmp_path / "run", *SMALL, "--steps", 1]
    run_main(monkeypatch, *flags)
    before = snapshot(tmp_path / "run")
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *flags, "--model", broken)
    after = snapshot(tmp_path / "run")
    assert {name: after[name] for name in before} == before


def test_a_disk_that_is_full_at_the_end_is_one_line(model_folder, tmp_path, monkeypatch, capsys):
    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(train_grpo, "model_card", full)
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, "--model", model_folder, "--out", tmp_path, *SMALL, "--steps", 1)
    assert end.value.code == 2
    assert "disk is full" in capsys.readouterr().err
    assert not (tmp_path / "policy.part").exists()
    assert newest(tmp_path).name == "checkpoint-000001"


@pytest.mark.parametrize("inside", ["checkpoint-000030", "checkpoint-000030/drafter", "policy", "earlier-run/x"])
def test_a_run_cannot_start_from_what_it_replaces(inside, tmp_path):
    """A new run moves the checkpoints in --out aside, and its first own one removes them."""
    with pytest.raises(UserError, match=f"--drafter-from .*{inside}: lies in --out"):
        checkpoints.check_not_replaced(tmp_path / "run", "drafter_from", str(tmp_path / "run" / inside))
    for other in ("", str(tmp_path / "run"), str(tmp_path / "run/mine"), str(tmp_path / "other" / inside), "base"):
        checkpoints.check_not_replaced(tmp_path / "run", "drafter_from", other)


def test_training_from_its_own_checkpoint_is_refused_before_anything_moves(model_folder, tmp_path):
    checkpoint = shutil.copytree(model_folder, tmp_path / "run" / "checkpoint-000030")
    config = train_grpo.Config(model=str(checkpoint), out=str(tmp_path / "run"), device="cpu", max_new=8)
    with pytest.raises(UserError, match="--model .*checkpoint-000030: lies in --out"):
        train_grpo.check(config)
    assert checkpoint.exists()
