"""The GPU path, as far as a machine without a GPU can tell: faked memory, faked GPUs, errors that are made up."""

import torch
from conftest import caught, tiny
from helpers import make_drafter, responses_of
from safetensors.torch import load_file

import drafter
from base.pretrain import make_tokenizer
from drafter import Drafter, drafter_loss
from parts import checkpoints
from parts.features import Features, pack

# ---------------------------------------------------------------- random numbers


def host_state(make, device: str) -> torch.Tensor:
    """Of the host's random numbers, after a drafter was made for a policy on that device."""
    policy = tiny().to(device)
    torch.manual_seed(1)
    make(policy)
    return torch.get_rng_state()


def check_drawn_on_the_host(make):
    """For a policy on another device as many of them are drawn as for one on the host."""
    assert torch.equal(host_state(make, "cpu"), host_state(make, "meta"))


def test_a_drafter_begins_alike_on_every_device(monkeypatch):
    monkeypatch.setattr(drafter, "scale_of", lambda embedding: 1.0)  # without numbers there is no size
    check_drawn_on_the_host(Drafter)

    def drawn_there(policy):
        torch.nn.init.normal_(torch.empty(4, 4, device=policy.device))

    caught(check_drawn_on_the_host, drawn_there)


def check_guesses_are_chosen_on_the_host(monkeypatch, loss):
    """Which features are guessed ones, in a batch, does not depend on the device's random numbers."""
    model = tiny()
    batch = pack([Features(torch.tensor(r.prompt + r.tokens), r.hidden, len(r.prompt)) for r in responses_of(model)])
    devices = []
    right = torch.rand

    def noted(*shape, device=None, **settings):
        devices.append(device)
        return right(*shape, device=device, **settings)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "rand", noted)
        loss(make_drafter(model), batch)
    assert devices == [None]


def test_the_entries_that_see_guesses_are_chosen_on_the_host(monkeypatch):
    check_guesses_are_chosen_on_the_host(monkeypatch, drafter_loss)

    def chosen_there(drafter, batch):
        return torch.rand(batch.ids.shape, device=batch.ids.device)

    caught(check_guesses_are_chosen_on_the_host, monkeypatch, chosen_there)


# ---------------------------------------------------------------- weights in files


def check_tied_weights_are_written_once(folder, monkeypatch):
    """Also where each name's weight is a copy, as it comes from a GPU or from several workers."""
    model = tiny(tie_word_embeddings=True)
    whole = checkpoints.get_model_state_dict

    def copied(model, options):
        return {name: w.clone() for name, w in whole(model, options=options).items()}

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "get_model_state_dict", copied)
        checkpoints.save_policy(folder, model, make_tokenizer(), checkpoints.whole_weights(model))
    written = load_file(folder / "model.safetensors")
    assert sum(w.numel() for w in written.values()) == sum(p.numel() for p in model.parameters())
    again = type(model).from_pretrained(folder)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters()))
    assert again.lm_head.weight is again.model.embed_tokens.weight


def test_tied_weights_are_written_once(tmp_path, monkeypatch):
    check_tied_weights_are_written_once(tmp_path, monkeypatch)
    monkeypatch.setattr(checkpoints, "under_one_name", lambda model, weights: weights)
    caught(check_tied_weights_are_written_once, tmp_path, monkeypatch)


def check_checkpoint_has_one_copy(folder, monkeypatch):
    model = tiny(tie_word_embeddings=True)
    optimizer = torch.optim.AdamW(model.parameters())
    both = checkpoints.get_state_dict

    def copied(model, optimizer, options):
        weights, moments = both(model, optimizer, options=options)
        return {name: w.clone() for name, w in weights.items()}, moments

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints, "get_state_dict", copied)
        checkpoints.save(folder, 1, model, optimizer, make_tokenizer(), [])
    assert "lm_head.weight" not in load_file(folder / "checkpoint-000001/model.safetensors")


def test_checkpoints_too(tmp_path, monkeypatch):
    check_checkpoint_has_one_copy(tmp_path, monkeypatch)
    monkeypatch.setattr(checkpoints, "under_one_name", lambda model, weights: weights)
    caught(check_checkpoint_has_one_copy, tmp_path, monkeypatch)
