"""The workers: their mistakes, drafter training while they are idle, the work queue, sharding.

Whole runs are in test_runs.py, workers that die or hang in test_harm.py.
"""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LEARN, caught, finish, launch, run_in_process, tiny
from torch.distributed import TCPStore

import bench.scale
import spot
import tlt
import train_grpo
from drafter import Drafter
from parts.cli import UserError
from parts.engine.interfaces import DraftPlan, Group, RoundReport, Stats, Strategy
from parts.engine.sampling import Sampling
from parts.running import checkpoints
from parts.running.launcher import Heartbeat, free_port
from parts.running.timers import STATES, WorkerTimer
from parts.training import logprobs
from parts.training.logprobs import checkpoint_layers
from rollout import Engine
from spot import SpotTrainer, train_until
from strategy import CountingStrategy
from tlt import Board, TLTConfig
from train_grpo import Worker

# ---------------------------------------------------------------- when something goes wrong


def test_a_mistake_is_one_line_before_any_worker_starts(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tlt, "spawn", lambda *args: pytest.fail("workers were started"))
    for flags, message in (
        (["--max-new", 5000], "context of 256"),
        (["--task", "typo"], "--task typo"),
        (["--prompt-style", "chat"], "no chat template"),
        (["--resume"], "no checkpoint"),
    ):
        with pytest.raises(UserError, match=message):
            run_in_process(tlt.main, model_folder, tmp_path / "run", "--workers", 2, *flags)
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_worker_is_one_line_and_status_2(chain_policy, tmp_path):
    """The parent cannot see that the drafter to start from is of another policy."""
    Drafter(tiny()).save(tmp_path / "drafter")
    flags = ("--workers", 2, "--drafter-from", tmp_path / "drafter", "--steps", 1)
    text = finish(launch(chain_policy, tmp_path / "run", *LEARN, *flags), 2)
    assert len(text.strip().splitlines()) == 1
    assert "size mismatch" in text


def test_which_workers_are_overdue():
    heartbeat = Heartbeat(3)
    for rank, state in enumerate(("idle", "checkpoint", "rollout")):
        heartbeat.beat(rank, state)
        heartbeat.times[rank] -= 100 * (rank < 2)
    assert heartbeat.overdue(10) == []  # worker 0 waits, because writing a checkpoint takes long
    heartbeat.states[1] = heartbeat.NAMES.index("update")
    assert heartbeat.overdue(10) == [0, 1]
    assert heartbeat.overdue(1000) == []


# ---------------------------------------------------------------- drafter training of idle workers


class Scene:
    """A fake timer, Board and spot trainer, with a clock on which training steps take so many seconds."""

    def __init__(self, ends, step_seconds: float, can_train: bool = True):
        """ends: when the last response of each of the other workers is finished."""
        self.now = 0.0
        self.ends = ends
        self.step_seconds = step_seconds
        self.states: list[str] = []
        self.can_train = can_train

    def enter(self, state: str) -> None:
        self.states.append(state)

    def step(self) -> None:
        self.now += self.step_seconds

    def finished(self) -> int:
        """Return how many of the other workers have finished."""
        return sum(end <= self.now for end in self.ends)


def check_trains_until_the_last_response(over, ends=(1.0, 2.0, 7.5), step_seconds=0.4):
    """A worker that is done at time 0 trains until the last response of all others, and not a step longer."""
    scene = Scene(ends, step_seconds)
    train_until(lambda: over(scene), scene, scene)
    assert max(ends) <= scene.now < max(ends) + step_seconds
    assert set(scene.states) == {"drafter", "idle"}
    assert scene.states[-1] == "idle"
    assert scene.states.count("idle") == 1


def test_an_idle_worker_trains_until_the_last_response():
    check_trains_until_the_last_response(lambda scene: scene.finished() >= 3)
    # ended by the first worker that has finished
    caught(check_trains_until_the_last_response, lambda scene: scene.finished() >= 1)
    # asked only now and then
    caught(check_trains_until_the_last_response, lambda scene: scene.finished() >= 3 and scene.now % 2 < 0.4)


