"""LoRA: the actor has the weights of the policy that learns, checkpoints hold adapters, and every way to run makes the
same tokens.
"""

import json
import random
import sys

import pytest
import torch
from conftest import LEARN, caught, finish, launch, rows_of, run_in_process, tiny
from helpers import SAMPLINGS, by_name, check_equal, groups_of
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, LlamaConfig

import tlt
import train_grpo
from base import merge
from parts.cli import UserError, run
from parts.engine.model_loading import load_model
from parts.training import lora
from parts.training.layouts import LoRALayout
from rollout import Engine
from train_grpo import Config

peft = pytest.importorskip("peft")
LORA = ("--lora-rank", 4, "--lr", "1e-3", "--steps", 2, "--eval-every", 0)


def placed(**changes):
    """Return the policy that learns, with adapters that have changed, and the actor that generates."""
    model, actor = LoRALayout(Config(device="cpu", lora_rank=4, **changes)).place(tiny(LlamaConfig), "cpu")
    torch.manual_seed(3)
    with torch.no_grad():
        for p in lora.adapter_weights(model).values():
            p.add_(torch.randn_like(p) * 0.1)
    return model, actor


def check_merged(merge) -> None:
    """The actor computes what the policy computes, and its weights are those that would be saved."""
    model, actor = placed()
    before = lora.merged_weights(model)
    merge(actor, model)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.allclose(actor(input_ids=ids).logits, model(input_ids=ids).logits, atol=1e-4)
    assert before.keys() == dict(actor.state_dict()).keys()
    assert all(w.equal(before[name]) for name, w in actor.state_dict().items())


def weights_of_the_base(actor, model) -> None:
    """Copy x.weight of adapted layers, which is that of their base."""
    for name, layer in lora.layers_of(model).items():
        actor.get_submodule(name).weight.data.copy_(layer.weight)


def test_the_actor_has_the_merged_weights():
    check_merged(lora.merge_into)
    caught(check_merged, weights_of_the_base)


def check_fused(model, actor, read) -> None:
    """An engine made before the adapters changed generates with them."""
    groups = groups_of(6, random.Random(1))
    engine = Engine(actor, {1}, 10, 100, keep_hidden=True)
    engine.read_weights = read(engine)
    list(engine.generate(groups, SAMPLINGS[0]))
    lora.merge_into(actor, model)
    fresh = Engine(actor, {1}, 10, 100, keep_hidden=True)
    wanted = by_name(fresh.generate(groups, SAMPLINGS[0]))
    check_equal(by_name(engine.generate(groups, SAMPLINGS[0])), wanted)


def test_fused_layers_have_the_merged_weights():
    check_fused(*placed(), lambda engine: engine.read_weights)
    caught(check_fused, *placed(), lambda engine: lambda: None)


def test_only_adapters_learn_and_all_of_them():
    model, _ = placed()
    names = {name for name, p in model.named_parameters() if p.requires_grad}
    assert names == {name for name in dict(model.named_parameters()) if "lora_" in name}
    layers = model.config.num_hidden_layers
    assert len(names) == 2 * 7 * layers  # A and B of four projections of attention and three of the MLP


def test_new_adapters_change_nothing_and_are_equal_on_all_workers():
    first, actor = LoRALayout(Config(device="cpu", lora_rank=4, seed=7)).place(tiny(LlamaConfig), "cpu")
    torch.randn(5)
    second, _ = LoRALayout(Config(device="cpu", lora_rank=4, seed=7)).place(tiny(LlamaConfig), "cpu")
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        assert torch.allclose(first(input_ids=ids).logits, actor(input_ids=ids).logits, atol=1e-5)
    pairs = zip(lora.adapter_weights(first).values(), lora.adapter_weights(second).values())
    assert all(a.equal(b) for a, b in pairs)


# ---------------------------------------------------------------- whole runs


def digests(out) -> list[int]:
    return [row["digest"] for row in rows_of(out)]


@pytest.fixture(scope="module")
def lora_run(chain_policy, tmp_path_factory):
    """The folder of a finished run of one process."""
    out = tmp_path_factory.mktemp("lora") / "alone"
    run_in_process(train_grpo.main, chain_policy, out, *LEARN, *LORA)
    return out


