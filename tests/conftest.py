"""Tiny models made here (no downloads), the way each property is tested, and the training runs that many tests share.

A property is a `check` that passes, and a deliberately broken variant that it must catch (`caught`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import bench.__main__
import tlt
import train_grpo
from base.pretrain import make_tokenizer
from parts.common import ROOT
from parts.supervise import free_port

torch.set_num_threads(1)


def cases(n: int):
    """So many random cases; `make fuzz` multiplies them."""
    count = n * int(os.environ.get("FUZZ", 1))
    return settings(max_examples=count, deadline=None, suppress_health_check=list(HealthCheck))


TINY_SHAPE = {
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


def tiny(config_class=Qwen2Config, **changes):
    """A random model with sharp, varied predictions (weights scaled up), so that a wrong position or mask shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**TINY_SHAPE, **changes}), attn_implementation="slots")
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
    """A random policy. Not a Qwen2: AutoTokenizer adds a word to the tokenizer of any folder of that kind."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny(LlamaConfig).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- training runs

SMALL = (
    "--device cpu --prompts 6 --samples 4 --max-new 24 --slots 8 --eval-problems 4 --eval-samples 2 --eval-every 2 "
    "--save-every 1 --lr 1e-3"
).split()
LEARN = "--task chain --max-new 32 --lr 3e-4".split()  # for the policy that is able to


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


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 400) -> str:
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


def two_agents(able, out, *flags) -> str:
    """torchrun with two agents, as on two hosts -> what both have printed."""
    port = str(free_port())
    agents = []
    for rank in ("0", "1"):
        place = ("--nnodes", "2", "--node-rank", rank, "--master-addr", "127.0.0.1", "--master-port", port)
        door = ("-m", "torch.distributed.run", *place, "--nproc-per-node", "1", "tlt.py")
        agents.append(launch(able, out, *LEARN, "--steps", 2, *flags, door=door))
    return "".join(finish(agent) for agent in agents)


def in_two_parts(able, out) -> str:
    """A run that stops after the first step, loses its config.json, and is resumed."""
    flags = (*LEARN, "--workers", 2, "--eval-every", 0)
    text = finish(launch(able, out, *flags, "--steps", 1))
    (out / "config.json").unlink()
    return text + finish(launch(able, out, *flags, "--steps", 2, "--resume"))


ACCELERATE = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "tlt.py")
WARM = "--warm-start 4 --drafter static --strategy 4".split()


# groups that are replaced in rounds, several updates of a rollout, and all of it corrected
DYNAMIC = (
    "--dynamic-sampling 6 --overlong-penalty 8 --loss gspo --epochs 2 --minibatches 2 --tis-cap 2 --schedule linear"
).split()


def training_jobs(able, folder: Path) -> dict:
    """Name -> a function that makes the run in folder/name, in processes of its own, and returns what was printed."""

    def tlt_run(name: str, *flags, door=("tlt.py",)) -> str:
        return finish(launch(able, folder / name, *LEARN, "--steps", 2, *flags, door=door))

    return {
        "2": partial(tlt_run, "2", "--workers", 2),
        "3": partial(tlt_run, "3", "--workers", 3),
        "dynamic": partial(tlt_run, "dynamic", "--workers", 2, *DYNAMIC),
        "plain": partial(tlt_run, "plain", "--workers", 2, "--drafter", "off", "--strategy", "off"),
        "resumed": partial(in_two_parts, able, folder / "resumed"),
        "warm": partial(two_agents, able, folder / "warm", *WARM),
        # multi_gpu: several processes; --device says of what kind
        "sharded": partial(tlt_run, "sharded", "--shard", door=ACCELERATE),
    }


# Tests that look at these runs come last, and the runs are made in the background from the beginning: they wait a lot.
BACKGROUND = ("runs", "harmed_runs")


def pytest_collection_modifyitems(items) -> None:
    """Tests in their order, but those that wait for the background at the end."""
    items.sort(key=lambda item: any(name in item.fixturenames for name in BACKGROUND))


@pytest.fixture(scope="session", autouse=True)
def background(request, able, model_folder, tmp_path_factory):
    """Name -> (folder, future), for all background runs that the selected tests need."""
    needed = {name for item in request.session.items for name in item.fixturenames}
    jobs = {}
    with ThreadPoolExecutor(2) as pool:
        if "runs" in needed:
            folder = tmp_path_factory.mktemp("runs")
            for name, make in training_jobs(able, folder).items():
                jobs[name] = (folder / name, pool.submit(make))
        if "harmed_runs" in needed:
            from harm import HARMS, harmed

            folder = tmp_path_factory.mktemp("harmed")
            for name, harm in HARMS.items():
                jobs[name] = (folder / name, pool.submit(harmed, harm, model_folder, folder / name))
        yield jobs


@pytest.fixture(scope="session")
def runs(background, able):
    """The same small run through every door and with all kinds of drafting: a folder with a run in each subfolder."""
    folder = background["2"][0].parent
    here(tlt.main, able, folder / "1", *LEARN, "--steps", 2, "--workers", 1)
    here(train_grpo.main, able, folder / "alone", *LEARN, "--steps", 2)
    here(train_grpo.main, able, folder / "dynamic-alone", *LEARN, "--steps", 2, *DYNAMIC)
    here(tlt.main, able, folder / "bandit", *LEARN, "--steps", 2, "--workers", 1, "--strategy", "beg-mab")
    for out, future in background.values():
        if out.parent == folder:
            (out / "printed.txt").write_text(future.result())
    return folder


@pytest.fixture(scope="session")
def harmed_runs(background):
    """Name of the harm -> (folder, future), see harm.py."""
    return background


@pytest.fixture
def run_bench(monkeypatch, tmp_path):
    """Runs a table in this process, in a working directory that is not the project's -> what --json wrote."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run_table(*argv) -> dict:
        path = tmp_path / "out.json"
        bench.__main__.main([*map(str, argv), "--json", str(path)])
        return json.loads(path.read_text())

    yield run_table
    torch.set_num_threads(threads)
