"""The command line: a mistake is reported in one line, with status 2, whatever is typed."""

import contextlib
import io
import json
import math
import re
import sys
from dataclasses import asdict, replace

import pytest
import torch
from conftest import cases, caught
from hypothesis import given
from hypothesis import strategies as st
from test_loop import run_main

import tlt
import train_grpo
from parts.cli import UserError, parse_flags, reason
from train_grpo import Config

MISTAKES = [
    (["--model", "no/such/folder"], "no/such/folder"),
    (["--model", __file__], "this is a file"),
    (["--task", "sudoku"], "--task sudoku"),
    (["--prompts", 0], "--prompts 0"),
    (["--samples", 1], "--samples 1"),
    (["--temperature", 0], "--temperature 0"),
    (["--lr", "nan"], "--lr nan"),
    (["--grad-clip", 0], "--grad-clip 0"),
    (["--prompt-style", "chat"], "no chat template"),
    (["--max-new", 5000], "context of 256"),
    (["--resume"], "no checkpoint"),
    (["--out", __file__], "cannot write"),
    (["--task", "gsm8k", "--data", "no/such/folder"], "no/such/folder"),
    (["--task", "gsm8k"], "no trace form|cannot load"),
    (["--device", "cuda"], "no GPU"),
]


@pytest.mark.parametrize("argv, message", MISTAKES, ids=lambda x: " ".join(map(str, x)) if isinstance(x, list) else "")
def test_a_mistake_is_one_line_and_status_2(argv, message, model_folder, tmp_path, monkeypatch, capsys):
    if "cuda" in argv and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    model = [] if "--model" in argv else ["--model", model_folder]
    out = [] if "--out" in argv else ["--out", tmp_path]
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, *model, *out, "--device", "cpu", "--max-new", 64, "--steps", 1, *argv)
    (error,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert re.search(message, error)
    assert error.startswith("train_grpo.py: ")


ARGUMENTS = (
    "--steps --lr --loss --workers --strategy --temperature --shard --no-resume --drafter --patience --bf16 --ngram "
    "--config --tis-cap --schedule --track -1 0 3 1e-3 nan dapo goodput off 4"
).split()


@cases(100)
@given(st.lists(st.sampled_from(ARGUMENTS) | st.text(max_size=5), max_size=6))
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
    config = parse_flags(Config, "", ["--lr", "3e-5", "--loss", "dapo", "--mask-truncated", "--grad-clip", "inf"])
    assert config.lr == 3e-5
    assert config.loss == "dapo"
    assert config.mask_truncated
    assert config.grad_clip == math.inf


# ---------------------------------------------------------------- --config


def check_precedence(parse, path):
    """The command line overrides the file, the file the demo's settings, and these the defaults."""
    wanted = replace(Config(device="cpu"), lr=3e-5, kl=1.0, mask_truncated=True, steps=7)
    path.write_text(json.dumps({**asdict(wanted), "kl": 1}))  # a whole number is a number
    demo = ["--steps", "5", "--slots", "3", "--lr", "1.0"]
    assert parse(["--config", str(path)], demo) == wanted
    config = parse(["--steps", "9", "--config", str(path), "--no-mask-truncated"], demo)
    assert config == replace(wanted, steps=9, mask_truncated=False)
    path.write_text('{"lr": 0.5}')
    config = parse(["--config", str(path), "--prompts", "2"], demo)
    assert (config.lr, config.slots, config.steps, config.prompts) == (0.5, 3, 5, 2)
    assert parse(["--lr", "0.25"], demo).lr == 0.25


def test_a_file_with_settings_overrides_defaults_and_is_overridden_by_flags(tmp_path):
    def parse(argv, demo):
        return parse_flags(Config, "", argv, demo)

    check_precedence(parse, tmp_path / "config.json")
    caught(check_precedence, lambda argv, demo: parse(demo + argv, []), tmp_path / "config.json")
    caught(check_precedence, lambda argv, demo: parse(argv, []), tmp_path / "config.json")


@pytest.mark.parametrize("script", [train_grpo, tlt])
def test_the_config_json_of_a_run_repeats_it(script, model_folder, tmp_path, monkeypatch):
    out = tmp_path / "first"
    flags = ["--prompts", 2, "--samples", 2, "--max-new", 9, "--device", "cpu", "--eval-every", 0, "--steps", 1]
    if script is tlt:
        flags += ["--workers", 1, "--warm-start", 0]
    run_script(script, "--model", model_folder, "--out", out, *flags, monkeypatch=monkeypatch)
    seen = []
    monkeypatch.setattr(script, "train", lambda config, worker: seen.append(config))
    run_script(script, "--config", out / "config.json", "--out", tmp_path / "second", monkeypatch=monkeypatch)
    settings = asdict(seen[0])
    assert settings.pop("out") == str(tmp_path / "second")
    assert settings.items() <= json.loads((out / "config.json").read_text()).items()


def run_script(script, *argv, monkeypatch) -> None:
    """Run a script in this process."""
    monkeypatch.setattr(sys, "argv", [script.__name__, *map(str, argv)])
    script.main()


FILES = {
    "no JSON": "lr: 1",
    "a list": "[1, 2]",
    "null": "null",
    "deeply nested": "[" * 100_000,
    "an unknown name": '{"lr": 0.1, "learning_rate": 0.1}',
    "a setting of another script": '{"drafter": "off"}',
    "a text": '{"steps": "30"}',
    "not whole": '{"steps": 1.5}',
    "true as a number": '{"steps": true}',
    "a number as true": '{"bf16": 1}',
    "null as a number": '{"lr": null}',
    "too large": '{"lr": 1' + "0" * 400 + "}",
    "not a choice": '{"loss": "ppo"}',
    "a value that is refused": '{"steps": 0}',
    "nan": '{"lr": NaN}',
}


@pytest.mark.parametrize("text", FILES.values(), ids=FILES)
def test_a_file_without_valid_settings_is_one_line(text, tmp_path, monkeypatch, capsys):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, "--config", path, "--device", "cpu")
    assert end.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(("train_grpo.py: --config ", "train_grpo.py: --steps 0", "train_grpo.py: --lr nan"))


def test_a_missing_file_is_one_line(tmp_path, monkeypatch, capsys):
    for path in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, "--config", path)
        assert end.value.code == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert f"--config {path}: " in line


VALUES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=3) | st.just([1])
NAMES = st.sampled_from(["lr", "steps", "loss", "bf16", "model", "config", "x"])


@cases(100)
@given(st.dictionaries(NAMES, VALUES, max_size=3) | VALUES)
def test_any_file_is_a_config_or_a_mistake(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "any.json"
    path.write_text(json.dumps(content))
    try:
        config = parse_flags(Config, "", ["--config", str(path), "--device", "cpu"])
    except UserError as error:
        assert str(error).startswith("--")
    else:
        assert config.device == "cpu"
        assert math.isfinite(config.lr)


# ---------------------------------------------------------------- reasons


def test_a_reason_is_one_line_and_never_empty():
    assert reason(RuntimeError("Errors in loading:\n\tsize mismatch")) == "Errors in loading: size mismatch"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("long " * 1000))) == 300
