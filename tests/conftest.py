"""Tiny models made here (no downloads), and the way each property is tested: a `check` that passes, and a broken variant that it must catch."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import pytest
import torch
from hypothesis import HealthCheck, settings
from transformers import AutoModelForCausalLM, Qwen2Config

from pretrain import make_tokenizer

torch.set_num_threads(1)


def cases(n):
    """So many random cases; `make fuzz` multiplies them."""
    return settings(max_examples=n * int(os.environ.get("FUZZ", 1)), deadline=None, suppress_health_check=list(HealthCheck))


def tiny(config_class=Qwen2Config, **changes):
    """A random model with sharp, varied predictions (weights scaled up), so that a wrong position or mask shows."""
    torch.manual_seed(0)
    settings = dict(vocab_size=118, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=48,
                    max_position_embeddings=256, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None)
    model = AutoModelForCausalLM.from_config(config_class(**{**settings, **changes}), attn_implementation="slots")
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4 if p.ndim > 1 else 1)
    return model.eval()


def caught(check, *args, **kwargs):
    """The check must fail: the broken variant is seen."""
    with pytest.raises(AssertionError):
        check(*args, **kwargs)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    tiny().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder
