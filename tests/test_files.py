"""What the scripts share: folders are found or refused at once, and a failure names its reason on one line."""

import errno
from types import SimpleNamespace

import pytest
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from parts import cli as common
from parts.cli import UserError, reason
from parts.engine.model_loading import check_context, load_model
from parts.files import ROOT, cannot_write, find_folder, write_atomically

# ---------------------------------------------------------------- folders


@pytest.fixture
def no_network(monkeypatch):
    """Whoever asks the hub fails the test."""

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
    "base/nothing": "no such folder",  # base/ is there, beside the scripts
    "~nosuchuser/x": "~nosuchuser/x: ",
    "x" * 300: "too long",
    "runs/nowhere": "no such folder",  # runs/ is there, so it is no owner's name
    "runs": "no config.json",
    "README.md": "this is a file",
    "runs/weights": "this is a file",
}


@pytest.fixture
def working_folder(tmp_path, monkeypatch):
    """Where the commands are typed, away from the scripts."""
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs/weights").write_text("a file")
    (tmp_path / "README.md").write_text("a file")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_model_is_refused_at_once(name, no_network, working_folder):
    for load in (load_model, lambda name: check_context(name, 10)):
        with pytest.raises(UserError, match=REFUSED[name]) as error:
            load(name)
        assert str(error.value).startswith(f"--model {name}: ")


def test_the_flag_is_named():
    with pytest.raises(UserError, match="--large nowhere: no such folder"):
        find_folder("nowhere", "--large")


def test_folders_beside_the_scripts_are_found_from_anywhere(working_folder):
    assert find_folder("base") == str(ROOT / "base")
    assert find_folder("base/chain") == str(ROOT / "base/chain")
    model, tokenizer = load_model("base")
    assert model.config.vocab_size >= len(tokenizer)


def test_the_nearer_folder_wins(working_folder):
    (working_folder / "base").mkdir()
    (working_folder / "base/config.json").write_text("{}")
    assert find_folder("base") == "base"


@pytest.mark.parametrize("name", ["Qwen/Qwen2.5-0.5B", "owner/name"])
def test_names_of_the_hub_pass(name, no_network, working_folder):
    assert find_folder(name) == name


# ---------------------------------------------------------------- reasons


def test_a_reason_is_one_line_and_never_empty():
    assert reason(RuntimeError("Errors in loading:\n\tsize mismatch")) == "Errors in loading: size mismatch"
    assert reason(KeyError()) == "KeyError"
    assert len(reason(ValueError("long " * 1000))) == 300


FULL = "the disk is full (No space left on device)"


@pytest.mark.parametrize(
    "error, why",
    [
        (OSError(errno.ENOSPC, "known by its number"), FULL),
        (RuntimeError("I/O error: No space left on device (os error 28)"), FULL),  # by its words, as safetensors does
        (PermissionError(errno.EACCES, "Permission denied"), "Permission denied"),
        (RuntimeError("another\nreason"), "another reason"),
    ],
)
def test_why_nothing_could_be_written_is_named(error, why, tmp_path):
    path = tmp_path / "x"
    assert str(cannot_write(path, error)) == f"cannot write {path}: {why}"


def test_a_full_disk_is_named_whatever_the_library_says(tmp_path, monkeypatch):
    error = RuntimeError("file write failed")
    assert FULL not in str(cannot_write(tmp_path / "no/such/x", error))
    monkeypatch.setattr(common.shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    assert FULL in str(cannot_write(tmp_path / "no/such/x", error))


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "deep/in/notes.txt"
    write_atomically(path, "old")

    def full(fd):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(common.os, "fsync", full)
    with pytest.raises(UserError, match="disk is full"):
        write_atomically(path, "new")
    assert path.read_text() == "old"
