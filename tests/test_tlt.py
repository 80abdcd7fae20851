"""The workers, as real processes: every door, equal results, and what is left behind when something dies."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import caught
from safetensors.torch import load_file

import tlt
from tasks import UserError
from tlt import Board, TLTConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device", "cpu", "--prompts", "6", "--samples", "4", "--max-new", "24", "--slots", "8", "--eval-problems", "4", "--eval-samples", "2", "--eval-every", "2",
         "--save-every", "1", "--lr", "1e-3"]


def launch(model_folder, out, *argv, door=("tlt.py",), **environment):
    return subprocess.Popen([sys.executable, *door, "--model", str(model_folder), "--out", str(out), *SMALL, *map(str, argv)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, **environment})


def finish(process, code=0, seconds=120):
    text, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, text
    return text


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").open()]


def left_over(session):
    """Processes still alive in the launched session."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            found.append(stat.parent.name)
    return found


def wait_for(condition, seconds=60):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "waited in vain"
        time.sleep(0.05)


def check_same_run(a, b, tolerance=0.0):
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert all(x.get(key) == y.get(key) for key in ("digest", "reward", "length", "eval"))
        assert x.get("gap_max", 0) < 1e-4  # fp32 rollout and trainer agree
    x, y = (load_file(out / "policy/model.safetensors") for out in (a, b))
    assert all(torch.allclose(x[k], y[k], atol=tolerance, rtol=0) for k in x)


@pytest.fixture(scope="module")
def runs(model_folder, tmp_path_factory):
    """The same small run through every door: 1, 2, 3 workers, torchrun, and train_grpo.py alone. Two at a time: there may be two cores."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tlt.py")
    jobs = {"1": ("--workers", 1), "2": ("--workers", 2), "3": ("--workers", 3), "torchrun": (), "alone": ()}
    doors = {"torchrun": torchrun, "alone": ("train_grpo.py",)}
    for pair in (("1", "alone"), ("2", "3"), ("torchrun",)):
        running = [launch(model_folder, folder / name, "--steps", 2, *jobs[name], door=doors.get(name, ("tlt.py",))) for name in pair]
        for process in running:
            finish(process)
    return folder


@pytest.mark.parametrize("other", ["alone", "2", "3", "torchrun"])
def test_every_door_and_number_of_workers_gives_the_same_run(runs, other):
    check_same_run(runs / "1", runs / other, 0.0 if other == "alone" else 1e-5)


def test_the_policy_moved_and_another_seed_is_seen(runs, model_folder):
    start, end = load_file(model_folder / "model.safetensors"), load_file(runs / "1/policy/model.safetensors")
    rewards = [row.get("reward", 0) for row in metrics(runs / "1")]
    assert max(rewards) == 0 or not torch.equal(start["lm_head.weight"], end["lm_head.weight"])
    finish(launch(model_folder, runs / "other", "--steps", 2, "--workers", 1, "--seed", 1))
    caught(check_same_run, runs / "1", runs / "other")


def test_workers_share_the_rollout_and_draw_it(model_folder, tmp_path):
    text = finish(launch(model_folder, tmp_path, "--steps", 3, "--workers", 2, "--eval-every", 0))
    assert "worker 0 |" in text and "worker 1 |" in text and "step s" in text
    for row in metrics(tmp_path):
        s = row["seconds"]
        assert abs(sum(v for k, v in s.items() if k != "step") - s["step"]) < 1e-6


def test_two_workers_resume_exactly(model_folder, tmp_path):
    finish(launch(model_folder, tmp_path / "whole", "--steps", 3, "--workers", 2))
    finish(launch(model_folder, tmp_path / "parts", "--steps", 2, "--workers", 2, "--eval-every", 0))
    (tmp_path / "parts/config.json").unlink()
    finish(launch(model_folder, tmp_path / "parts", "--steps", 3, "--workers", 2, "--eval-every", 0, "--resume"))
    x, y = (load_file(tmp_path / name / "policy/model.safetensors") for name in ("whole", "parts"))
    assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("how", ["kill -9 a worker", "Ctrl-C", "kill -9 the parent"])
def test_nothing_is_left_behind(how, model_folder, tmp_path):
    process = launch(model_folder, tmp_path, "--steps", 10_000, "--workers", 2, "--eval-every", 0)
    try:
        wait_for(lambda: (tmp_path / "checkpoint-000002").exists())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        assert len(workers) == 2
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)
            text = finish(process, 130)
            assert "stopped" in text and "Traceback" not in text
        elif how == "kill -9 a worker":
            os.kill(workers[1], signal.SIGKILL)
            text = finish(process, 1)
            assert "worker 1 died (signal SIGKILL)" in text and "--resume" in text and "Traceback" not in text
        else:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        wait_for(lambda: not left_over(process.pid), 20)
    finally:
        if left_over(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    newest = sorted(tmp_path.glob("checkpoint-??????"))[-1]
    step = json.loads((newest / "state.json").read_text())["step"]
    finish(launch(model_folder, tmp_path, "--steps", step + 1, "--workers", 1, "--eval-every", 0, "--resume"))


def test_a_mistake_in_a_worker_is_one_line_and_status_2(model_folder, tmp_path):
    text = finish(launch(model_folder, tmp_path, "--workers", 2, "--max-new", 5000), 2)
    assert text.count("context of 256") == 1 and "Traceback" not in text


def test_impossible_worker_counts_are_refused(monkeypatch):
    with pytest.raises(UserError, match="--workers -1"):
        TLTConfig(workers=-1)
    monkeypatch.setattr(tlt.torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match="only 2 GPUs"):
        TLTConfig(workers=3)
    monkeypatch.setattr(tlt.torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="cores"):
        TLTConfig(workers=10_000)


def test_the_board_hands_out_each_number_once():
    import threading
    hosted = Board.host()
    taken = []

    def worker():
        board = Board("127.0.0.1", hosted.port)
        while (i := board.add("next") - 1) < 200:
            taken.append(i)
    threads = [threading.Thread(target=worker) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sorted(taken) == list(range(200)) and Board("", 0, hosted).add("next", 0) == 204
