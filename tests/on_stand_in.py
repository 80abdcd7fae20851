"""The GPU path on a device that stands for a GPU (stand_in.py): the same tokens, and few waits of the host.

`test_stand_in.py` runs this file in a process of its own, because torch must know the device before its first backward.
By hand: python -m pytest tests/on_stand_in.py

Waits that are allowed, and counted here:

    a rollout       one a round, for its tokens (`read_back`); two for each finished response (`remove`): its
                    log-probabilities and features leave the device; none inside what a CUDA graph would record
    an update       two an optimizer step, however many micro-batches it has: the norm of the gradient, and the figures
    a drafter step  one, for its loss
    a checkpoint    one for each tensor that is written, and a few for the check that all weights are finite
"""

import gc
import random
import sys
from collections import Counter
from functools import partial

import pytest
import stand_in
import torch
from conftest import LEARN, caught, rows_of, run_in_process, tiny
from helpers import (
    SAMPLINGS,
    RandomPlans,
    by_name,
    check_equal,
    filled_buffer,
    fixed,
    groups_of,
    make_engine,
    responses_of,
    trained_drafter,
)
from stand_in import HostMeetsDevice, WaitInRecording, waits
from test_grpo import CONFIG, NormRecorder, SimulatedWorker, advantage_of, close, make_responses
from transformers import AutoModelForCausalLM

import drafter
import generate
import tlt
import train_grpo
from drafter import Drafter, DrafterTrainer, EagleProposer
from parts.engine import acceptance, forward, kv_cache
from parts.engine.interfaces import DraftPlan, Group, Response, Strategy
from parts.engine.model_loading import cast_weights
from parts.engine.sampling import Sampling
from parts.files import ROOT
from parts.running import checkpoints, demo
from parts.running.timers import WorkerTimer
from parts.training import micro_batches
from parts.training.layouts import LoRALayout, trainable_parameters
from parts.training.logprobs import autocast, checkpoint_layers, forward_bytes, token_scores, update_mode
from parts.training.update_stats import UpdateStats
from rollout import Engine
from spot import SpotTrainer
from strategy import Goodput, plans_for
from tasks import Chain
from test_time import solver as solver_module
from test_time.strategies import beam

stand_in.register()  # before the first backward of this process


@pytest.fixture(autouse=True)
def device(monkeypatch):
    stand_in.install(monkeypatch)


def moved(model) -> torch.nn.Module:
    return model.to(stand_in.NAME)


def policy_and_drafter(draft_vocab: int = 0) -> tuple[torch.nn.Module, Drafter]:
    """Return a policy and a drafter that knows it a little, both on the host."""
    model = tiny()
    made = trained_drafter(model)
    made.draft_vocab = torch.arange(2, 2 + draft_vocab, dtype=torch.int32) if draft_vocab else None
    return model, made


# ---------------------------------------------------------------- rollouts

MODES = {
    "plain": {"strategy": partial(fixed, "eagle", 0)},
    "chain": {"strategy": partial(fixed, "eagle", 4)},
    "ngram": {"strategy": partial(fixed, "ngram", 3), "recorded": False},
    "mixed": {"strategy": partial(RandomPlans, 1)},
    "goodput": {"strategy": lambda: Goodput(plans_for(["eagle"]))},
    "greedy": {"strategy": partial(fixed, "eagle", 4), "sampling": SAMPLINGS[1]},
    "top-k and top-p": {"strategy": partial(fixed, "eagle", 4), "sampling": SAMPLINGS[2]},
    "cut vocabulary": {"strategy": partial(fixed, "eagle", 4), "draft_vocab": 60},
    "large vocabulary": {"strategy": partial(fixed, "eagle", 4), "max_logits": 500},
}


def rollout_of(model, made: Drafter, strategy, sampling, max_logits=None) -> tuple[dict, Engine]:
    engine = make_engine(model, made, slots=6)
    engine.max_logits = max_logits or engine.max_logits
    waits.clear()
    return by_name(engine.generate(groups_of(6, random.Random(3)), sampling, strategy)), engine


