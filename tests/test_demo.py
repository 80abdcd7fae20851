"""What the demo runs on which machine. The GPUs and the model hub are faked."""

import re
from types import MethodType, SimpleNamespace

import huggingface_hub
import pytest
import torch
from conftest import ROOT, caught, fake_gpus
from transformers import AutoModelForCausalLM

from parts.cli import UserError, parse_flags
from parts.running import demo
from parts.training.layouts import ReplicatedLayout
from parts.training.logprobs import checkpoint_layers
from rollout import Engine
from tlt import TLTConfig

GB = 1e9
CARDS = {
    "H100": 85.0 * GB,
    "L40S": 51.0 * GB,
    "A100-40": 42.3 * GB,
    "4090": 25.3 * GB,
    "T4": 16.9 * GB,
    "old": 8.5 * GB,
}


def fake_machine(monkeypatch, cards: list[str], hub: bool | None = True) -> None:
    """Fake a machine with these GPUs. hub: whether the model hub answers; None: it must not be asked."""
    fake_gpus(monkeypatch, len(cards))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda i: cards[i])
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: SimpleNamespace(total_memory=CARDS[cards[i]]))

    def model_info(name, timeout):
        assert hub is not None, "the hub was asked"
        if not hub:
            raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "model_info", model_info)


def settings(*argv) -> TLTConfig:
    """Return the settings of a demo with these flags given by hand, parsed as tlt.main does."""
    argv = list(map(str, argv))
    return parse_flags(TLTConfig, "", demo.demo_flags(argv) + argv)


def test_without_a_gpu_the_demo_runs_the_tiny_policy(monkeypatch, capsys):
    fake_gpus(monkeypatch, 0)
    sizes = {"max_new": 960, "prompts": 5, "samples": 8, "steps": 54}
    wanted = TLTConfig(model="base", device="cpu", workers=2, lr=2e-4, eval_every=54, save_every=9, **sizes)
    assert settings() == wanted
    line = "demo: the tiny policy in base/ on countdown, two CPU workers, because torch sees no GPU\n"
    assert capsys.readouterr().out == line


