"""Runs with two workers that are interrupted, hang or are killed: no process is left, and the run can be resumed."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from conftest import ROOT, finish, launch, rows_of, run_in_process
from safetensors.torch import load_file

import tlt
from drafter import Drafter
from parts.running import checkpoints


def processes_left(session: int) -> list[str]:
    """Return the processes that are still alive in the launched session."""
    alive = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session and fields[0] != "Z":
            alive.append(stat.parent.name)
    return alive


def wait_for(condition, seconds: float = 300) -> None:
    """Wait until the condition holds."""
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, f"waited {seconds:g} s in vain"
        time.sleep(0.05)


def workers_of(process: subprocess.Popen) -> list[int]:
    """Return the process ids of a run's two workers, by rank."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    workers = [int(pid) for pid in children if b"tlt.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    assert len(workers) == 2
    return workers


def ctrl_c(process, workers) -> str:
    os.killpg(process.pid, signal.SIGINT)
    text = finish(process, 130)
    assert "stopped" in text
    return text


def hang_a_worker(process, workers) -> str:
    os.kill(workers[1], signal.SIGSTOP)
    text = finish(process, 1)
    assert "no heartbeat for 8 s from " in text
    assert "worker 1 (" in text
    assert "--resume" in text
    return text


def kill_the_parent(process, workers) -> str:
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    return ""


def kill_while_the_other_hangs(process, workers) -> str:
    """Worker 1 never finishes its rollout (or its update), so worker 0 waits, or trains its drafter in a rollout."""
    os.kill(workers[1], signal.SIGSTOP)
    time.sleep(1)
    os.kill(workers[0], signal.SIGKILL)
    text = finish(process, 1)
    assert "worker 0 died (signal SIGKILL) in state " in text
    assert "--resume" in text
    return text


HARMS = {
    "Ctrl-C": ctrl_c,
    "a worker hangs": hang_a_worker,
    "kill -9 the parent": kill_the_parent,
    "kill -9 a worker while the other hangs": kill_while_the_other_hangs,
}


def run_and_harm(harm, model_folder: Path, out: Path) -> str:
    """Start a run, harm it once it has checkpoints, and wait until no process is left -> what it has printed."""
    patience = 8 if harm is hang_a_worker else 600
    endless = ("--steps", 10_000, "--workers", 2, "--eval-every", 0, "--show-every", 0, "--patience", patience)
    process = launch(model_folder, out, *endless)
    try:
        wait_for(lambda: (out / "checkpoint-000002").exists() or process.poll() is not None)
        text = harm(process, workers_of(process))
        wait_for(lambda: not processes_left(process.pid), 30)
    finally:
        if processes_left(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    return text


@pytest.fixture(scope="module")
def harmed_runs(model_folder, tmp_path_factory):
    """Name of the harm -> (folder, future). Two run at once, since they wait most of the time."""
    folder = tmp_path_factory.mktemp("harmed")
    with ThreadPoolExecutor(2) as pool:
        jobs = {name: pool.submit(run_and_harm, harm, model_folder, folder / name) for name, harm in HARMS.items()}
        yield {name: (folder / name, future) for name, future in jobs.items()}


@pytest.mark.parametrize("harm", HARMS)
def test_no_process_is_left_and_the_run_can_be_resumed(harm, harmed_runs, model_folder, monkeypatch):
    out, future = harmed_runs[harm]
    assert "Traceback" not in future.result()
    checkpoint = checkpoints.newest(out)
    load_file(checkpoint / "drafter/drafter.safetensors")  # it is complete
    step = checkpoints.read_state(checkpoint)["step"]
    places = []
    load = Drafter.load
    monkeypatch.setattr(Drafter, "load", lambda drafter, folder: places.append(folder) or load(drafter, folder))
    run_in_process(tlt.main, model_folder, out, "--steps", step + 1, "--workers", 1, "--eval-every", 0, "--resume")
    assert rows_of(out)[-1]["step"] == step + 1
    assert places == [checkpoint / "drafter"]


POOL = """
import time
from parts.running.launcher import process_pool
if __name__ == "__main__":
    with process_pool(2) as pool:
        results = pool.map(time.sleep, [0, 0, *[3600] * 8])
        next(results), next(results)
        print("ready", flush=True)
        list(results)
"""


def test_ctrl_c_ends_a_pool_in_the_middle_of_its_tasks(tmp_path):
    """As in a terminal, where all processes get the signal."""
    (tmp_path / "pool.py").write_text(POOL)
    process = subprocess.Popen(
        [sys.executable, tmp_path / "pool.py"],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    process.communicate(timeout=300)  # the tasks take an hour
    wait_for(lambda: not processes_left(process.pid))
