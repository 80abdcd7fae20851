"""metrics.jsonl and --track: a tracker gets the same numbers as the file, each row once, from one worker."""

import json
import shutil
from types import SimpleNamespace

import pytest
from conftest import LEARN, caught, finish, launch, rows_of
from test_loop import SMALL, Parity, run_main

import train_grpo
from parts.cli import UserError
from parts.running import metrics_log
from parts.running.metrics_log import MetricsLog, open_tracker, scalars
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
    caught(check_names, lambda row: scalars({**row, "eval": {}}))  # as if all rows were evaluations
    caught(check_names, lambda row: scalars({"reward" if name == "eval" else name: v for name, v in row.items()}))


# ---------------------------------------------------------------- which rows, from which worker


class FakeTracker:
    """A tracker that keeps what it gets."""

    def __init__(self):
        self.logged = []

    def log(self, values, step):
        self.logged.append((step, values))


def check_rank(writes: bool, out, monkeypatch):
    """Only the worker that writes has a tracker, which gets each row once."""
    tracker = FakeTracker()
    monkeypatch.setattr(metrics_log, "open_tracker", lambda config, first_step: tracker)
    report = RunReport(Config(out=str(out), device="cpu"), [], 0, writes)
    report.add_row({"step": 1, "reward": 0.5})
    report.add_evaluation({**EVALUATION, "problems": 1, "seconds": 0.0})
    report.bar.close()
    assert [step for step, _ in tracker.logged] == ([1, 3] if writes else [])


def test_only_rank_0_has_a_tracker(tmp_path, monkeypatch):
    check_rank(True, tmp_path, monkeypatch)
    check_rank(False, tmp_path, monkeypatch)
    right = RunReport.add_row

    def on_every_worker(self, row):
        right(self, row)
        tracker = self.log.tracker if self.log else metrics_log.open_tracker(None, 0)
        tracker.log(row, row["step"])

    monkeypatch.setattr(RunReport, "add_row", on_every_worker)
    caught(check_rank, False, tmp_path, monkeypatch)


def test_every_row_is_written_by_one_function(model_folder, tmp_path, monkeypatch):
    """So that a row can be sent elsewhere by a change in one place."""
    written = []
    right = MetricsLog.write

    def write(self, row):
        written.append(row)
        right(self, row)

    monkeypatch.setattr(MetricsLog, "write", write)
    flags = [*SMALL, "--steps", 2, "--eval-every", 2]
    run_main(monkeypatch, "--model", model_folder, "--out", tmp_path, *flags)
    assert written == rows_of(tmp_path)
    assert [row["step"] for row in written] == [0, 1, 2, 2]


def check_valid_json(out):
    """Numbers that are not finite become null, since JSON has no NaN."""

    def no_json(name):
        raise AssertionError(name)

    log = MetricsLog(Config(out=str(out), device="cpu"), [], 0)
    log.write({"step": 1, "loss": float("nan"), "seconds": {"step": float("inf")}, "acceptance": [0.5, float("nan")]})
    log.close()
    row = json.loads((out / "metrics.jsonl").read_text(), parse_constant=no_json)
    assert row == {"step": 1, "loss": None, "seconds": {"step": None}, "acceptance": [0.5, None]}


def test_metrics_are_valid_json(tmp_path, monkeypatch):
    check_valid_json(tmp_path)
    monkeypatch.setattr(metrics_log, "to_json", json.dumps)
    caught(check_valid_json, tmp_path)


# ---------------------------------------------------------------- mistakes


def test_a_missing_package_is_one_line_before_anything_is_written(model_folder, tmp_path, monkeypatch, capsys):
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
    """Such as one without a login or a network."""

    def refuse(self):
        raise RuntimeError("api key not configured\n(no-tty). call wandb.login()")

    module = SimpleNamespace(WandBTracker=lambda *args, **kwargs: SimpleNamespace(start=lambda: refuse(None)))
    monkeypatch.setattr("accelerate.tracking", module)
    config = Config(out=str(tmp_path), device="cpu", track="wandb")
    with pytest.raises(UserError, match="--track wandb: api key not configured .no-tty."):
        open_tracker(config, 0)


# ---------------------------------------------------------------- TensorBoard


def events(out) -> dict[str, list[tuple[int, float]]]:
    """Return what TensorBoard shows of a run: name -> (step, value) pairs."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    reader = EventAccumulator(str(out / "tensorboard"))
    reader.Reload()
    return {tag: [(e.step, e.value) for e in reader.Scalars(tag)] for tag in reader.Tags()["scalars"]}


def check_events(out, shown):
    """TensorBoard shows every number of metrics.jsonl, once."""
    wanted: dict[str, list[tuple[int, float]]] = {}
    for row in rows_of(out):
        for name, value in scalars(row).items():
            wanted.setdefault(name, []).append((row["step"], pytest.approx(value, rel=1e-6)))
    assert wanted["reward"]
    assert shown == wanted


def test_tensorboard_shows_every_step_once_also_those_that_were_made_again(model_folder, tmp_path, monkeypatch):
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

    run_main(monkeypatch, *flags, "--steps", 1)  # a new run: the files of the earlier one are removed
    check_events(tmp_path, events(tmp_path))


def test_a_run_of_two_workers_is_tracked_once(chain_policy, tmp_path):
    pytest.importorskip("tensorboard")
    flags = (*LEARN, "--workers", 2, "--steps", 1, "--eval-every", 0, "--track", "tensorboard")
    finish(launch(chain_policy, tmp_path, *flags))
    check_events(tmp_path, events(tmp_path))
    assert len(list((tmp_path / "tensorboard").glob("events*"))) == 1


def test_a_row_that_cannot_be_written_is_one_line(tmp_path):
    """As on a full disk."""
    log = MetricsLog(Config(device="cpu", out=str(tmp_path)), [], 0)
    log.path = tmp_path  # a folder
    with pytest.raises(UserError, match="cannot write"):
        log.write({"step": 1})