def check_rollout(
    strategy, sampling=SAMPLINGS[0], draft_vocab: int = 0, max_logits: int | None = None, recorded=True
) -> None:
    """On the device a rollout makes the tokens that it makes on the host, and waits once a round."""
    model, made = policy_and_drafter(draft_vocab)
    wanted, _ = rollout_of(model, made, strategy(), sampling, max_logits)
    on_device = Drafter(moved(model))
    on_device.load_state_dict(made.state_dict())
    on_device.draft_vocab = made.draft_vocab
    responses, engine = rollout_of(model, on_device, strategy(), sampling, max_logits)
    check_equal(responses, wanted)
    counted = Counter(waits)
    assert counted.pop("rollout.py read_back", 0) == engine.stats.rounds
    assert counted.pop("rollout.py remove", 0) == 2 * len(responses)
    counted.pop("fused_layers.py fuse", None)  # the drafter's layer, before the first rollout
    assert not counted
    assert bool(engine.graphs.replays) is recorded


@pytest.mark.parametrize("mode", MODES)
def test_rollouts(mode):
    check_rollout(**MODES[mode])


def test_a_rule_that_needs_whole_logits():
    model, made = policy_and_drafter()
    for rule in (acceptance.Ratio, partial(acceptance.Tree, width=2)):
        engine = make_engine(moved(model), made.to(stand_in.NAME), slots=6, rule=rule)
        assert len(list(engine.generate(groups_of(4, random.Random(3)), SAMPLINGS[0], fixed("eagle", 3))))


def test_a_mask_on_the_host_is_caught(monkeypatch):
    right = kv_cache.attention_inputs

    def on_the_host(*args):
        positions, mask, window = right(*args)
        return positions, mask.cpu(), window

    for module in (forward, drafter):
        monkeypatch.setattr(module, "attention_inputs", on_the_host)
    with pytest.raises(HostMeetsDevice):
        check_rollout(**MODES["chain"])


def test_a_read_inside_a_round_is_caught(monkeypatch):
    right = Engine.commit

    def with_a_read(self, verification, index, sampling):
        verification.accepted.max().item()
        return right(self, verification, index, sampling)

    monkeypatch.setattr(Engine, "commit", with_a_read)
    with pytest.raises(WaitInRecording):
        check_rollout(**MODES["chain"])


def test_sequences_read_one_by_one_are_caught(monkeypatch):
    def one_by_one(self, outcome, k):
        host = [row.tolist() for row in outcome][: len(self.running)]
        return [x[1] for x in host], [x[2 : 2 + x[0]] for x in host], [x[len(x) - k :] for x in host]

    monkeypatch.setattr(Engine, "read_back", one_by_one)
    caught(check_rollout, **MODES["chain"])


# ---------------------------------------------------------------- updates

UPDATES = {
    "all weights": {},
    "small micro-batches": {"micro_tokens": 60},
    "kl": {"kl": 0.1},
    "several updates, corrected": {"minibatches": 2, "tis_cap": 2.0},
    "lora": {"lora_rank": 4},
    "gradient checkpointing": {"gradient_checkpointing": True},
}


def update_of(device: str, responses, changes: dict, monkeypatch) -> tuple[list, dict]:
    """Make an update on that device, in bfloat16 -> its gradient, on the host, and its figures."""
    config = train_grpo.Config(**{**vars(CONFIG), "bf16": True, "lr": 0.0, **changes})
    monkeypatch.setattr(train_grpo, "pick_device", lambda name: device)
    worker = SimulatedWorker(config, 0, 1)
    model, _ = (LoRALayout(config) if config.lora_rank else worker.layout).place(tiny(), device)
    if config.gradient_checkpointing:
        checkpoint_layers(model)
    for p in trainable_parameters(model):
        p.grad = torch.zeros_like(p)
    reference = tiny().to(device) if config.kl else None
    waits.clear()
    stats = train_grpo.update(
        model, reference, Unchanging(model), responses, advantage_of(responses), 0, config, worker
    )
    counted = Counter(waits)
    return [g.cpu() for g in worker.gradients], stats, counted


