"""A run's folder: whole checkpoints or none, exact resume, and nothing destroyed by a mistake."""

import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from conftest import ROOT, cases, caught, tiny
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from test_grpo import Parity, rows_of, run_main

import train_grpo
from base.pretrain import make_tokenizer
from parts import checkpoints
from parts.checkpoints import claim, newest, save_folder
from parts.common import UserError

SMALL = (
    "--prompts 3 --samples 4 --max-new 20 --eval-problems 4 --eval-samples 2 --eval-every 0 --save-every 1 --device cpu"
).split()


@pytest.fixture
def parity(monkeypatch):
    """Rewards must vary for the weights to move."""
    monkeypatch.setattr(train_grpo, "make_task", lambda name, data: Parity())


def weights(folder: Path) -> dict:
    return load_file(folder / "model.safetensors")


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def checkpoint(folder: Path, step: int, content: str = "good") -> Path:
    """A checkpoint with one file."""

    def fill(part):
        (part / "x").write_text(content)
        state = {"format": checkpoints.FORMAT, "step": step, "config": {}, "metrics": []}
        (part / "state.json").write_text(json.dumps(state))
        sums = {name: checkpoints.checksum(part / name) for name in ("x", "state.json")}
        (part / "checksums.json").write_text(json.dumps(sums))

    save_folder(folder / f"checkpoint-{step:06d}", fill)
    return folder / f"checkpoint-{step:06d}"


# ---------------------------------------------------------------- whole or absent


def test_a_failed_write_leaves_the_last_one(tmp_path):
    checkpoint(tmp_path, 1)

    def fill(part):
        (part / "x").write_text("half")
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        save_folder(tmp_path / "checkpoint-000002", fill)
    assert newest(tmp_path).name == "checkpoint-000001"


def test_a_full_disk_gives_one_line_and_keeps_the_last_checkpoint(tmp_path, monkeypatch):
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
    "a strange file": lambda f: (f / "y").write_text("what is this?"),
    "no checksums": lambda f: (f / "checksums.json").unlink(),
    "endless checksums": lambda f: (f / "checksums.json").write_text("[" * 100_000),
    "checksums of another kind": lambda f: (f / "checksums.json").write_text("[]"),
}


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(harm, tmp_path):
    checkpoint(tmp_path, 1)
    HARMS[harm](checkpoint(tmp_path, 2))
    said = []
    assert newest(tmp_path, said.append).name == "checkpoint-000001"
    assert len(said) == 1
    assert "checkpoint-000002 is damaged" in said[0]


@cases(40)
@given(st.sampled_from(["x", "state.json", "checksums.json"]), st.integers(0, 10**6), st.integers(0, 255) | st.none())
def test_a_byte_that_changes_anywhere_is_noticed(name, where, byte):
    """byte: what one byte becomes; None: the file ends there."""
    with tempfile.TemporaryDirectory() as folder:
        file = checkpoint(Path(folder), 1) / name
        old = file.read_bytes()
        where %= len(old)
        new = old[:where] if byte is None else old[:where] + bytes([byte]) + old[where + 1 :]
        file.write_bytes(new)
        assert bool(checkpoints.damage(file.parent)) == (new != old)


# ---------------------------------------------------------------- exact resume


def steady(row: dict) -> dict:
    """Without what is timing."""
    return {name: value for name, value in row.items() if "seconds" not in name and name != "tokens_per_second"}


def check_resume(folder, model_folder, monkeypatch):
    flags = ["--model", model_folder, *SMALL, "--eval-every", 2, "--save-every", 2]
    run_main(monkeypatch, *flags, "--out", folder / "whole", "--steps", 4)
    run_main(monkeypatch, *flags, "--out", folder / "parts", "--steps", 2)
    with open(folder / "parts/metrics.jsonl", "a") as file:
        file.write('{"step": 3}\n')  # a step that was done after the last checkpoint and then lost
    run_main(monkeypatch, *flags, "--out", folder / "parts", "--steps", 4, "--resume")
    whole = [steady(row) for row in rows_of(folder / "whole")]
    assert whole == [steady(row) for row in rows_of(folder / "parts")]
    assert [row["step"] for row in whole] == [0, 1, 2, 2, 3, 4, 4]
    assert same(weights(folder / "whole/policy"), weights(folder / "parts/policy"))


def test_a_resumed_run_equals_an_uninterrupted_one(parity, model_folder, tmp_path, monkeypatch):
    check_resume(tmp_path, model_folder, monkeypatch)
    names = {path.name for path in (tmp_path / "parts").iterdir()}
    pictures = {"curves.png", "timeline.png"}
    files = {".lock", "config.json", "metrics.jsonl", "trace.json"}
    assert names == {"policy", "checkpoint-000002", "checkpoint-000004"} | pictures | files
    monkeypatch.setattr(checkpoints, "set_optimizer_state_dict", lambda *args, **settings: None)
    caught(check_resume, tmp_path / "broken", model_folder, monkeypatch)  # the optimizer's moments are lost


