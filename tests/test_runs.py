"""The same small run, started in every way: what must be equal, which files it leaves, and what the bench reads in
them.
"""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import LEARN, ROOT, caught, finish, launch, rows_of, run_in_process
from safetensors.torch import load_file

import tlt
import train_grpo
from bench import paired
from parts.running.launcher import free_port


def step_rows(out: Path) -> list[dict]:
    return [row for row in rows_of(out) if "eval" not in row]


# of a script that starts tlt.py as if a rollout took a minute: then a warm start is worth its time even in a short run
LONG_ROLLOUTS = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
import tlt
from parts.cli import run
tlt.TLTWorker.all_max = lambda self, seconds: 60.0
run(tlt.main)
"""


def two_agents(chain_policy, out, *flags) -> str:
    """Start torchrun with two agents, as on two hosts -> what both have printed."""
    file = out.parent / "long_rollouts.py"
    file.write_text(LONG_ROLLOUTS)
    port = str(free_port())
    agents = []
    for rank in ("0", "1"):
        host = ("--nnodes", "2", "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", port)
        script = ("-m", "torch.distributed.run", *host, "--nproc-per-node", "1", str(file))
        agents.append(launch(chain_policy, out, *LEARN, "--steps", 2, *flags, script=script))
    return "".join(finish(agent) for agent in agents)


def resume_after_the_first_step(chain_policy, whole: Path, out: Path) -> None:
    """Copy a run of two steps as if it had stopped after the first one and had lost its config.json, and resume it."""
    shutil.copytree(whole, out, ignore=shutil.ignore_patterns("checkpoint-000002", "policy"))
    (out / "config.json").unlink()
    finish(launch(chain_policy, out, *LEARN, "--steps", 2, "--workers", 2, "--resume"))


ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "tlt.py")
WARM = "--warm-start 4 --drafter static --strategy 4".split()


# dynamic sampling, several updates per rollout, truncated importance sampling
DYNAMIC = (
    "--dynamic-sampling 6 --overlong-penalty 8 --loss gspo --epochs 2 --minibatches 2 --tis-cap 2 --schedule linear"
).split()


def training_jobs(chain_policy, folder: Path) -> dict:
    """Return name -> a function that makes the run in folder/name, in other processes, and returns what was printed."""

    def tlt_run(name: str, *flags, script=("tlt.py",)) -> str:
        return finish(launch(chain_policy, folder / name, *LEARN, "--steps", 2, *flags, script=script))

    return {
        "2": partial(tlt_run, "2", "--workers", 2),
        "3": partial(tlt_run, "3", "--workers", 3),
        "dynamic": partial(tlt_run, "dynamic", "--workers", 2, *DYNAMIC),
        "plain": partial(tlt_run, "plain", "--workers", 2, "--drafter", "off", "--strategy", "off"),
        "warm": partial(two_agents, chain_policy, folder / "warm", *WARM),
        # --multi_gpu means several processes here; --device cpu decides what they compute on
        "sharded": partial(tlt_run, "sharded", "--shard", script=ACCELERATE),
    }


@pytest.fixture(scope="module")
def runs(chain_policy, tmp_path_factory):
    """A folder with the same small run in each subfolder, started in every way and with all methods of drafting."""
    folder = tmp_path_factory.mktemp("runs")
    with ThreadPoolExecutor(2) as pool:  # they wait most of the time
        printed = {name: pool.submit(make) for name, make in training_jobs(chain_policy, folder).items()}
        run_in_process(tlt.main, chain_policy, folder / "1", *LEARN, "--steps", 2, "--workers", 1)
        run_in_process(train_grpo.main, chain_policy, folder / "alone", *LEARN, "--steps", 2)
        run_in_process(train_grpo.main, chain_policy, folder / "dynamic-alone", *LEARN, "--steps", 2, *DYNAMIC)
        run_in_process(
            tlt.main, chain_policy, folder / "bandit", *LEARN, "--steps", 2, "--workers", 1, "--strategy", "beg-mab"
        )
    for name, future in printed.items():
        (folder / name / "printed.txt").write_text(future.result())
    resume_after_the_first_step(chain_policy, folder / "2", folder / "resumed")
    return folder


# ---------------------------------------------------------------- every way to run gives the same run


def weights(folder: Path) -> torch.Tensor:
    """Return all weights of a policy in one vector."""
    return torch.cat([w.flatten() for _, w in sorted(load_file(folder / "model.safetensors").items())])


def check_same_run(a: Path, b: Path, tolerance: float = 0.0) -> None:
    """Two runs have the same tokens and, up to the tolerance, the same final policy.

    tolerance: distance of the policies as a share of the distance that training has moved them. It is not 0 where sums
    are rounded otherwise: Adam makes full steps even of tiny gradients, whose sign may be that of rounding errors.
    """
    for x, y in zip(rows_of(a), rows_of(b), strict=True):
        for name in ("digest", "reward", "length", "eval"):
            assert x.get(name) == y.get(name)
        assert x.get("gap_max", 0) < 1e-4  # fp32 rollout and trainer agree
        assert abs(x.get("grad_norm", 0) - y.get("grad_norm", 0)) <= 1e-4 * x.get("grad_norm", 0)
    start = weights(ROOT / "base/chain")
    x = weights(a / "policy")
    y = weights(b / "policy")
    assert (x - start).norm() > 0
    assert (x - y).norm() <= tolerance * (x - start).norm()


# alone: train_grpo.py; warm: torchrun with an agent for each worker; sharded: accelerate launch
@pytest.mark.parametrize("other", ["alone", "2", "3", "plain", "warm", "bandit", "sharded"])
def test_all_ways_to_start_numbers_of_workers_and_strategies_give_the_same_run(runs, other):
    check_same_run(runs / "1", runs / other, 0.0 if other in ("alone", "bandit") else 0.02)


def check_dynamic_runs(a: Path, b: Path) -> None:
    """Both runs sample equally many further prompts."""
    for x, y in zip(step_rows(a), step_rows(b), strict=True):
        assert x["extra"]["groups"] == y["extra"]["groups"] > 0
        assert abs(x["entropy"] - y["entropy"]) < 1e-3
        assert abs(x["gap_mean"] - y["gap_mean"]) < 1e-5
    check_same_run(a, b, 0.02)


def test_two_workers_that_draft_replace_the_same_groups(runs):
    check_dynamic_runs(runs / "dynamic-alone", runs / "dynamic")
    caught(check_same_run, runs / "alone", runs / "dynamic", 0.02)


def test_a_run_of_two_workers_resumes_exactly(runs):
    whole = load_file(runs / "2/policy/model.safetensors")
    parts = load_file(runs / "resumed/policy/model.safetensors")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)


def test_the_policy_learns_and_another_seed_gives_another_run(runs, chain_policy):
    assert all(row["grad_norm"] > 0 for row in step_rows(runs / "1"))
    run_in_process(tlt.main, chain_policy, runs / "other", *LEARN, "--steps", 2, "--workers", 1, "--seed", 1)
    caught(check_same_run, runs / "1", runs / "other")


@pytest.mark.parametrize("name", ["2", "warm"])
def test_a_run_leaves_its_drafter_and_its_timeline(runs, name):
    rows = step_rows(runs / name)
    assert sum(row["speculation"]["share"] for row in rows) > 0
    for row in rows:
        assert 0 <= row["speculation"]["tokens_per_round"] <= 9
        assert row["drafter"]["preempted"] >= 0
    for folder in ("checkpoint-000002", "policy"):
        assert (runs / name / folder / "drafter/drafter.safetensors").exists()
    assert (runs / name / "timeline.png").exists()
    trace = json.loads((runs / name / "trace.json").read_text())
    events = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    assert {event["tid"] for event in events} == {0, 1}
    assert {"update", "speculative", "checkpoint"} <= {event["name"] for event in events}
    for worker in (0, 1):  # one state at a time, without gaps
        own = [event for event in events if event["tid"] == worker]
        assert all(abs(a["ts"] + a["dur"] - b["ts"]) <= 2 for a, b in zip(own, own[1:]))


def test_a_static_drafter_gets_a_warm_start_and_is_then_frozen(runs):
    first, second = step_rows(runs / "warm")
    assert first["drafter"]["steps"] > 0
    assert second["drafter"]["steps"] == 0
    assert second["seconds"]["speculative"] > second["seconds"]["rollout"]


def test_a_plain_run_drafts_nothing(runs):
    row = step_rows(runs / "plain")[0]
    assert "speculation" not in row
    assert row["seconds"]["speculative"] == 0
    assert not list((runs / "plain").rglob("drafter"))


def test_the_table_shows_all_workers_and_their_seconds_sum_to_the_step(runs):
    text = (runs / "2/printed.txt").read_text()
    assert "worker 0 |" in text
    assert "worker 1 |" in text
    assert "step s" in text
    for row in step_rows(runs / "2"):
        states = [seconds for state, seconds in row["seconds"].items() if state != "step"]
        assert abs(sum(states) - row["seconds"]["step"]) < 1e-6


# ---------------------------------------------------------------- bench tables made from training runs


def check_paired(result: dict, steps: int, evaluations: int) -> None:
    """The result of `bench paired` for two runs with the same tokens."""
    rollout_row, _, step_row, *by_batch = result["rows"][:-1]
    checks = result["rows"][-1]
    assert result["name"] == "paired"
    assert result["ratio"] == step_row["plain"] / step_row["tlt"]
    assert checks["steps"] == checks["identical"] == steps
    assert checks["equal"] == checks["evaluations"] == evaluations
    assert checks["parted"] is None
    for party in ("plain", "tlt"):
        assert 0 < sum(row[party] for row in by_batch) <= rollout_row[party]


def test_paired_compares_with_an_existing_plain_run(runs, run_bench):
    result = run_bench("paired", "--run", runs / "2", "--plain", runs / "plain")
    check_paired(result, 2, evaluations=1)
    assert len(result["rows"][-1]["tlt"]) == 1
    assert (runs / "2/paired.png").exists()


def test_paired_repeats_the_last_steps_without_and_with_tlt(runs, run_bench, capsys):
    result = run_bench("paired", "--run", runs / "2")
    check_paired(result, 1, evaluations=0)
    text = capsys.readouterr().out
    assert "the same tokens in 1 of 1 steps" in text
    assert "before the plain steps" in text
    assert "speculation" not in rows_of(runs / "2-plain")[-1]
    assert "speculation" in rows_of(runs / "2-again")[-1]
    seconds = [step_rows(runs / name)[-1]["seconds"]["step"] for name in ("2", "2-again")]
    assert result["rows"][-1]["tlt"] == seconds
    assert result["rows"][2]["tlt"] == pytest.approx(sum(seconds) / 2)
    for parting in range(3):  # a token of one of the three runs differs
        pair = paired.read_pair(runs / "2-plain", runs / "2", runs / "2-again")
        [pair.plain, *pair.tlt][parting].steps[2]["digest"] += 1
        checks = paired.check_row(pair)
        assert (checks["identical"], checks["parted"]) == (0, 2)
        caught(check_paired, {**result, "rows": [*result["rows"][:-1], checks]}, 1, evaluations=0)


def test_static_and_adaptive_drafters_are_compared(runs, run_bench):
    result = run_bench("drafter", "--adaptive", runs / "2", "--static", runs / "warm")
    assert result["name"] == "drafter"
    assert result["rows"][0]["steps"][0] == 1  # when an untrained drafter is tried again depends on the time
    assert 1 <= result["rows"][0]["static"] <= 9
    assert (runs / "2/drafter.png").exists()