class Unchanging(NormRecorder):
    """An optimizer that changes nothing and reads nothing."""

    def step(self):
        pass


def check_update(monkeypatch, changes: dict) -> None:
    """On the device an update has the gradient that it has on the host, and two waits an optimizer step."""
    responses = make_responses(tiny())
    wanted, figures, _ = update_of("cpu", responses, changes, monkeypatch)
    got, on_device, counted = update_of(stand_in.NAME, responses, changes, monkeypatch)
    assert close(wanted, got, 0.1)
    assert on_device["entropy"] == pytest.approx(figures["entropy"], rel=0.05)
    steps = changes.get("minibatches", 1)
    assert counted.pop("layouts.py sum_and_clip", 0) == steps
    assert counted.pop("update_stats.py read", 0) == steps
    assert not counted


@pytest.mark.parametrize("name", UPDATES)
def test_updates(name, monkeypatch):
    check_update(monkeypatch, UPDATES[name])


def test_figures_read_for_each_micro_batch_are_caught(monkeypatch):
    right = UpdateStats.add

    def with_a_read(self, loss, *rest):
        right(self, loss, *rest)
        self.loss = self.loss.item()

    monkeypatch.setattr(UpdateStats, "add", with_a_read)
    caught(check_update, monkeypatch, UPDATES["small micro-batches"])


def test_weights_of_tokens_on_the_host_are_caught(monkeypatch):
    right = micro_batches.per_token
    monkeypatch.setattr(train_grpo, "per_token", lambda batch, device: right(batch, "cpu"))
    with pytest.raises(HostMeetsDevice):
        check_update(monkeypatch, {})


# ---------------------------------------------------------------- the drafter


def check_drafter_steps() -> None:
    """A drafter step waits once, and learns as on the host."""
    losses = {}
    for name in ("cpu", stand_in.NAME):
        model = tiny()
        buffer = filled_buffer(responses_of(model))
        torch.manual_seed(1)
        trainer = DrafterTrainer(Drafter(model.to(name)), tokens=64)
        trainer.drafter.draft_vocab = torch.arange(60, dtype=torch.int32)
        waits.clear()
        torch.manual_seed(2)
        losses[name] = [trainer.step(buffer)[0] for _ in range(5)]
    assert dict(waits) == {"drafter.py step": 5}
    assert losses["cpu"] == pytest.approx(losses[stand_in.NAME], rel=1e-3)


def test_drafter_steps(monkeypatch):
    check_drafter_steps()
    right = drafter.drafter_loss

    def with_a_mask(made, batch, **settings):
        mask = torch.zeros_like(batch.positions[0], dtype=torch.bool)
        mask[batch.learned] = True
        return right(made, batch._replace(learned=mask), **settings)

    monkeypatch.setattr(drafter, "drafter_loss", with_a_mask)
    caught(check_drafter_steps)


def test_the_warm_start():
    model = moved(tiny())
    config = tlt.TLTConfig(out="nowhere", model="base/chain/refit", warm_start=0.2)
    spot_trainer = SpotTrainer(model, config, 0, {1})
    responses = responses_of(model)
    for response in responses:
        spot_trainer.buffer.add(response)
    spot_trainer.count_tokens(responses)
    spot_trainer.warm_start(0.2, WorkerTimer(), lambda tensors: None)
    assert spot_trainer.trainer.steps > 0


# ---------------------------------------------------------------- memory, of the models of the GPU demo


def demo_model(number: int) -> torch.nn.Module:
    """Return a model of demo.MODELS on the device, in float32."""
    with torch.device("meta"):
        settings = {"dtype": torch.float32, "attn_implementation": "slots"}
        model = AutoModelForCausalLM.from_config(demo.MODELS[number].config, **settings)
    return model.eval().to(stand_in.NAME)