def test_two_workers_and_a_resumed_run_make_the_same_tokens(chain_policy, lora_run, tmp_path):
    wanted = digests(lora_run)
    assert len(set(wanted)) == 2
    finish(launch(chain_policy, tmp_path / "two", *LEARN, *LORA, "--workers", 2))
    assert digests(tmp_path / "two") == wanted
    run_in_process(tlt.main, chain_policy, tmp_path / "parts", *LEARN, *LORA, "--steps", 1, "--workers", 1)
    run_in_process(tlt.main, chain_policy, tmp_path / "parts", *LEARN, *LORA, "--workers", 1, "--resume")
    assert digests(tmp_path / "parts") == wanted
    weights = "policy/model.safetensors"
    resumed, whole = load_file(tmp_path / "parts" / weights), load_file(lora_run / weights)
    assert all(torch.allclose(w, whole[name], atol=1e-6) for name, w in resumed.items())


def test_a_checkpoint_holds_the_adapter_and_the_policy_is_merged(chain_policy, lora_run):
    checkpoint = lora_run / "checkpoint-000002"
    assert {path.name for path in checkpoint.iterdir()} & {"model.safetensors", "config.json"} == set()
    merged = AutoModelForCausalLM.from_pretrained(lora_run / "policy", dtype=torch.float32)
    base = AutoModelForCausalLM.from_pretrained(chain_policy, dtype=torch.float32)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        wanted = merged(input_ids=ids).logits
        assert not torch.allclose(base(input_ids=ids).logits, wanted, atol=1e-4)
        for folder in (checkpoint, lora_run / "policy/adapter"):
            base = AutoModelForCausalLM.from_pretrained(chain_policy, dtype=torch.float32)
            again = peft.PeftModel.from_pretrained(base, folder)  # the ordinary way
            assert torch.allclose(again(input_ids=ids).logits, wanted, atol=1e-4)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--lora-rank", 8, "--resume", "--steps", 3), "with --lora-rank 4 only"),
        (("--lora-rank", 0, "--resume", "--steps", 3), "with --lora-rank 4 only"),
        (("--lora-rank", -1), "--lora-rank -1"),
    ],
)
def test_a_wrong_rank_is_one_line(chain_policy, lora_run, argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        run(lambda: run_in_process(train_grpo.main, chain_policy, lora_run, *LEARN, *LORA, *argv))
    assert stop.value.code == 2
    assert message in capsys.readouterr().err
    assert json.loads((lora_run / "config.json").read_text())["lora_rank"] == 4


def test_adapters_of_another_policy_are_refused(lora_run):
    model, _ = placed()
    with pytest.raises(UserError, match="cannot load an adapter for this policy"):
        lora.load(lora_run / "policy/adapter", model)


def test_sharded_adapters_are_refused():
    with pytest.raises(UserError, match="--shard with --lora-rank"):
        tlt.TLTConfig(device="cpu", shard=True, lora_rank=4)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    train_grpo.check(Config(device="cpu"))
    with pytest.raises(UserError, match="pip install peft"):
        train_grpo.check(Config(device="cpu", lora_rank=4))


# ---------------------------------------------------------------- an adapter becomes part of its model


def test_an_adapter_is_merged_into_an_ordinary_folder(model_folder, tmp_path, monkeypatch):
    """The folder computes what the model computes with its adapter, and has no trace of the adapter but its card."""
    model, _ = load_model(str(model_folder))
    lora.add(model, 3, seed=5)
    with torch.no_grad():
        for p in lora.adapter_weights(model).values():
            p.normal_(std=0.1)
    lora_folder = tmp_path / "adapter"
    lora.save(lora_folder, model)
    (lora_folder / "README.md").write_text("taught")
    flags = ["--model", model_folder, "--adapter", lora_folder, "--out", tmp_path / "merged"]
    monkeypatch.setattr(sys, "argv", ["merge", *map(str, flags)])
    merge.main()
    merged, _ = load_model(str(tmp_path / "merged"))
    ids = torch.arange(2, 40)[None]
    assert torch.allclose(merged(ids).logits, model(ids).logits, atol=1e-5)
    assert not torch.allclose(load_model(str(model_folder))[0](ids).logits, model(ids).logits, atol=1e-2)
    assert (tmp_path / "merged" / "README.md").read_text() == "taught"
    monkeypatch.setattr(sys, "argv", ["merge", "--adapter", str(tmp_path)])
    with pytest.raises(UserError, match="no adapter"):
        merge.main()
