"""The workers, as real processes: every door, equal results, and what is left behind when something dies."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import caught, tiny
from safetensors.torch import load_file

import bench
import tlt
import train_grpo
from drafter import Drafter
from rollout import Draft, Engine, Group, Sampling
from tasks import UserError
from tlt import Board, TLTConfig

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--device", "cpu", "--prompts", "6", "--samples", "4", "--max-new", "24", "--slots", "8", "--eval-problems", "4", "--eval-samples", "2", "--eval-every", "2",
         "--save-every", "1", "--lr", "1e-3"]
TLT = ["--warm-start", "0"]
LEARN = ["--task", "chain", "--max-new", "32", "--lr", "3e-4"]  # for the policy that is able to


def launch(model_folder, out, *argv, door=("tlt.py",), **environment):
    return subprocess.Popen([sys.executable, *door, "--model", str(model_folder), "--out", str(out), *SMALL, *(TLT if "tlt.py" in door else []), *map(str, argv)], cwd=ROOT,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True, env={**os.environ, **environment},
                            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # a shell's background jobs ignore Ctrl-C, and so would this


def here(main, model_folder, out, *argv):
    """As `launch` and `finish`, for one worker, in this process: without the seconds that imports take."""
    old, sys.argv = sys.argv, [main.__module__, "--model", str(model_folder), "--out", str(out), *SMALL, *(TLT if main is tlt.main else []), *map(str, argv)]
    try:
        main()
    finally:
        sys.argv = old


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
    """tolerance: distance of the two policies, as a share of the way that they have come (Adam makes steps of what rounding leaves of tiny gradients)."""
    for x, y in zip(metrics(a), metrics(b), strict=True):
        assert all(x.get(key) == y.get(key) for key in ("digest", "reward", "length", "eval"))
        assert x.get("gap_max", 0) < 1e-4  # fp32 rollout and trainer agree
        assert abs(x.get("grad_norm", 0) - y.get("grad_norm", 0)) <= 1e-4 * x.get("grad_norm", 0)
    start, x, y = (torch.cat([w.flatten() for _, w in sorted(load_file(path / "model.safetensors").items())]) for path in (ROOT / "base/chain", a / "policy", b / "policy"))
    assert (x - start).norm() > 0 and (x - y).norm() <= tolerance * (x - start).norm()


@pytest.fixture(scope="module")
def able(tmp_path_factory):
    """A policy that solves some problems and so learns from the first step on: base/chain alone, without its drafter."""
    return shutil.copytree(ROOT / "base/chain", tmp_path_factory.mktemp("able") / "chain", ignore=shutil.ignore_patterns("drafter", "process", "outcome", "revise", "refit", "choice.json"))


@pytest.fixture(scope="module")
def runs(able, tmp_path_factory):
    """The same small run through every door (1, 2, 3 workers, torchrun, accelerate launch, train_grpo.py alone), and with all kinds of drafting. Two at a time: there may be two cores."""
    folder = tmp_path_factory.mktemp("runs")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tlt.py")
    jobs = {"2": ("--workers", 2), "3": ("--workers", 3), "plain": ("--workers", 2, "--drafter", "off", "--strategy", "off"),
            "warm": ("--workers", 2, "--warm-start", 4, "--drafter", "static", "--strategy", 4), "sharded": ("--workers", 2, "--shard")}
    doors = {"torchrun": torchrun, "accelerate": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "tlt.py")}  # multi_gpu: several processes, says --device of what kind
    for pair in (("2", "3"), ("torchrun", "plain"), ("warm", "sharded"), ("accelerate",)):
        running = [launch(able, folder / name, *LEARN, "--steps", 2, *jobs.get(name, ()), door=doors.get(name, ("tlt.py",))) for name in pair]
        if "accelerate" in pair:
            here(tlt.main, able, folder / "1", *LEARN, "--steps", 2, "--workers", 1)
            here(train_grpo.main, able, folder / "alone", *LEARN, "--steps", 2)
            here(tlt.main, able, folder / "bandit", *LEARN, "--steps", 2, "--workers", 1, "--strategy", "beg-mab")
        for name, process in zip(pair, running):
            (folder / name / "printed.txt").write_text(finish(process))
    return folder


@pytest.mark.parametrize("other", ["alone", "2", "3", "torchrun", "plain", "warm", "bandit", "sharded", "accelerate"])
def test_every_door_number_of_workers_and_kind_of_drafting_gives_the_same_run(runs, other):
    check_same_run(runs / "1", runs / other, 0.0 if other in ("alone", "bandit") else 0.02)


def test_a_run_leaves_its_drafter_and_its_timeline(runs):
    for name in ("2", "warm"):
        row = metrics(runs / name)[1]
        assert row["speculation"]["share"] > 0 and 1 <= row["speculation"]["tokens_per_round"] <= 9 and row["drafter"]["preempted"] >= 0
        assert (runs / name / "drafter/drafter.safetensors").exists() and (runs / name / "timeline.png").exists()
        events = [e for e in json.loads((runs / name / "trace.json").read_text())["traceEvents"] if e["ph"] == "X"]
        assert {e["tid"] for e in events} == {0, 1} and {"update", "speculative", "checkpoint"} <= {e["name"] for e in events}
        for tid in (0, 1):  # one state at a time, without holes
            mine = [e for e in events if e["tid"] == tid]
            assert all(abs(a["ts"] + a["dur"] - b["ts"]) <= 2 for a, b in zip(mine, mine[1:]))
    assert metrics(runs / "warm")[1]["drafter"]["steps"] > 0 and metrics(runs / "warm")[2]["drafter"]["steps"] == 0  # warmed, then frozen
    assert "speculation" not in metrics(runs / "plain")[1] and not (runs / "plain/drafter").exists()
    assert metrics(runs / "plain")[1]["seconds"]["speculative"] == 0 and metrics(runs / "warm")[1]["seconds"]["rollout"] < metrics(runs / "warm")[1]["seconds"]["speculative"]


def test_the_policy_learns_and_another_seed_is_seen(runs, able):
    assert all(row["grad_norm"] > 0 for row in metrics(runs / "1") if "eval" not in row)
    here(tlt.main, able, runs / "other", *LEARN, "--steps", 2, "--workers", 1, "--seed", 1)
    caught(check_same_run, runs / "1", runs / "other")


def test_workers_share_the_rollout_and_draw_it(runs):
    text = (runs / "2/printed.txt").read_text()
    assert "worker 0 |" in text and "worker 1 |" in text and "step s" in text
    for row in (row for row in metrics(runs / "2") if "eval" not in row):
        s = row["seconds"]
        assert abs(sum(v for k, v in s.items() if k != "step") - s["step"]) < 1e-6


def test_two_workers_resume_exactly(runs, able, tmp_path):
    finish(launch(able, tmp_path, *LEARN, "--steps", 1, "--workers", 2, "--eval-every", 0))
    (tmp_path / "config.json").unlink()
    finish(launch(able, tmp_path, *LEARN, "--steps", 2, "--workers", 2, "--eval-every", 0, "--resume"))
    x, y = (load_file(folder / "policy/model.safetensors") for folder in (runs / "2", tmp_path))
    assert all(torch.equal(x[k], y[k]) for k in x)


@pytest.mark.parametrize("how", ["kill -9 a worker", "a worker hangs", "Ctrl-C", "kill -9 the parent"])
def test_nothing_is_left_behind(how, model_folder, tmp_path):
    process = launch(model_folder, tmp_path, "--steps", 10_000, "--workers", 2, "--eval-every", 0, "--patience", 5 if "hangs" in how else 600)
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
            assert "worker 1 died (signal SIGKILL) in state " in text and "--resume" in text and "Traceback" not in text
        elif how == "a worker hangs":
            os.kill(workers[1], signal.SIGSTOP)
            text = finish(process, 1)
            assert "no sign of life for 5 s from " in text and "worker 1 (" in text and "--resume" in text and "Traceback" not in text
        else:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
        wait_for(lambda: not left_over(process.pid), 20)
    finally:
        if left_over(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    newest = sorted(tmp_path.glob("checkpoint-??????"))[-1]
    step = json.loads((newest / "state.json").read_text())["step"]
    here(tlt.main, model_folder, tmp_path, "--steps", step + 1, "--workers", 1, "--eval-every", 0, "--resume")


def test_a_mistake_in_a_worker_is_one_line_and_status_2(model_folder, tmp_path):
    text = finish(launch(model_folder, tmp_path, "--workers", 2, "--max-new", 5000), 2)
    assert text.count("context of 256") == 1 and "Traceback" not in text


def run_bench(monkeypatch, tmp_path, *argv):
    monkeypatch.setattr("sys.argv", ["bench.py", *map(str, argv), "--json", str(tmp_path / "out.json")])
    monkeypatch.chdir(ROOT)
    bench.main()
    return json.loads((tmp_path / "out.json").read_text())


def test_paired_comparison(runs, monkeypatch, tmp_path, capsys):
    """With a plain run that is there, and with one made from the checkpoint before the last."""
    for more, steps in ((["--plain", runs / "plain"], 2), ([], 1)):
        found = run_bench(monkeypatch, tmp_path, "paired", "--run", runs / "2", *more)
        checks = found["rows"][-1]
        assert found["name"] == "paired" and found["ratio"] == found["rows"][2]["plain"] / found["rows"][2]["tlt"]
        assert checks["steps"] == checks["identical"] == steps and checks["equal"] == checks["evaluations"] > 0 and checks["parted"] is None
        assert (runs / "2/paired.png").exists()
    assert "the same tokens in 1 of 1 steps" in capsys.readouterr().out
    rows = metrics(runs / "2-plain")
    rows[-2]["digest"] += 1  # a token differs
    (runs / "2-plain/metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    found = run_bench(monkeypatch, tmp_path, "paired", "--run", runs / "2", "--plain", runs / "2-plain")
    assert found["rows"][-1]["identical"] == 0 and found["rows"][-1]["parted"] == 2


def test_static_against_adaptive(runs, monkeypatch, tmp_path):
    found = run_bench(monkeypatch, tmp_path, "drafter", "--adaptive", runs / "2", "--static", runs / "warm")
    assert found["rows"][0]["steps"] == [1, 2] and 1 <= found["rows"][0]["static"] <= 9 and (runs / "2/drafter.png").exists()


class Scene:
    """A fake clock, a fake Board and a fake drafter, on which micro-steps and waits take the time that they say."""

    def __init__(self, ends, micro_step, rows=True):
        self.now, self.ends, self.micro_step, self.states, self.log = 0.0, ends, micro_step, [], []
        self.buffer = type("B", (), {"rows": [1] if rows else []})()

    def enter(self, state):
        self.states.append(state)
        self.log.append((self.now, state))

    def step(self):
        self.now += self.micro_step

    def responses(self):
        return sum(end <= self.now for end in self.ends)


def check_trains_until_the_last_is_done(over, ends=(1.0, 2.0, 7.5), micro_step=0.4):
    """One worker is done at time 0; the others' last responses come at `ends`. It has to train until the last, and not one micro-step longer."""
    scene = Scene(ends, micro_step)
    tlt.spare(lambda: over(scene), scene, scene)
    assert max(ends) <= scene.now < max(ends) + micro_step
    assert set(scene.states) == {"drafter", "idle"} and scene.states[-1] == "idle" and scene.states.count("idle") == 1


