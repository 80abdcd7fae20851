"""The command line: a mistake is one line and status 2, whatever is typed."""

import contextlib
import io
import math
import re

import pytest
import torch
from conftest import cases
from hypothesis import given
from hypothesis import strategies as st
from test_loop import run_main

import tlt
from parts.common import UserError, parse_flags
from train_grpo import Config

MISTAKES = [
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--model", __file__], "this is a file"),
    (["--task", "sudoku"], "--task sudoku"),
    (["--prompts", 0], "--prompts 0"),
    (["--temperature", 0], "--temperature 0"),
    (["--lr", "nan"], "--lr nan"),
    (["--prompt-style", "chat"], "no chat template"),
    (["--max-new", 5000], "context of 256"),
    (["--resume"], "no checkpoint"),
    (["--out", __file__], "cannot write"),
    (["--task", "gsm8k", "--data", "no/such"], "no/such/"),
    (["--task", "gsm8k"], "no trace form|cannot load"),
    (["--device", "cuda"], "no GPU"),
]


@pytest.mark.parametrize("argv, words", MISTAKES, ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_mistakes_get_one_line_and_status_2(argv, words, model_folder, tmp_path, monkeypatch, capsys):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = [] if "--model" in argv else ["--model", model_folder]
    out = [] if "--out" in argv else ["--out", tmp_path]
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *model, *out, "--device", "cpu", "--max-new", 64, "--steps", 1, *argv)
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert re.search(words, error)
    assert error.startswith("train_grpo.py: ")


WORDS = (
    "--steps --lr --loss --workers --strategy --temperature --shard --no-resume --drafter --patience --bf16 --ngram "
    "-1 0 3 1e-3 nan dapo goodput off 4"
).split()


@cases(100)
@given(st.lists(st.sampled_from(WORDS) | st.text(max_size=5), max_size=6))
def test_any_command_line_is_a_config_or_a_mistake_with_status_2(argv):
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            config = parse_flags(tlt.TLTConfig, "", argv)
        except SystemExit as end:
            assert end.code == 2 or "-h" in argv
        except UserError as error:
            assert str(error).startswith("--")
        else:
            assert config.steps >= 1
            assert config.temperature > 0
            assert config.patience > 0
            assert math.isfinite(config.lr)


@pytest.mark.parametrize("argv", [["--no-such-flag", "1"], ["--loss", "ppo"], ["--steps", "many"]])
def test_unknown_flags_and_values_exit_with_2(argv):
    with pytest.raises(SystemExit) as end:
        parse_flags(Config, "", argv)
    assert end.value.code == 2


def test_flags_become_a_config():
    config = parse_flags(Config, "", ["--lr", "3e-5", "--loss", "dapo", "--mask-truncated"])
    assert config.lr == 3e-5
    assert config.loss == "dapo"
    assert config.mask_truncated
