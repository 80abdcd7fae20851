"""Folders are found, or refused without asking the hub; files are written whole or not at all, and errors say why."""

import errno
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parts import files
from parts.cli import UserError
from parts.engine.model_loading import load_config, load_model
from parts.files import ROOT, cannot_write, find_folder, write_atomically

# ---------------------------------------------------------------- folders


@pytest.fixture
def no_network(monkeypatch):
    """A test fails if it asks the hub."""

    def ask(*args, **kwargs):
        pytest.fail("the hub was asked")

    for kind in (AutoConfig, AutoModelForCausalLM, AutoTokenizer):
        monkeypatch.setattr(kind, "from_pretrained", ask)


REFUSED = {
    "": "no such folder",
    "nowhere": "no such folder",
    "nowhere/": "no such folder",
    "./nowhere": "no such folder",
    "../nowhere": "no such folder",
    "~/nowhere": "no such folder",
    "/nowhere": "no such folder",
    "no/such/folder": "no such folder",
    "base/nothing": "no such folder",  # base/ exists, beside the scripts
    "~nosuchuser/x": "~nosuchuser/x: ",
    "x" * 300: "too long",
    "runs/nowhere": "no such folder",  # runs/ exists, so it is no owner on the hub
    "runs": "no config.json",
    "README.md": "this is a file",
    "runs/weights": "this is a file",
}


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """The working directory, which is not that of the scripts."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/weights").write_text("a file")
    (tmp_path / "README.md").write_text("a file")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_a_name_that_is_no_model_is_refused_at_once(name, no_network, working_folder):
    for load in (load_model, load_config):
        with pytest.raises(UserError, match=REFUSED[name]) as error:
            load(name)
        assert str(error.value).startswith(f"--model {name}: ")


def test_the_message_names_the_flag():
    with pytest.raises(UserError, match="--large nowhere: no such folder"):
        find_folder("nowhere", "--large")


def test_folders_beside_the_scripts_are_found_from_anywhere(working_folder):
    assert find_folder("base") == str(ROOT / "base")
    assert find_folder("base/chain") == str(ROOT / "base/chain")
    model, tokenizer = load_model("base")
    assert model.config.vocab_size >= len(tokenizer)


def test_a_folder_here_comes_before_one_beside_the_scripts(working_folder):
    (working_folder / "base").mkdir()
    (working_folder / "base/config.json").write_text("{}")
    assert find_folder("base") == "base"


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "owner/name"])
def test_names_of_the_hub_are_returned_unchanged(name, no_network, working_folder):
    assert find_folder(name) == name


# ---------------------------------------------------------------- errors in writing

FULL = "the disk is full (No space left on device)"


@pytest.mark.parametrize(
    "error, why",
    [
        (OSError(errno.ENOSPC, "known by its number"), FULL),
        (
            RuntimeError("I/O error: No space left on device (os error 28)"),
            FULL,
        ),  # safetensors: known by its text
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (RuntimeError("another\nreason"), "another reason"),
    ],
)
def test_the_message_says_why_nothing_could_be_written(error, why, tmp_path):
    path = tmp_path / "x"
    assert str(cannot_write(path, error)) == f"cannot write {path}: {why}"


def test_a_full_disk_is_named_whatever_the_librarys_message_is(tmp_path, monkeypatch):
    error = RuntimeError("file write failed")
    assert FULL not in str(cannot_write(tmp_path / "no/such/x", error))
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert FULL in str(cannot_write(tmp_path / "no/such/x", error))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep/in/notes.txt"
    write_atomically(path, "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