def taken_now() -> int:
    gc.collect()
    return stand_in.memory.restart()


class AnyTokens(Engine):
    """An engine whose rounds emit so many tokens that speculation, which begins behind the first round, has to catch up
    with hundreds; what they are does not matter.
    """

    def read_back(self, outcome, k):
        n = len(self.running)
        return [k] * n, [[7] * 300] * n, [[7] * k] * n


def rollout_bytes(number: int, rows: int) -> tuple[int, int, int]:
    """Roll out so many sequences of the demo's length -> bytes that the engine allocates, bytes that it takes at most,
    and bytes that it plans for slots.
    """
    model = cast_weights(demo_model(number), torch.bfloat16)
    made = Drafter(model)
    before = taken_now()
    context = demo.PROMPT + demo.MAX_NEW
    settings = {"slots": rows, "context": context, "keep_hidden": True, "proposers": {"eagle": EagleProposer(made)}}
    engine = AnyTokens(model, [5], **settings)
    allocated = taken_now() - before
    prompt = [7] * demo.PROMPT
    groups = [Group(i, prompt, [8 * i + k for k in range(8)]) for i in range(rows // 8)]
    plans = iter([DraftPlan()])
    strategy = Strategy()
    strategy.choose = lambda running: next(plans, DraftPlan("eagle", 4))
    assert len(list(engine.generate(groups, Sampling(max_new=demo.MAX_NEW), strategy))) == rows
    return allocated, stand_in.memory.most - before, rows * engine.slot_bytes(engine.tokens.shape[1])


def update_bytes(number: int, tokens: int) -> tuple[int, int]:
    """Return what forward and backward of so many tokens take beside weights and gradients, and what is planned."""
    model = demo_model(number)
    checkpoint_layers(model)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    length = demo.MAX_NEW - demo.PROMPT
    responses = []
    for i in range(tokens // demo.MAX_NEW):
        responses.append(Response(i, 0, [7] * demo.PROMPT, [8] * length, torch.zeros(length), True))
    before = taken_now()
    with update_mode(model), autocast(stand_in.NAME, True):
        logp, _ = token_scores(model, responses, 1.0)
    logp.sum().backward()
    return stand_in.memory.most - before, forward_bytes(model, tokens)


def check_rollout_memory(number: int, rows: int = demo.ROWS) -> None:
    """What a rollout takes is planned: slots, the drafter's copy of the head, and 1 GB for a round."""
    config = demo.MODELS[number].config
    allocated, most, slots = rollout_bytes(number, rows)
    head = 2 * config.vocab_size * config.hidden_size
    print(f"{config.hidden_size} wide, {rows} rows: {slots / 1e9:.2f} GB planned, {allocated / 1e9:.2f} taken")
    print(f"a round: {demo.ROUND_BYTES / 1e9:.2f} GB planned, {(most - allocated - head) / 1e9:.2f} taken")
    assert 0.9 * slots < allocated < slots
    assert most < slots + head + demo.ROUND_BYTES


def check_update_memory(number: int, tokens: int) -> None:
    """What an update takes is planned, and not more than four times."""
    counted, planned = update_bytes(number, tokens)
    width = demo.MODELS[number].config.hidden_size
    print(f"{width} wide, an update of {tokens} tokens: {planned / 1e9:.2f} GB planned, {counted / 1e9:.2f} taken")
    assert planned / 4 < counted < planned


@pytest.mark.parametrize("number", [0, 3])
def test_memory_is_planned(number, monkeypatch):
    stand_in.without_values(monkeypatch)
    check_rollout_memory(number)
    check_update_memory(number, 16384 if number else 2048)


def test_catching_up_takes_no_more_memory_with_more_rows(monkeypatch):
    stand_in.without_values(monkeypatch)
    check_rollout_memory(3, rows=96)
    monkeypatch.setattr(EagleProposer, "ALL_PIECES", 1 << 20)
    caught(check_rollout_memory, 3, rows=96)


# ---------------------------------------------------------------- whole programs


class Joined:
    """What accelerate says to the only worker, on the device."""

    process_index = 0
    num_processes = 1
    is_local_main_process = True
    device = torch.device(f"{stand_in.NAME}:0")

    def end_training(self) -> None:
        pass


def on_device(monkeypatch) -> None:
    """From now on programs take the stand-in for their device."""
    monkeypatch.setattr(tlt, "join", lambda config: Joined())
    for module in (train_grpo, drafter, generate, solver_module):
        monkeypatch.setattr(module, "pick_device", lambda name="auto": stand_in.NAME)


RUN = (*LEARN, "--workers", 1, "--prompts", 3, "--strategy", 4, "--eval-every", 0, "--actor-dtype", "float32")
WITH_DRAFTER = ("--drafter-from", ROOT / "base/chain/drafter")


def run_and_resume(chain_policy, out, monkeypatch) -> None:
    """Make a run on the device that stops after its first step and is resumed."""
    with monkeypatch.context() as patch:
        on_device(patch)
        run_in_process(tlt.main, chain_policy, out, *RUN, "--steps", 1, *WITH_DRAFTER)
        run_in_process(tlt.main, chain_policy, out, *RUN, "--steps", 2, "--resume")


def test_a_run_and_its_resume(chain_policy, tmp_path, monkeypatch):
    """They sample and learn as a run on the host."""
    run_in_process(tlt.main, chain_policy, tmp_path / "host", *RUN, "--steps", 2, *WITH_DRAFTER)
    run_and_resume(chain_policy, tmp_path / "device", monkeypatch)
    host, device = rows_of(tmp_path / "host"), rows_of(tmp_path / "device")
    assert [row["step"] for row in device] == [1, 2]
    assert device[0]["tokens"] == host[0]["tokens"]
    for ours, theirs in zip(device, host):
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.1)
        assert ours["drafter"]["steps"] > 0
        assert ours["speculation"]["share"] == 1


def test_moments_left_on_the_host_after_a_resume_are_caught(chain_policy, tmp_path, monkeypatch):
    right = checkpoints.load

    def left_on_the_host(checkpoint, model, optimizer):
        result = right(checkpoint, model, optimizer)
        for state in optimizer.state.values():
            state["exp_avg"] = state["exp_avg"].cpu()
        return result

    monkeypatch.setattr(checkpoints, "load", left_on_the_host)
    with pytest.raises(HostMeetsDevice):
        run_and_resume(chain_policy, tmp_path, monkeypatch)


def run_command(monkeypatch, main, *argv) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", ["program", *map(str, argv)])
        main()


def test_generate(monkeypatch, capsys):
    policy = ("--model", ROOT / "base/chain", "--drafter", ROOT / "base/chain/drafter", "--prompt", "7:cfa=")
    texts = []
    for _ in range(2):
        run_command(monkeypatch, generate.main, *policy, "--max-new", 24, "--samples", 2)
        texts.append(capsys.readouterr().out)
        on_device(monkeypatch)
    assert texts[0] == texts[1]
    assert waits["rollout.py read_back"]


def test_drafter_from_rollouts(model_folder, monkeypatch, tmp_path, capsys):
    on_device(monkeypatch)
    policy = ("--model", model_folder, "--out", tmp_path)
    run_command(monkeypatch, drafter.main, *policy, "--prompts", 1, "--seconds", 0.3, "--max-new", 24)
    assert (tmp_path / "drafter.safetensors").exists()
    assert "after:" in capsys.readouterr().out


def test_a_search(monkeypatch):
    problems = [Chain().problem("test", i) for i in range(3)]
    attempts = []
    for _ in range(2):
        solver = solver_module.Solver(ROOT / "base/chain", Chain(), slots=16)
        solutions = solver.solve(problems, partial(beam, n=4, m=2), 0, "test")
        attempts.append([[attempt.tokens for attempt in solution.attempts] for solution in solutions])
        on_device(monkeypatch)
    assert attempts[0] == attempts[1]
