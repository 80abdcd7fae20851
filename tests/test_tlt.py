"""The workers: mistakes, spare time, the queue, sharding. Whole runs: test_runs.py; what dies: test_harm.py."""

import os
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import LEARN, caught, finish, here, launch, tiny

import bench.scale
import spot
import tlt
import train_grpo
from drafter import Drafter
from parts.cli import UserError
from parts.engine.interfaces import DraftPlan, Group, RoundReport, Stats, Strategy
from parts.engine.sampling import Sampling
from parts.running import checkpoints
from parts.running import launcher as supervise
from parts.running.launcher import free_port
from parts.running.timers import STATES, WorkerTimer
from parts.training import logprobs
from parts.training.logprobs import checkpoint_layers
from rollout import Engine
from spot import SpotTrainer, train_until
from tlt import Board, TLTConfig
from train_grpo import Worker

# ---------------------------------------------------------------- when something goes wrong


def test_a_mistake_is_one_line_before_any_worker_starts(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(tlt, "spawn", lambda *args: pytest.fail("workers were started"))
    for flags, words in (
        (["--max-new", 5000], "context of 256"),
        (["--task", "typo"], "--task typo"),
        (["--prompt-style", "chat"], "no chat template"),
        (["--resume"], "no checkpoint"),
    ):
        with pytest.raises(UserError, match=words):
            here(tlt.main, model_folder, tmp_path / "run", "--workers", 2, *flags)
    assert not (tmp_path / "run").exists()


def test_a_mistake_in_a_worker_is_one_line_and_status_2(able, tmp_path):
    """One that the parent cannot see: the drafter to start from is of another policy."""
    Drafter(tiny()).save(tmp_path / "drafter")
    flags = ("--workers", 2, "--drafter-from", tmp_path / "drafter", "--steps", 1)
    text = finish(launch(able, tmp_path / "run", *LEARN, *flags), 2)
    assert len(text.strip().splitlines()) == 1
    assert "size mismatch" in text


def test_who_counts_as_hung():
    pulse = supervise.Heartbeat(3)
    for rank, state in enumerate(("idle", "checkpoint", "rollout")):
        pulse.tell(rank, state)
        pulse.heard[rank] -= 100 * (rank < 2)
    assert pulse.silent(10) == []  # 0 waits, because writing a checkpoint takes long
    pulse.state[1] = pulse.NAMES.index("update")
    assert pulse.silent(10) == [0, 1]
    assert pulse.silent(1000) == []


# ---------------------------------------------------------------- drafter training in spare time


class Scene:
    """A fake clock, a fake Board and a fake drafter, on which micro-steps and waits take the time that they say."""

    def __init__(self, ends, micro_step: float, rows: bool = True):
        self.now = 0.0
        self.ends = ends
        self.micro_step = micro_step
        self.states: list[str] = []
        self.learns = rows

    def enter(self, state: str) -> None:
        self.states.append(state)

    def step(self) -> None:
        self.now += self.micro_step

    def responses(self) -> int:
        return sum(end <= self.now for end in self.ends)


def check_trains_until_the_last_is_done(over, ends=(1.0, 2.0, 7.5), micro_step=0.4):
    """One worker is done at time 0; the others' last responses come at `ends`. It has to train until the last, and not
    one micro-step longer.
    """
    scene = Scene(ends, micro_step)
    train_until(lambda: over(scene), scene, scene)
    assert max(ends) <= scene.now < max(ends) + micro_step
    assert set(scene.states) == {"drafter", "idle"}
    assert scene.states[-1] == "idle"
    assert scene.states.count("idle") == 1


def test_an_idle_worker_trains_until_the_last_response():
    check_trains_until_the_last_is_done(lambda scene: scene.responses() >= 3)
    # stops as soon as ANY worker has finished
    caught(check_trains_until_the_last_is_done, lambda scene: scene.responses() >= 1)
    # looks at the Board now and then only
    caught(check_trains_until_the_last_is_done, lambda scene: scene.responses() >= 3 and scene.now % 2 < 0.4)


@pytest.mark.parametrize("drafter", ["none", "nothing to learn from"])
def test_without_work_it_waits(drafter, monkeypatch):
    scene = Scene([0.02], 0.4, rows=False)

    def sleep(seconds: float) -> None:
        scene.now += seconds

    monkeypatch.setattr(spot.time, "sleep", sleep)
    train_until(lambda: scene.responses() >= 1, scene, None if drafter == "none" else scene)
    assert set(scene.states) == {"idle"}
    assert 0.02 <= scene.now < 0.03


def make_spot(rank: int = 0, **changes) -> SpotTrainer:
    return SpotTrainer(tiny(), TLTConfig(**{"out": "nowhere", "model": "base/chain/refit", **changes}), rank, {1})


def check_averages_by_steps(average):
    """Three workers with 1, 3 and 0 steps: all end with (1 * first + 3 * second) / 4, and keep their optimizers."""
    spots = [make_spot(rank) for rank in range(3)]
    for value, (spot_, steps) in enumerate(zip(spots, (1, 3, 0)), 1):
        spot_.steps_since_average = steps
        for w in [*spot_.learner.parameters(), *spot_.trainer.average]:
            w.data.fill_(float(value))
    sums = {}
    barrier = threading.Barrier(3)
    optimizers = [id(spot_.trainer.optimizer) for spot_ in spots]

    def all_reduce(rank: int):
        def sum_up(tensors):
            sums[rank] = [t.clone() for t in tensors]
            barrier.wait()
            for i, t in enumerate(tensors):
                t.copy_(sum(sums[other][i] for other in range(3)))
            barrier.wait()

        return sum_up

    threads = [threading.Thread(target=average, args=(spot_, all_reduce(rank))) for rank, spot_ in enumerate(spots)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for spot_ in spots:
        for w in [*spot_.learner.parameters(), *spot_.trainer.average]:
            assert torch.allclose(w, torch.full_like(w, 1.75))
        assert spot_.steps_since_average == 0
    assert optimizers == [id(spot_.trainer.optimizer) for spot_ in spots]


def test_drafters_are_averaged_by_steps():
    check_averages_by_steps(SpotTrainer.average)

    def unweighted(spot_, all_reduce):
        spot_.steps_since_average = 1
        SpotTrainer.average(spot_, all_reduce)

    caught(check_averages_by_steps, unweighted)


def test_nobody_trained_changes_nothing():
    spot_ = make_spot()
    before = [p.clone() for p in spot_.learner.parameters()]
    spot_.average(lambda tensors: None)
    assert all(torch.equal(a, b) for a, b in zip(before, spot_.learner.parameters()))


def test_a_run_that_goes_on_takes_the_drafter_of_its_checkpoint(tmp_path):
    config = TLTConfig(out="nowhere", model="base/chain/refit")
    trained = Drafter(tiny())
    trained.save(tmp_path / "drafter")
    spot_ = SpotTrainer(tiny(), config, 0, {1}, checkpoint=tmp_path)
    assert not spot_.needs_warm_start
    for a, b in zip(spot_.learner.parameters(), trained.parameters(), strict=True):
        assert torch.allclose(a, b)
    assert make_spot().needs_warm_start
    assert SpotTrainer(tiny(), config, 0, {1}, checkpoint=tmp_path / "without").needs_warm_start


# ---------------------------------------------------------------- evaluations teach nobody


def team_of_one(monkeypatch, **settings) -> tlt.TLTWorker:
    """Without a process group."""

    def begin(self, config):
        Worker.__init__(self, config)
        self.board = Board("", 0, Board.host())
        self.rollouts = 0
        self.spot = None

    monkeypatch.setattr(tlt.TLTWorker, "__init__", begin)
    return tlt.TLTWorker(TLTConfig(device="cpu", model="base/chain/refit", **settings))


def rollout_of(split: str, monkeypatch, learn: bool | None = None) -> tlt.TLTWorker:
    """A worker of one that has made one rollout on a split."""
    worker = team_of_one(monkeypatch, warm_start=0.2, prompts=1)
    engine = worker.engine(tiny(), {1}, 8, 0)
    engine.reserve(60)
    groups = [Group((split, i), [5 + i, 9, 30], [7 * i + k for k in range(4)]) for i in range(3)]
    learn = split == "train" if learn is None else learn
    worker.rollout(engine, groups, Sampling(max_new=25), lambda r: None, lambda n: None, learn=learn)
    return worker


def check_teaches_nobody(worker: tlt.TLTWorker) -> None:
    assert not worker.spot.buffer.sequences
    assert worker.spot.trainer.steps == 0
    assert worker.spot.needs_warm_start


def test_held_out_responses_teach_nobody(monkeypatch):
    check_teaches_nobody(rollout_of("test", monkeypatch))
    caught(check_teaches_nobody, rollout_of("test", monkeypatch, learn=True))
    assert rollout_of("train", monkeypatch).spot.trainer.steps > 0


def test_what_is_counted_for_the_metrics():
    """By depth, as deep as strategies may draft; guesses of other drafters do not count."""
    watched = tlt.CountingStrategy(Strategy(DraftPlan("eagle", 16)), WorkerTimer())
    assert watched.choose([]) == DraftPlan("eagle", 16)
    assert watched.timer.state == "speculative"
    for _ in range(2):
        watched.observe(RoundReport(3, DraftPlan("eagle", 16), 0.1, list(range(16, 0, -1)), list(range(15, -1, -1))))
    watched.observe(RoundReport(3, DraftPlan("ngram", 2), 0.1, [3, 3], [3, 3]))
    assert watched.tried == [2 * n for n in range(16, 0, -1)]
    assert watched.right == [2 * n for n in range(15, -1, -1)]
    watched.forget()
    assert sum(watched.tried) == sum(watched.right) == 0


def check_rounds(worker: tlt.TLTWorker, held_out_learns: bool = False) -> None:
    """Two rollouts of a step are counted together, the evaluation before it is not, and the next step begins anew."""
    for rounds, learn in ((100, held_out_learns), (3, True), (5, True)):
        engine = SimpleNamespace(slots=4, stats=Stats(rounds=rounds))
        worker.rollout(engine, [Group(0, [1], [])], Sampling(), None, lambda n: None, learn=learn)
    assert worker.notes().rounds == 8
    assert worker.notes().rounds == 0


def test_the_rollouts_of_a_step_are_counted_together(monkeypatch):
    monkeypatch.setattr(tlt.TLTWorker, "__init__", lambda self, config: Worker.__init__(self, config))
    monkeypatch.setattr(tlt.TLTWorker, "generate", lambda *args: [])
    for learns in (False, True):
        worker = tlt.TLTWorker(TLTConfig(device="cpu", drafter="off", ngram=True))
        hosted = Board.host()
        worker.board = Board("", 0, hosted)
        worker.rollouts = 0
        worker.spot = None
        worker.engine(tiny(), {1}, 4, 0)
        if learns:
            caught(check_rounds, worker, held_out_learns=True)
        else:
            check_rounds(worker)


@pytest.mark.parametrize(
    "flags, kinds", [({}, ["eagle"]), ({"ngram": True}, ["eagle", "ngram"]), ({"drafter": "off"}, [])]
)
def test_ngrams_draft_only_where_they_are_asked_for(flags, kinds, monkeypatch):
    assert list(team_of_one(monkeypatch, **flags).engine(tiny(), {1}, 4, 0).proposers) == kinds


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


def test_nobody_takes_more_than_a_fair_share_at_once():
    shares = [tlt.fair_share([16] * 16, workers, 256) for workers in (1, 2, 4, 8, 16, 64)]
    assert shares == [256, 128, 64, 32, 16, 16]
    assert tlt.fair_share([16] * 16, 2, 64) == 64
    assert tlt.fair_share([16] * 3, 2, 64) == 32
    rounds = dict.fromkeys(range(1, 10), (1.0, 1.0))
    assert len(bench.scale.simulate([[5] * 16] * 16, 8, 256, rounds)) == 8


class Watcher(Strategy):
    """Plain decoding; notes how many rows live, and which groups."""

    def __init__(self):
        super().__init__()
        self.rows: list[int] = []
        self.response_prefix_len: set[int] = set()
        self.drawn: list[int] = []

    def groups(self):
        for i in range(5):
            self.drawn.append(i)
            yield Group(i, [5, 6, 7], [i * 10 + k for k in range(4)])

    def choose(self, running):
        self.rows.append(len(running))
        self.response_prefix_len.update(row.group.key for row in running)
        assert len(self.drawn) == len(
            self.response_prefix_len
        )  # a group that waits here is one that another worker could have begun
        return self.draft


def test_the_engine_holds_back_what_it_may_not_hold():
    engine = Engine(tiny(), {1}, slots=16, context=64)

    def tokens(watcher: Watcher) -> dict:
        responses = engine.generate(watcher.groups(), Sampling(max_new=12), watcher)
        return {(r.group, r.sample): r.tokens for r in responses}

    free = Watcher()
    wanted = tokens(free)
    assert max(free.rows) == 16
    engine.max_running = 4
    scale_and_filter = Watcher()
    assert tokens(scale_and_filter) == wanted
    assert max(scale_and_filter.rows) == 4


# ---------------------------------------------------------------- sharding


def updates(worker, config, folder):
    """An update on made-up advantages, then, as a run that is resumed, one from the saved states -> statistics, whole
    states of policy and optimizer.
    """
    model = tiny()
    groups = [Group(i, [5 + i, 9, 30], [7 * i + k for k in range(3)]) for i in range(5)]
    responses = list(Engine(model, {1}, 8, 60).generate(groups, Sampling(max_new=25)))
    responses.sort(key=lambda r: (r.group, r.sample))  # the same on every worker
    advantage = [((i * 7) % 5 - 2) / 2 for i in range(15)]
    states = None
    for step in range(2):
        learner, _ = worker.layout.place(model, "cpu")
        if config.gradient_checkpointing:
            checkpoint_layers(learner)
        optimizer = torch.optim.AdamW(learner.parameters(), lr=1e-2, fused=True)
        if step:
            checkpoints.set_optimizer_state_dict(learner, optimizer, states[1], options=checkpoints.WHOLE)
        stats = train_grpo.update(learner, None, optimizer, responses, advantage, step, config, worker)
        moments = checkpoints.get_optimizer_state_dict(learner, optimizer, options=checkpoints.WHOLE)
        states = checkpoints.whole_weights(learner), moments
        if worker.rank == 0:
            torch.save(states, folder / "states")
        worker.gather(0)
        states = torch.load(folder / "states", weights_only=True)
        model = tiny()
        model.load_state_dict(states[0])
    return stats, states


# with the correction all responses are scored before the first update
UPDATES = {"device": "cpu", "minibatches": 2, "micro_tokens": 150, "tis_cap": 2.0}


def sharded(rank: int, port: int, folder: Path, broken: bool) -> None:
    """A worker process."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    # with layers that are computed twice, and the head in slices
    config = TLTConfig(**UPDATES, shard=True, gradient_checkpointing=True)
    logprobs.SLICE = 118 * 7
    worker = tlt.TLTWorker(config)
    if broken:  # means instead of sums
        from torch.distributed.fsdp import FSDPModule

        FSDPModule.set_gradient_divide_factor = lambda self, factor: None
    result = updates(worker, config, folder)
    if rank == 0:
        torch.save(result, folder / f"broken {broken}")
    torch.distributed.destroy_process_group()


def check_sharded(folder: Path, broken: bool) -> None:
    torch.multiprocessing.spawn(sharded, (free_port(), folder, broken), nprocs=2)
    config = train_grpo.Config(**UPDATES)
    stats, (policy, moments) = updates(Worker(config), config, folder)
    their_stats, (theirs, their_moments) = torch.load(folder / f"broken {broken}", weights_only=True)
    assert policy.keys() == theirs.keys()
    assert all(torch.allclose(policy[name], theirs[name], atol=1e-5) for name in policy)
    a = moments["state"]
    b = their_moments["state"]
    assert a.keys() == b.keys()
    assert all(torch.allclose(a[name]["exp_avg"], b[name]["exp_avg"], atol=1e-6) for name in a)
    assert all(abs(stats[name] - their_stats[name]) < 1e-4 for name in stats)


def test_sharded_and_replicated_updates_agree(tmp_path):
    check_sharded(tmp_path, False)
    caught(check_sharded, tmp_path, True)


def test_every_state_has_a_mark_and_a_colour():
    marks = [mark for mark, _ in STATES.values()]
    assert len(set(marks)) == len(STATES)
