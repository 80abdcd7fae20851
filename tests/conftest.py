"""Tiny models made here (no downloads), the way each property is tested, and the training runs that many tests share.

A property is a `check` that passes, and a deliberately broken variant that it must catch (`caught`).
"""

import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, Qwen2Config

import tlt
import train_grpo
from base.pretrain import make_tokenizer
from common import ROOT
from supervise import free_port

torch.set_num_threads(1)


def cases(n: int):
    """So many random cases; `make fuzz` multiplies them."""
    count = n * int(os.environ.get("FUZZ", 1))
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


def tiny(config_class=Qwen2Config, **changes):
    """A random model with sharp, varied predictions (weights scaled up), so that a wrong position or mask shows."""
    torch.manual_seed(0)
    shape = {
        "vocab_size": 118,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": None,
    }
    model = AutoModelForCausalLM.from_config(config_class(**{**shape, **changes}), attn_implementation="slots")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model.eval()


def caught(check, *args, **kwargs) -> None:
    """The check must fail: the broken variant is seen."""
    with pytest.raises(AssertionError):
        check(*args, **kwargs)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """A random policy."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- training runs

SMALL = (
    "--device cpu --prompts 6 --samples 4 --max-new 24 --slots 8 --eval-problems 4 --eval-samples 2 --eval-every 2 "
    "--save-every 1 --lr 1e-3"
).split()
LEARN = "--task chain --max-new 32 --lr 3e-4".split()  # for the policy that is able to
TORCHRUN = ("-m", "torch.distributed.run")


def flags_for(model, out, *more, no_warm_start: bool) -> list[str]:
    """Of a small run; later flags win."""
    warm = ["--warm-start", "0"] if no_warm_start else []
    return ["--model", str(model), "--out", str(out), *SMALL, *warm, *map(str, more)]


def launch(model, out, *more, door=("tlt.py",)) -> subprocess.Popen:
    """A run in a session of its own; its output is a pipe."""
    return subprocess.Popen(
        [sys.executable, *door, *flags_for(model, out, *more, no_warm_start=True)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell's background jobs ignore Ctrl-C, and so would this
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 180) -> str:
    """Wait for it -> what it has printed."""
    text, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, text
    return text


def here(main, model, out, *more) -> None:
    """As launch and finish, for one worker, in this process: without the seconds that imports take."""
    before = sys.argv
    sys.argv = [main.__module__, *flags_for(model, out, *more, no_warm_start=main is tlt.main)]
    try:
        main()
    finally:
        sys.argv = before


@pytest.fixture(scope="session")
def able(tmp_path_factory):
    """A policy that solves some problems and so learns from the first step on: base/chain without its drafter."""
    ignore = shutil.ignore_patterns("drafter", "process", "outcome", "revise", "refit", "choice.json")
    return shutil.copytree(ROOT / "base/chain", tmp_path_factory.mktemp("able") / "chain", ignore=ignore)


def two_agents(able, out) -> str:
    """torchrun with two agents, as on two hosts -> what both have printed."""
    port = str(free_port())
    agents = []
    for rank in ("0", "1"):
        place = ("--nnodes", "2", "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", port)
        door = (*TORCHRUN, *place, "--nproc-per-node", "1", "tlt.py")
        agents.append(launch(able, out, *LEARN, "--steps", 2, door=door))
    return "".join(finish(agent) for agent in agents)


def in_two_parts(able, out) -> str:
    """A run that stops after the first step, loses its config.json, and is resumed."""
    flags = (*LEARN, "--workers", 2, "--eval-every", 0)
    text = finish(launch(able, out, *flags, "--steps", 1))
    (out / "config.json").unlink()
    return text + finish(launch(able, out, *flags, "--steps", 2, "--resume"))


@pytest.fixture(scope="session")
def runs(able, tmp_path_factory):
    """The same small run through every door and with all kinds of drafting. Up to three at a time."""
    folder = tmp_path_factory.mktemp("runs")
    doors = {
        "warm": (*TORCHRUN, "--standalone", "--nproc-per-node", "2", "tlt.py"),
        # multi_gpu: several processes; --device says of what kind
        "sharded": ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "tlt.py"),
    }
    flags = {
        "2": "--workers 2",
        "3": "--workers 3",
        "plain": "--workers 2 --drafter off --strategy off",
        "warm": "--warm-start 4 --drafter static --strategy 4",
        "sharded": "--shard",
    }

    def start(name: str) -> str:
        door = doors.get(name, ("tlt.py",))
        return finish(launch(able, folder / name, *LEARN, "--steps", 2, *flags[name].split(), door=door))

    with ThreadPoolExecutor(3) as pool:
        jobs = {"resumed": pool.submit(in_two_parts, able, folder / "resumed")}
        for name in flags:
            jobs[name] = pool.submit(start, name)
        jobs["hosts"] = pool.submit(two_agents, able, folder / "hosts")
        here(tlt.main, able, folder / "1", *LEARN, "--steps", 2, "--workers", 1)
        here(train_grpo.main, able, folder / "alone", *LEARN, "--steps", 2)
        here(tlt.main, able, folder / "bandit", *LEARN, "--steps", 2, "--workers", 1, "--strategy", "beg-mab")
        for name, job in jobs.items():
            (folder / name / "printed.txt").write_text(job.result())
    return folder
