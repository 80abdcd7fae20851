"""--track: what a run sends to TensorBoard is what it writes into metrics.jsonl. And the hook for each row."""

import shutil
from types import SimpleNamespace

import pytest
from conftest import LEARN, caught, finish, launch, rows_of
from test_loop import SMALL, Parity, run_main

import report as journal
import train_grpo
from parts.cli import UserError
from parts.running.metrics_log import open_tracker, scalars
from report import RunReport
from train_grpo import Config

STEP = {
    "step": 3,
    "reward": 0.5,
    "skipped": 0,
    "entropy": None,
    "length": {"mean": 7.5, "max": 9},
    "speculation": {"k": 2.0, "acceptance": [0.5, None]},
}
EVALUATION = {"step": 3, "eval": {"pass@1": 0.25}, "lenient": 0.5, "length": 7.0}


def check_names(scalars):
    assert scalars(STEP) == {"reward": 0.5, "skipped": 0, "length/mean": 7.5, "length/max": 9, "speculation/k": 2.0}
    assert scalars(EVALUATION) == {"eval/pass_at_1": 0.25, "eval/lenient": 0.5, "eval/length": 7.0}


def test_rows_become_named_numbers():
    check_names(scalars)
    caught(check_names, lambda row: scalars({**row, "eval": {}}))  # as if all were evaluations
    caught(check_names, lambda row: scalars({"reward" if name == "eval" else name: v for name, v in row.items()}))


# ---------------------------------------------------------------- the hook


class Fake:
    """A tracker that keeps what it is told."""

    def __init__(self):
        self.told = []
        self.finished = False

    def log(self, values, step):
        self.told.append((step, values))

    def finish(self):
        self.finished = True


def check_rank(writes: bool, out, monkeypatch):
    """Only the worker that writes has a tracker, and tells it each row once."""
    tracker = Fake()
    monkeypatch.setattr(journal, "open_tracker", lambda config, first_step: tracker)
    kept = RunReport(Config(out=str(out), device="cpu"), [], 0, writes)
    kept.keep({"step": 1, "reward": 0.5})
    kept.evaluation({**EVALUATION, "problems": 1, "seconds": 0.0})
    kept.bar.close()
    assert [step for step, _ in tracker.told] == ([1, 3] if writes else [])


def test_rank_0_alone_tracks(tmp_path, monkeypatch):
    check_rank(True, tmp_path, monkeypatch)
    check_rank(False, tmp_path, monkeypatch)
    right = RunReport.keep

    def everywhere(self, row):
        right(self, row)
        (self.tracker or journal.open_tracker(None, 0)).log(row, row["step"])

    monkeypatch.setattr(RunReport, "keep", everywhere)
    caught(check_rank, False, tmp_path, monkeypatch)


def test_a_fork_hears_of_every_row(model_folder, tmp_path, monkeypatch):
    heard = []
    monkeypatch.setattr(RunReport, "on_row", lambda self, row: heard.append(row))
    flags = [*SMALL, "--steps", 2, "--eval-every", 2]
    run_main(monkeypatch, "--model", model_folder, "--out", tmp_path, *flags)
    assert heard == rows_of(tmp_path)
    assert [row["step"] for row in heard] == [0, 1, 2, 2]


# ---------------------------------------------------------------- mistakes


def test_a_missing_package_is_one_line_before_anything_is_touched(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for name in ("tensorboard", "wandb"):
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, "--model", model_folder, "--out", tmp_path / "run", *SMALL, "--track", name)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert line.startswith(f"train_grpo.py: --track {name}: ")
        assert line.endswith(f"`pip install {name}`")
        assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(monkeypatch, capsys):
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, "--track", "paper")
    assert end.value.code == 2
    assert "invalid choice: 'paper'" in capsys.readouterr().err


def test_a_tracker_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    """No login, no network."""

    def refuse(self):
        raise RuntimeError("api key not configured\n(no-tty). call wandb.login()")

    module = SimpleNamespace(WandBTracker=lambda *args, **kwargs: SimpleNamespace(start=lambda: refuse(None)))
    monkeypatch.setattr("accelerate.tracking", module)
    config = Config(out=str(tmp_path), device="cpu", track="wandb")
    with pytest.raises(UserError, match="--track wandb: api key not configured .no-tty."):
        open_tracker(config, 0)


# ---------------------------------------------------------------- TensorBoard


def events(out) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a run: name -> (step, value)s."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def check_events(out, shown):
    """Every number of metrics.jsonl, once."""
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in rows_of(out):
        for name, value in scalars(row).items():
            wanted.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    assert wanted["reward"]
    assert shown == wanted


def test_tensorboard_shows_a_run_and_what_was_made_again_once(model_folder, tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    monkeypatch.setattr(train_grpo, "make_task", lambda *args: Parity())
    flags = ["--model", model_folder, "--out", tmp_path, *SMALL, "--eval-every", 1, "--track", "tensorboard"]
    run_main(monkeypatch, *flags, "--steps", 3)
    check_events(tmp_path, events(tmp_path))
    caught(check_events, tmp_path, {name: values[1:] for name, values in events(tmp_path).items()})
    (path,) = (tmp_path / "tensorboard").glob("*/hparams.yml")
    assert "max_new: 20" in path.read_text()

    shutil.rmtree(tmp_path / "checkpoint-000003")
    run_main(monkeypatch, *flags, "--steps", 4, "--lr", 1e-2, "--resume")  # step 3 once more
    assert [row["step"] for row in rows_of(tmp_path)] == [0, 1, 1, 2, 2, 3, 3, 4, 4]
    check_events(tmp_path, events(tmp_path))

    run_main(monkeypatch, *flags, "--steps", 1)  # a new run: nothing of the earlier one is left
    check_events(tmp_path, events(tmp_path))


def test_a_team_is_tracked_once(able, tmp_path):
    pytest.importorskip("tensorboard")
    flags = (*LEARN, "--workers", 2, "--steps", 1, "--eval-every", 0, "--track", "tensorboard")
    finish(launch(able, tmp_path, *flags))
    check_events(tmp_path, events(tmp_path))
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1