def test_an_idle_worker_trains_until_the_last_response(monkeypatch):
    check_trains_until_the_last_is_done(lambda scene: scene.responses() >= 3)
    caught(check_trains_until_the_last_is_done, lambda scene: scene.responses() >= 1)  # stops as soon as ANY worker has finished
    slow = lambda scene: scene.responses() >= 3 and scene.now % 2 < 0.4  # looks at the Board now and then only
    caught(check_trains_until_the_last_is_done, slow)
    for spot in (None, "empty"):  # no drafter, or nothing yet to learn from: wait
        scene = Scene([0.02], 0.4, rows=False)
        monkeypatch.setattr(tlt.time, "sleep", lambda s: setattr(scene, "now", scene.now + s))
        tlt.spare(lambda: scene.responses() >= 1, scene, spot and scene)
        assert set(scene.states) == {"idle"} and 0.02 <= scene.now < 0.03


def check_averages_by_steps(average):
    """Three workers with 1, 3 and 0 steps: all end with (1 * first + 3 * second) / 4, and keep their optimizers' moments."""
    import threading
    model = tiny()
    spots = [tlt.Spot(model, TLTConfig(out="nowhere", model="nowhere"), rank) for rank in range(3)]
    steps = (1, 3, 0)
    for i, (spot, n) in enumerate(zip(spots, steps)):
        spot.since = n
        for w in [*spot.learner.parameters(), *spot.trainer.average]:
            w.data.fill_(float(i + 1))
    sums, barrier, moments = {}, threading.Barrier(3), [id(spot.trainer.optimizer) for spot in spots]

    def team_sum(rank):
        def sum_up(tensors):
            sums[rank] = [t.clone() for t in tensors]
            barrier.wait()
            for i, t in enumerate(tensors):
                t.copy_(sum(sums[r][i] for r in range(3)))
        return sum_up
    threads = [threading.Thread(target=average, args=(spot, team_sum(rank))) for rank, spot in enumerate(spots)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    for spot in spots:
        assert all(torch.allclose(w, torch.full_like(w, 1.75)) for w in [*spot.learner.parameters(), *spot.trainer.average]) and spot.since == 0
    assert moments == [id(spot.trainer.optimizer) for spot in spots]


def test_drafters_are_averaged_by_steps():
    check_averages_by_steps(tlt.Spot.average)

    def unweighted(spot, team_sum):
        spot.since = 1
        tlt.Spot.average(spot, team_sum)
    caught(check_averages_by_steps, unweighted)


def test_nobody_trained_changes_nothing():
    spot = tlt.Spot(tiny(), TLTConfig(out="nowhere", model="nowhere"), 0)
    before = [p.clone() for p in spot.learner.parameters()]
    spot.average(lambda tensors: None)
    assert all(torch.equal(a, b) for a, b in zip(before, spot.learner.parameters()))


def test_a_worker_that_dies_while_it_trains_the_drafter(model_folder, tmp_path):
    process = launch(model_folder, tmp_path, "--steps", 10_000, "--workers", 2, "--eval-every", 0)
    try:
        wait_for(lambda: (tmp_path / "checkpoint-000002").exists())
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        workers = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        os.kill(workers[1], signal.SIGSTOP)  # it will never finish its rollout (or its update), so the other one waits, and trains, if it is in a rollout
        time.sleep(1)
        os.kill(workers[0], signal.SIGKILL)
        assert "worker 0 died (signal SIGKILL)" in finish(process, 1)
        wait_for(lambda: not left_over(process.pid), 20)
    finally:
        if left_over(process.pid):
            os.killpg(process.pid, signal.SIGKILL)
    load_file(tmp_path / "drafter/drafter.safetensors")  # whole
    here(tlt.main, model_folder, tmp_path, "--steps", json.loads((sorted(tmp_path.glob("checkpoint-??????"))[-1] / "state.json").read_text())["step"] + 1,
         "--workers", 1, "--eval-every", 0, "--resume")


def test_two_torchrun_agents_are_two_hosts(able, tmp_path, runs):
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agents = [launch(able, tmp_path, *LEARN, "--steps", 2, door=("-m", "torch.distributed.run", "--nnodes", "2", "--node-rank", str(i), "--nproc-per-node", "1",
                                                                  "--master-addr", "127.0.0.1", "--master-port", str(port), "tlt.py")) for i in range(2)]
    for agent in agents:
        finish(agent)
    check_same_run(runs / "1", tmp_path, 0.02)


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


def test_the_simulation_by_hand():
    """Two groups of two rows, two slots a worker: one worker does them one after the other, two at once. A round of two rows takes 2 s, of one row 1 s."""
    rounds = {1: (1.0, 1.0), 2: (2.0, 1.0)}
    assert bench.simulate([[1, 3], [2, 2]], 1, 2, rounds) == [2 + 1 + 1 + 2 + 2]
    assert sorted(bench.simulate([[1, 3], [2, 2]], 2, 2, rounds)) == [4, 4]
    assert sorted(bench.simulate([[4, 4]], 3, 2, {1: (1.0, 2.0), 2: (2.0, 2.0)})) == [0, 0, 4]


def test_nobody_takes_more_than_a_fair_share_at_once():
    assert [tlt.fair_share([16] * 16, workers, 256) for workers in (1, 2, 4, 8, 16, 64)] == [256, 128, 64, 32, 16, 16]
    assert tlt.fair_share([16] * 16, 2, 64) == 64 and tlt.fair_share([16] * 3, 2, 64) == 32
    assert len(bench.simulate([[5] * 16] * 16, 8, 256, {n: (1.0, 1.0) for n in range(1, 10)})) == 8


def test_a_restart_keeps_the_drafter_that_was_trained(tmp_path, monkeypatch):
    policy = tiny()
    Drafter(policy).save(tmp_path / "drafter")
    spot = lambda: tlt.Spot(policy, TLTConfig(out=str(tmp_path), model="nowhere"), 0)
    assert spot().fresh
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not spot().fresh


def test_the_engine_holds_back_what_it_may_not_hold(model_folder):
    from rollout import Engine, Sampling
    engine, seen, drawn, begun = Engine(tiny(), {1}, slots=16, context=64), [], [], set()

    def groups():
        for i in range(5):
            drawn.append(i)
            yield Group(i, [5, 6, 7], [i * 10 + k for k in range(4)])

    def choose(live):
        seen.append(len(live))
        begun.update(row.group.index for row in live)
        assert len(drawn) == len(begun)  # a group that waits here is one that another worker could have begun
        return Draft()

    def run():
        for found in (seen, drawn, begun):
            found.clear()
        return {(r.group, r.sample): r.tokens for r in engine.generate(groups(), Sampling(max_new=12), choose)}

    free = run()
    assert max(seen) == 16
    engine.most = 4
    assert run() == free and max(seen) == 4


# ---------------------------------------------------------------- sharding


def updates(team, config, folder):
    """An update on made-up advantages, then, as a run that is resumed, one from the saved states -> statistics, whole states of policy and optimizer."""
    model = tiny()
    responses = list(Engine(model, {1}, 8, 60).generate([Group(i, [5 + i, 9, 30], [7 * i + k for k in range(3)]) for i in range(5)], Sampling(max_new=25)))
    responses.sort(key=lambda r: (r.group, r.sample))  # the same on every worker
    for step in range(2):
        learner, _ = team.prepare(model)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2, fused=True)
        if step:
            train_grpo.set_optimizer_state_dict(learner, optimizer, states[1], options=train_grpo.WHOLE)
        stats = train_grpo.update(learner, None, optimizer, responses, [((i * 7) % 5 - 2) / 2 for i in range(15)], step, config, team)
        states = train_grpo.get_state_dict(learner, optimizer, options=train_grpo.WHOLE)
        if team.rank == 0:
            torch.save(states, folder / "states")
        team.everyone(0)
        states = torch.load(folder / "states", weights_only=True)
        model = tiny()
        model.load_state_dict(states[0])
    return stats, states