@pytest.mark.parametrize("drafter", ["no drafter", "no features to learn from"])
def test_an_idle_worker_that_cannot_train_waits(drafter, monkeypatch):
    scene = Scene([0.02], 0.4, can_train=False)

    def sleep(seconds: float) -> None:
        scene.now += seconds

    monkeypatch.setattr(spot.time, "sleep", sleep)
    train_until(lambda: scene.finished() >= 1, scene, None if drafter == "no drafter" else scene)
    assert set(scene.states) == {"idle"}
    assert 0.02 <= scene.now < 0.03


def make_spot_trainer(rank: int = 0, **changes) -> SpotTrainer:
    """Return the spot trainer of a tiny random policy, without a drafter to start from."""
    return SpotTrainer(tiny(), TLTConfig(**{"out": "nowhere", "model": "base/chain/refit", **changes}), rank, {1})


def check_averages_by_steps(average):
    """Three workers have made 1, 3 and 0 steps: all get (1 * first + 3 * second) / 4, and keep their optimizers."""
    spot_trainers = [make_spot_trainer(rank) for rank in range(3)]
    for value, (spot_trainer, steps) in enumerate(zip(spot_trainers, (1, 3, 0)), 1):
        spot_trainer.steps_since_average = steps
        for w in [*spot_trainer.learner.parameters(), *spot_trainer.trainer.average]:
            w.data.fill_(float(value))
    sums = {}
    barrier = threading.Barrier(3)
    optimizers = [id(spot_trainer.trainer.optimizer) for spot_trainer in spot_trainers]

    def all_reduce(rank: int):
        def sum_up(tensors):
            sums[rank] = [t.clone() for t in tensors]
            barrier.wait()
            for i, t in enumerate(tensors):
                t.copy_(sum(sums[other][i] for other in range(3)))
            barrier.wait()

        return sum_up

    threads = [
        threading.Thread(target=average, args=(spot_trainer, all_reduce(rank)))
        for rank, spot_trainer in enumerate(spot_trainers)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for spot_trainer in spot_trainers:
        for w in [*spot_trainer.learner.parameters(), *spot_trainer.trainer.average]:
            assert torch.allclose(w, torch.full_like(w, 1.75))
        assert spot_trainer.steps_since_average == 0
    assert optimizers == [id(spot_trainer.trainer.optimizer) for spot_trainer in spot_trainers]


def test_drafters_are_averaged_by_steps():
    check_averages_by_steps(SpotTrainer.average)

    def unweighted(spot_trainer, all_reduce):
        spot_trainer.steps_since_average = 1
        SpotTrainer.average(spot_trainer, all_reduce)

    caught(check_averages_by_steps, unweighted)


def test_an_average_without_steps_changes_nothing():
    spot_trainer = make_spot_trainer()
    before = [p.clone() for p in spot_trainer.learner.parameters()]
    spot_trainer.average(lambda tensors: None)
    assert all(torch.equal(a, b) for a, b in zip(before, spot_trainer.learner.parameters()))


def test_a_resumed_run_takes_the_drafter_of_its_checkpoint(tmp_path):
    config = TLTConfig(out="nowhere", model="base/chain/refit")
    trained = Drafter(tiny())
    trained.save(tmp_path / "drafter")
    spot_trainer = SpotTrainer(tiny(), config, 0, {1}, checkpoint=tmp_path)
    assert not spot_trainer.needs_warm_start
    for a, b in zip(spot_trainer.learner.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(a, b)
    assert make_spot_trainer().needs_warm_start
    assert SpotTrainer(tiny(), config, 0, {1}, checkpoint=tmp_path / "without").needs_warm_start


# ---------------------------------------------------------------- what is learned from, what is counted


def single_worker(**settings) -> tlt.TLTWorker:
    """Return the only worker of a run on a CPU."""
    return tlt.TLTWorker(TLTConfig(device="cpu", model="base/chain/refit", **settings))


def worker_after_rollout(split: str, learn: bool | None = None, **settings) -> tlt.TLTWorker:
    """Return a worker that has made a rollout of a split. learn: as in Worker.rollout; None: as the loop sets it."""
    worker = single_worker(**{"warm_start": 0.2, "prompts": 1, **settings})
    engine = worker.make_engine(tiny(), {1}, 8, 0, None)
    engine.reserve(60)
    groups = [Group((split, i), [5 + i, 9, 30], [7 * i + k for k in range(4)]) for i in range(3)]
    learn = split == "train" if learn is None else learn
    worker.rollout(engine, groups, Sampling(max_new=25), lambda r: None, lambda n: None, learn=learn)
    return worker


def check_nothing_learned(worker: tlt.TLTWorker) -> None:
    assert not worker.spot_trainer.buffer.sequences
    assert worker.spot_trainer.trainer.steps == 0
    assert worker.spot_trainer.needs_warm_start


def test_the_drafter_does_not_learn_from_held_out_responses(monkeypatch):
    monkeypatch.setattr(SpotTrainer, "AVERAGE_EVERY", 0.05)  # seconds: then a short warm start is worth it
    check_nothing_learned(worker_after_rollout("test"))
    caught(check_nothing_learned, worker_after_rollout("test", learn=True))
    assert worker_after_rollout("train").spot_trainer.trainer.steps > 0


def check_warm_start_limit(monkeypatch):
    """A warm start lasts at most half as long as the rollouts of the steps that are left."""
    durations = []
    with monkeypatch.context() as patch:
        patch.setattr(SpotTrainer, "warm_start", lambda self, seconds, *rest: durations.append(seconds))
        patch.setattr(tlt.TLTWorker, "all_max", lambda self, seconds: 10.0)
        for steps in (1, 5, 100):
            worker_after_rollout("train", warm_start=120.0, steps=steps)
    assert durations == [0.0, 20.0, 30.0]  # a quarter of --warm-start at once


def test_a_warm_start_lasts_no_longer_than_the_steps_left_can_win_back(monkeypatch):
    check_warm_start_limit(monkeypatch)
    right = tlt.TLTWorker.make_engine

    def with_endless_steps(self, *args):
        engine = right(self, *args)
        self.steps_left = 1000
        return engine

    monkeypatch.setattr(tlt.TLTWorker, "make_engine", with_endless_steps)
    caught(check_warm_start_limit, monkeypatch)


def test_draft_tokens_of_the_eagle_drafter_are_counted_by_depth():
    """Also at the largest depth that strategies choose; those of other drafters do not count."""
    counting = CountingStrategy(Strategy(DraftPlan("eagle", 16)), WorkerTimer())
    assert counting.choose([]) == DraftPlan("eagle", 16)
    assert counting.timer.state == "speculative"
    for _ in range(2):
        counting.observe(RoundReport(3, DraftPlan("eagle", 16), 0.1, list(range(16, 0, -1)), list(range(15, -1, -1))))
    counting.observe(RoundReport(3, DraftPlan("ngram", 2), 0.1, [3, 3], [3, 3]))
    assert counting.drafted == [2 * n for n in range(16, 0, -1)]
    assert counting.accepted == [2 * n for n in range(15, -1, -1)]
    counting.reset_counts()
    assert sum(counting.drafted) == sum(counting.accepted) == 0


def check_rounds(worker: tlt.TLTWorker, held_out_learns: bool = False) -> None:
    """Two rollouts of a step are counted together, the evaluation before them is not, and the next step begins anew."""
    for rounds, learn in ((100, held_out_learns), (3, True), (5, True)):
        engine = SimpleNamespace(slots=4, stats=Stats(rounds=rounds))
        worker.rollout(engine, [Group(0, [1], [])], Sampling(), None, lambda n: None, learn=learn)
    assert worker.take_speculation_stats().rounds == 8
    assert worker.take_speculation_stats().rounds == 0


def test_the_rollouts_of_a_step_are_counted_together(monkeypatch):
    monkeypatch.setattr(tlt.TLTWorker, "my_part", lambda *args: [])
    for learns in (False, True):
        worker = single_worker(drafter="off", ngram=True)
        worker.make_engine(tiny(), {1}, 4, 0, None)
        if learns:
            caught(check_rounds, worker, held_out_learns=True)
        else:
            check_rounds(worker)


@pytest.mark.parametrize(
    "flags, methods", [({}, ["eagle"]), ({"ngram": True}, ["eagle", "ngram"]), ({"drafter": "off"}, [])]
)
def test_ngrams_draft_only_where_that_is_asked_for(flags, methods):
    assert list(single_worker(**flags).make_engine(tiny(), {1}, 4, 0, None).proposers) == methods


# ---------------------------------------------------------------- the queue


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
    hosted = Board.host()
    taken = []

    def worker():
        board = Board("127.0.0.1", hosted.port)
        while (i := board.add("next") - 1) < 200:
            taken.append(i)

    threads = [threading.Thread(target=worker) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(taken) == list(range(200))
    assert Board("", 0, hosted).add("next", 0) == 204


def listening_addresses(port: int) -> set[str]:
    """Return the addresses on which sockets of this machine listen on a port, as Linux lists them."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        local, state = line.split()[1], line.split()[3]
        address, number = local.split(":")
        if state == "0A" and int(number, 16) == port:
            found.add(address)
    return found


def check_only_this_host_can_reach(board: TCPStore):
    assert listening_addresses(board.port) == {"0100007F"}  # 127.0.0.1


@pytest.mark.skipif(not Path("/proc/net/tcp").exists(), reason="needs Linux")
def test_the_board_of_one_host_listens_on_the_loopback_address_only():
    check_only_this_host_can_reach(Board.host())
    check_only_this_host_can_reach(Board.host("localhost"))
    several_hosts = Board.host("10.0.0.1")
    caught(check_only_this_host_can_reach, several_hosts)
    assert Board("127.0.0.1", several_hosts.port).add("next") == 1


def test_no_worker_holds_more_than_a_fair_share_at_once():
    shares = [tlt.fair_share([16] * 16, workers, 256) for workers in (1, 2, 4, 8, 16, 64)]
    assert shares == [256, 128, 64, 32, 16, 16]
    assert tlt.fair_share([16] * 16, 2, 64) == 64
    assert tlt.fair_share([16] * 3, 2, 64) == 32
    rounds = dict.fromkeys(range(1, 10), (1.0, 1.0))
    assert len(bench.scale.simulate([[5] * 16] * 16, 8, 256, rounds)) == 8


class RecordingStrategy(Strategy):
    """Plain decoding. Records how many sequences run, and which groups were pulled and have begun."""

    def __init__(self):
        super().__init__()
        self.running: list[int] = []
        self.begun: set[int] = set()
        self.pulled: list[int] = []

    def groups(self):
        for i in range(5):
            self.pulled.append(i)
            yield Group(i, [5, 6, 7], [i * 10 + k for k in range(4)])

    def choose(self, running):
        self.running.append(len(running))
        self.begun.update(sequence.group.key for sequence in running)
        # a group that was pulled and waits here is one that another worker could have begun
        assert len(self.pulled) == len(self.begun)
        return self.plan


def test_the_engine_runs_at_most_max_running_sequences():
    engine = Engine(tiny(), {1}, slots=16, context=64)

    def tokens(strategy: RecordingStrategy) -> dict:
        responses = engine.generate(strategy.groups(), Sampling(max_new=12), strategy)
        return {(r.group, r.sample): r.tokens for r in responses}

    unlimited = RecordingStrategy()
    wanted = tokens(unlimited)
    assert max(unlimited.running) == 16
    engine.max_running = 4
    limited = RecordingStrategy()
    assert tokens(limited) == wanted
    assert max(limited.running) == 4


# ---------------------------------------------------------------- sharding


def updates(worker, config, folder):
    """Make an update on invented advantages, then, as a resumed run does, one from the saved states -> its figures, and
    the whole states of policy and optimizer.
    """
    model = tiny()
    groups = [Group(i, [5 + i, 9, 30], [7 * i + k for k in range(3)]) for i in range(5)]
    responses = list(Engine(model, {1}, 8, 60).generate(groups, Sampling(max_new=25)))
    responses.sort(key=lambda r: (r.group, r.sample))  # the same on every worker
    advantage = [((i * 7) % 5 - 2) / 2 for i in range(15)]
    states = None
    reference = worker.layout.place_reference(another_policy(), "cpu")
    for step in range(2):
        learner, _ = worker.layout.place(model, "cpu")
        if config.gradient_checkpointing:
            checkpoint_layers(learner)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2, fused=True)
        if step:
            checkpoints.set_optimizer_state_dict(learner, optimizer, states[1], options=checkpoints.WHOLE)
        stats = train_grpo.update(learner, reference, optimizer, responses, advantage, step, config, worker)
        moments = checkpoints.get_optimizer_state_dict(learner, optimizer, options=checkpoints.WHOLE)
        states = checkpoints.whole_weights(learner), moments
        if worker.rank == 0:
            torch.save(states, folder / "states")
        worker.gather(0)
        states = torch.load(folder / "states", weights_only=True)
        model = tiny()
        model.load_state_dict(states[0])
    return stats, states


# with truncated importance sampling, all responses are scored before the first update
UPDATES = {"device": "cpu", "minibatches": 2, "micro_tokens": 150, "tis_cap": 2.0, "kl": 0.1}


def another_policy():
    """Return a policy to be the reference."""
    model = tiny()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.95)
    return model


def sharded(rank: int, port: int, folder: Path) -> None:
    """Run a worker process: write the result of the right code, and of a variant that sums gradients as means."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # with gradient checkpointing, and the head in slices
    config = TLTConfig(**UPDATES, shard=True, gradient_checkpointing=True)
    logprobs.SLICE = 118 * 7
    worker = tlt.TLTWorker(config)
    reference = worker.layout.place_reference(another_policy(), "cpu")
    here = sum(p.to_local().numel() for p in reference.parameters())
    assert here < 0.6 * sum(p.numel() for p in reference.parameters())  # a reference is spread, too
    from torch.distributed.fsdp import FSDPModule

    for name in ("right", "broken"):
        result = updates(worker, config, folder)
        if rank == 0:
            torch.save(result, folder / name)
        FSDPModule.set_gradient_divide_factor = lambda self, factor: None  # from now on it is broken
    torch.distributed.destroy_process_group()


def check_sharded(replicated: tuple, folder: Path, name: str) -> None:
    stats, (policy, moments) = replicated
    their_stats, (theirs, their_moments) = torch.load(folder / name, weights_only=True)
    assert policy.keys() == theirs.keys()
    assert all(torch.allclose(policy[name], theirs[name], atol=1e-5) for name in policy)
    a = moments["state"]
    b = their_moments["state"]
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name]["exp_avg"], b[name]["exp_avg"], atol=1e-6) for name in a)
    assert all(abs(stats[name] - their_stats[name]) < 1e-4 for name in stats)


def test_sharded_and_replicated_updates_agree(tmp_path):
    torch.multiprocessing.spawn(sharded, (free_port(), tmp_path), nprocs=2)
    config = train_grpo.Config(**UPDATES)
    replicated = updates(Worker(config), config, tmp_path)
    check_sharded(replicated, tmp_path, "right")
    caught(check_sharded, replicated, tmp_path, "broken")


def test_every_state_has_a_character_of_its_own():
    characters = [character for character, _ in STATES.values()]
    assert len(set(characters)) == len(STATES)
