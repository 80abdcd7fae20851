"""What all test files share: tiny models (nothing is downloaded), fixtures, and functions that start training runs.

A property is tested twice: a `check_...` function passes for the real code, and fails for a deliberately broken variant
of it (`caught`).
"""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"  # also of the processes that tests start: there are more of them than cores
import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, LlamaConfig, Qwen2Config

import tlt
from base.pretrain import make_tokenizer
from parts.files import ROOT

torch.set_num_threads(1)


def cases(n: int):
    """Return hypothesis settings for n random cases; `make fuzz` runs more of them."""
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
    """Return a random model. Its weights are scaled up: predictions are sharp and varied, so that a wrong position or
    mask changes them.
    """
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config_class(**{**TINY_SHAPE, **changes}), attn_implementation="slots")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model.eval()


def caught(check, *args, **kwargs) -> None:
    """Assert that the check fails with an AssertionError: it detects the broken variant that it is given."""
    with pytest.raises(AssertionError):
        check(*args, **kwargs)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    """The folder of a random policy. Not a Qwen2: AutoTokenizer adds a token to the tokenizer of such a folder."""
    folder = tmp_path_factory.mktemp("tiny")
    tiny(LlamaConfig).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- training runs

SMALL = (
    "--device cpu --prompts 6 --samples 4 --max-new 24 --slots 8 --eval-problems 4 --eval-samples 2 --eval-every 2 "
    "--save-every 1 --lr 1e-3"
).split()
LEARN = "--task chain --max-new 32 --lr 3e-4".split()  # for the policy of the fixture `chain_policy`


def flags_for(model, out, *more, no_warm_start: bool) -> list[str]:
    """Return the flags of a small run; of a flag given twice, the later value counts."""
    warm = ["--warm-start", "0"] if no_warm_start else []
    return ["--model", str(model), "--out", str(out), *SMALL, *warm, *map(str, more)]


def launch(model, out, *more, script=("tlt.py",)) -> subprocess.Popen:
    """Start a run in a session of its own; its output goes to a pipe. script: what follows `python`."""
    return subprocess.Popen(
        [sys.executable, *script, *flags_for(model, out, *more, no_warm_start=True)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        # a shell's background jobs ignore Ctrl-C, and this process would inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def finish(process: subprocess.Popen, code: int = 0, seconds: float = 400) -> str:
    """Wait until the process has ended with this exit status -> what it has printed."""
    text, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, text
    return text


def run_in_process(main, model, out, *more) -> None:
    """Run a script's `main` in this process, which saves the seconds that imports take. Only for one worker."""
    before = sys.argv
    sys.argv = [main.__module__, *flags_for(model, out, *more, no_warm_start=main is tlt.main)]
    try:
        main()
    finally:
        sys.argv = before


def rows_of(out: Path) -> list[dict]:
    """Return the rows of a run's metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def chain_policy(tmp_path_factory):
    """The folder of a policy that solves some problems, and so learns from the first step on: base/chain without its
    drafter.
    """
    ignore = shutil.ignore_patterns("drafter", "process", "outcome", "revise", "refit", "choice.json")
    return shutil.copytree(ROOT / "base/chain", tmp_path_factory.mktemp("base") / "chain", ignore=ignore)


# `make test` gives each file to one of several processes. The long files come first, so that at the end no process
# works on one of them alone.
LONG = (
    "test_runs.py",
    "test_stand_in.py",
    "test_bench.py",
    "test_harm.py",
    "test_verdicts.py",
    "test_acceptance.py",
)


def pytest_collection_modifyitems(items) -> None:
    """Sort the tests of long files to the front."""
    items.sort(key=lambda item: item.path.name not in LONG)


def fake_gpus(monkeypatch, count: int) -> None:
    """Let torch see so many GPUs."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)


@pytest.fixture
def run_bench(monkeypatch, tmp_path):
    """A function that runs a bench table in this process, in another working directory -> what --json wrote."""
    import bench.__main__  # not above: most tests need no bench

    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def run_table(*argv) -> dict:
        path = tmp_path / "out.json"
        bench.__main__.main([*map(str, argv), "--json", str(path)])
        return json.loads(path.read_text())

    yield run_table
    torch.set_num_threads(threads)
