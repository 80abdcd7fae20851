"""Tiny models made here (no downloads), the way each property is tested, and the training runs that many tests share.

A property is a `check` that passes, and a deliberately broken variant that it must catch (`caught`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start, too: there are more of them than cores
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import bench.__main__
import tlt
from base.pretrain import make_tokenizer
from parts.files import ROOT

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


def rows_of(out: Path) -> list[dict]:
    """The lines of metrics.jsonl that a run has written."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def able(tmp_path_factory):
    """A policy that solves some problems and so learns from the first step on: base/chain without its drafter."""
    ignore = shutil.ignore_patterns("drafter", "process", "outcome", "revise", "refit", "choice.json")
    return shutil.copytree(ROOT / "base/chain", tmp_path_factory.mktemp("able") / "chain", ignore=ignore)


# `make test` gives each file to one of several processes. Long files first: at the end no process works alone on one.
LONG = ("test_runs.py", "test_bench.py", "test_harm.py", "test_verdicts.py", "test_accept.py")


def pytest_collection_modifyitems(items) -> None:
    """Long files first."""
    items.sort(key=lambda item: item.path.name not in LONG)


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