def test_a_resumed_run_passes_over_a_damaged_checkpoint(parity, model_folder, tmp_path, monkeypatch, capsys):
    flags = ["--model", model_folder, "--out", tmp_path, *SMALL, "--steps", 2]
    run_main(monkeypatch, *flags)
    whole = weights(tmp_path / "policy")
    with open(tmp_path / "checkpoint-000002/model.safetensors", "r+b") as file:
        file.seek(5000)
        file.write(b"rot")
    run_main(monkeypatch, *flags, "--resume")  # makes step 2 again
    assert "checkpoint-000002 is damaged (model.safetensors)" in capsys.readouterr().out
    assert same(whole, weights(tmp_path / "policy"))


def test_other_settings_are_told(parity, model_folder, tmp_path, monkeypatch, capsys):
    """As the checkpoint knows them: config.json may be of another run, or gone."""
    flags = ["--model", model_folder, "--out", tmp_path, *SMALL]
    run_main(monkeypatch, *flags, "--steps", 1)
    (tmp_path / "config.json").unlink()
    run_main(monkeypatch, *flags, "--steps", 2, "--resume", "--lr", 0.5)
    assert "other settings than before: lr 0.0001 -> 0.5" in capsys.readouterr().out


def test_a_restart_by_torchrun_goes_on_by_itself(parity, model_folder, tmp_path, monkeypatch, capsys):
    flags = ["--model", model_folder, "--out", tmp_path, *SMALL]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_main(monkeypatch, *flags, "--steps", 1)  # killed before the first checkpoint: there is nothing to go on from
    first = rows_of(tmp_path)[0]
    run_main(monkeypatch, *flags, "--steps", 2)
    assert rows_of(tmp_path)[0] == first  # with its seconds: it was not made again
    assert "other settings" not in capsys.readouterr().out
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run_main(monkeypatch, *flags, "--steps", 1)
    assert rows_of(tmp_path)[0] != first
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"]


# ---------------------------------------------------------------- nothing is destroyed


def snapshot(folder: Path) -> dict[str, bytes]:
    """All files but the lock."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.name != ".lock":
            files[str(path.relative_to(folder))] = path.read_bytes()
    return files


def check_refused_commands_change_nothing(model_folder, out, monkeypatch):
    before = snapshot(out)
    assert "checkpoint-000001/model.safetensors" in before
    mistakes = (["--task", "typo"], ["--model", "nowhere"], ["--max-new", "5000"], ["--prompt-style", "chat"])
    for flags in mistakes:
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, "--model", model_folder, "--out", out, *SMALL, "--steps", 1, *flags)
        assert end.value.code == 2
        assert snapshot(out) == before


def test_a_refused_command_destroys_nothing(model_folder, tmp_path, monkeypatch):
    run_main(monkeypatch, "--model", model_folder, "--out", tmp_path, *SMALL, "--steps", 1)
    check_refused_commands_change_nothing(model_folder, tmp_path, monkeypatch)
    monkeypatch.setattr(train_grpo, "check", lambda config: None)
    caught(check_refused_commands_change_nothing, model_folder, tmp_path, monkeypatch)


def test_earlier_checkpoints_stay_until_the_first_new_one_is_whole(model_folder, tmp_path, monkeypatch, capsys):
    flags = ["--model", model_folder, "--out", tmp_path, *SMALL]
    run_main(monkeypatch, *flags, "--steps", 3)

    def stopped(self, step):
        raise KeyboardInterrupt

    monkeypatch.setattr(train_grpo.Training, "step", stopped)
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *flags, "--steps", 2, "--seed", 7)
    assert end.value.code == 130
    aside = tmp_path / "earlier-run"
    assert sorted(path.name for path in aside.iterdir()) == ["checkpoint-000002", "checkpoint-000003"]
    assert newest(aside).name == "checkpoint-000003"
    monkeypatch.undo()
    with pytest.raises(SystemExit):
        run_main(monkeypatch, *flags, "--steps", 5, "--resume")  # must not go on from the other run
    assert "earlier-run" in capsys.readouterr().err
    run_main(monkeypatch, *flags, "--steps", 1, "--seed", 7)
    assert not aside.exists()
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-000001"]


# ---------------------------------------------------------------- one run in a folder

HOLDER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from parts.checkpoints import claim
with claim(sys.argv[2]):
    print("held", flush=True)
    time.sleep(600)
"""


def test_two_runs_in_one_folder_do_not_race(model_folder, tmp_path, monkeypatch, capsys):
    """Also after kill -9 of the one that held it the folder is free."""
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE)
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, "--model", model_folder, "--out", tmp_path, *SMALL, "--steps", 1)
        assert end.value.code == 2
        assert f"in use by process {holder.pid} on " in capsys.readouterr().err
        assert not (tmp_path / "config.json").exists()
    finally:
        os.kill(holder.pid, signal.SIGKILL)
        holder.wait()
    run_main(monkeypatch, "--model", model_folder, "--out", tmp_path, *SMALL, "--steps", 1)
    with claim(tmp_path), pytest.raises(UserError, match=f"process {os.getpid()} on"), claim(tmp_path):
        pass