@pytest.mark.parametrize("bf16", [False, True])
def test_the_real_model_is_updated_in_bfloat16_where_the_cpu_computes_in_it(bf16, monkeypatch, capsys, tmp_path):
    fake_gpus(monkeypatch, 0)
    monkeypatch.setattr(demo, "REAL", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr(demo, "has_bfloat16_arithmetic", lambda: bf16)
    config = parse_flags(TLTConfig, "", demo.real_flags() + ["--steps", "3"])
    assert (config.bf16, config.steps, config.workers, config.device) == (bf16, 3, 2, "cpu")
    assert config.model == str(tmp_path)
    assert config.drafter_from == ""  # its drafter starts from random weights
    assert "minutes" in capsys.readouterr().out


def test_without_the_real_model_one_line_says_how_to_get_it(monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "REAL", str(tmp_path / "missing"))
    with pytest.raises(UserError, match="make real"):
        demo.real_flags()


def test_on_one_gpu_two_workers_train_the_real_model(monkeypatch, tmp_path):
    fake_gpus(monkeypatch, 1)
    monkeypatch.setattr(demo, "REAL", str(tmp_path))
    (tmp_path / "config.json").write_text("{}")
    flags = demo.real_flags()
    assert flags[flags.index("--workers-per-gpu") + 1] == "2"
    assert "--bf16" not in flags


@pytest.mark.parametrize(
    "cards, hub, argv, why",
    [
        (["H100"], False, [], "the hub does not answer (OSError)"),
        (["old"], True, [], "fits 8 GB"),
        (["H100"], None, ["--device", "cpu"], "--device cpu was given"),
    ],
)
def test_if_no_model_can_be_had_the_demo_runs_the_tiny_policy_and_says_why(cards, hub, argv, why, monkeypatch, capsys):
    fake_machine(monkeypatch, cards, hub)
    assert (settings(*argv).model, settings(*argv).device) == ("base", "cpu")
    assert why in capsys.readouterr().out


@pytest.mark.parametrize(
    "cards, argv, model, shard",
    [
        (["H100"], [], "3B", False),
        (["H100", "L40S"], [], "1.5B", False),  # the smallest GPU counts
        (["H100"], ["--workers-per-gpu", 2], "1.5B", False),
        (["A100-40"], [], "1.5B", False),
        (["4090"] * 4, [], "1.5B", True),
        (["4090"], [], "0.5B", False),
        (["T4"], [], "0.5B", False),
    ],
)
def test_the_model_is_the_largest_that_fits(cards, argv, model, shard, monkeypatch, capsys):
    fake_machine(monkeypatch, cards)
    config = settings(*argv)
    text = capsys.readouterr().out
    assert config.model == f"Qwen/Qwen2.5-{model}"
    assert (config.shard, config.prompt_style, config.gradient_checkpointing) == (shard, "base", True)
    assert ("does not learn to search" in text) == (model == "0.5B")
    assert ("--workers-per-gpu 2" in text) == (len(cards) == 1 and not argv)
    assert min(cards, key=CARDS.get) in text.splitlines()[0]
    for word in ("download", "memory", "time", "not measured", "bfloat16"):
        assert word in text
    assert max(map(len, text.splitlines())) <= 110


def test_flags_given_by_hand_override_the_demos(monkeypatch):
    fake_machine(monkeypatch, ["H100"])
    config = settings("--steps", 3, "--max-new", 200, "--prompt-style", "chat")
    assert (config.steps, config.max_new, config.prompt_style) == (3, 200, "chat")


def test_the_hub_is_not_asked_about_a_folder(model_folder, monkeypatch, capsys):
    fake_machine(monkeypatch, ["T4"], hub=None)
    config = settings("--model", model_folder)
    assert (config.model, config.device, config.task) == (str(model_folder), "auto", "countdown-hard")
    assert config.micro_tokens == 16384
    assert "rows" in capsys.readouterr().out
    monkeypatch.setattr(demo, "plan", lambda config, gpu: None)
    assert settings("--model", model_folder).micro_tokens == 2048
    assert "try --shard" in capsys.readouterr().out


def test_a_folder_without_a_language_model_is_one_line(tmp_path, monkeypatch):
    fake_machine(monkeypatch, ["T4"], hub=None)
    for text in ("no JSON", '{"model_type": "t5"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"--model {tmp_path}"):
            settings("--model", tmp_path)


PAGE = (ROOT / "docs/gpu.md").read_text()
ROW = re.compile(
    r"^\| (.*), [\d.]+ GB \| ([\d.]+) \| (\S+?),?(?: `--shard`)? \| (\d+) \| ([\d,]+) \| (\d+) \|$", re.MULTILINE
)


def check_page(page: str) -> None:
    """The page's table says what the demo takes."""
    lines = ROW.findall(page)
    assert len(lines) == 6
    for name, size, *line in lines:
        candidate, found = demo.choose(float(size) * GB, 4 if name.startswith("four") else 1)
        model = candidate.name.removeprefix("Qwen/")
        assert line == [model, f"{found.taken / GB:.0f}", f"{found.micro_tokens:,}", str(found.rows)], name


def test_the_table_in_the_docs_is_what_the_demo_takes():
    check_page(PAGE)
    caught(check_page, PAGE.replace("| 131 |", "| 132 |"))


# ---------------------------------------------------------------- the arithmetic


def check_rows_are_those_of_the_engine(plan):
    """The planned number of sequences is what the engine counts on a GPU of that size, beside all that lies there."""
    for candidate in demo.MODELS[:2] + demo.MODELS[3:]:
        for gpu in CARDS.values():
            found = plan(candidate.config, gpu)
            if not found:
                continue
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(candidate.config, dtype=torch.bfloat16)
            checkpoint_layers(model)
            layout = ReplicatedLayout()
            drafter = sum(p.numel() for p in model.get_decoder().layers[0].parameters())
            drafter += 2 * candidate.config.hidden_size**2
            engine = SimpleNamespace(model=model, slots=4096, slots_wanted=4096, proposers={"eagle": None})
            engine.slot_bytes = MethodType(Engine.slot_bytes, engine)
            engine.keep_hidden = True
            engine.max_logits = 0  # these logits are among CUDA_BYTES
            engine.reserve_bytes = layout.update_bytes(model, found.micro_tokens) + layout.moment_bytes(model)
            head = candidate.config.vocab_size * candidate.config.hidden_size
            free = gpu - demo.CUDA_BYTES - 6 * found.weights - 18 * drafter - 2 * head
            max_len = demo.PROMPT + demo.MAX_NEW + 17
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("rollout.free_memory", lambda device, free=free: free)
                assert Engine.affordable(engine, max_len) == min(4096, found.rows)


def test_the_demo_counts_as_a_run_does(monkeypatch):
    check_rows_are_those_of_the_engine(demo.plan)
    monkeypatch.setattr(ReplicatedLayout, "moment_bytes", lambda self, model: 0)
    plans = {}
    for candidate in demo.MODELS:
        for gpu in CARDS.values():
            plans[id(candidate.config), gpu] = demo.plan(candidate.config, gpu)
    monkeypatch.undo()
    caught(check_rows_are_those_of_the_engine, lambda config, gpu: plans[id(config), gpu])


@pytest.mark.parametrize("i, billions", [(0, 3.09), (1, 1.54), (3, 0.494)])
def test_the_sizes_of_the_models_are_right(i, billions):
    found = demo.plan(demo.MODELS[i].config, 200 * GB)
    assert found.weights / 1e9 == pytest.approx(billions, rel=3e-3)