def sharded(rank, port, folder, broken):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    if broken:  # means instead of sums
        from torch.distributed.fsdp import FSDPModule
        FSDPModule.set_gradient_divide_factor = lambda self, factor: None
    config = TLTConfig(device="cpu", minibatches=2, micro_tokens=150, shard=True)
    found = updates(tlt.Team(config), config, folder)
    if rank == 0:
        torch.save(found, folder / f"broken {broken}")
    torch.distributed.destroy_process_group()


def check_sharded(folder, broken):
    import socket
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    torch.multiprocessing.spawn(sharded, (port, folder, broken), nprocs=2)
    config = train_grpo.Config(device="cpu", minibatches=2, micro_tokens=150)
    stats, (weights, moments) = updates(train_grpo.Alone(config), config, folder)
    their_stats, (theirs, their_moments) = torch.load(folder / f"broken {broken}", weights_only=True)
    assert weights.keys() == theirs.keys() and all(torch.allclose(weights[k], theirs[k], atol=1e-5) for k in weights)
    a, b = moments["state"], their_moments["state"]
    assert a.keys() == b.keys() and all(torch.allclose(a[k]["exp_avg"], b[k]["exp_avg"], atol=1e-6) for k in a)
    assert all(abs(stats[k] - their_stats[k]) < 1e-4 for k in stats)


def test_sharded_and_replicated_updates_agree(tmp_path):
    check_sharded(tmp_path, False)
    caught(check_sharded, tmp_path, True)


def test_who_counts_as_hung():
    pulse = tlt.Pulse(3)
    for rank, state in enumerate(("idle", "checkpoint", "rollout")):
        pulse.tell(rank, state)
        pulse.heard[rank] -= 100 * (rank < 2)
    assert pulse.silent(10) == []  # 0 waits, because writing a checkpoint takes long
    pulse.state[1] = pulse.NAMES.index("update")
    assert pulse.silent(10) == [0, 1] and pulse.silent(1000) == []
