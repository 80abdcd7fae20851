"""Folders and files: a policy's folder is found, files are written whole or not at all, weights are read and written as
safetensors.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from parts.cli import UserError, reason

ROOT = Path(__file__).resolve().parent.parent  # the folder of the scripts, and of base/


def find_folder(name: str, flag: str = "--model") -> str:
    """Return the folder of a policy, looked for here and beside the scripts; a hub name (owner/name) is returned
    unchanged.

    Raises UserError at once for anything else, without asking the hub: without a network that takes half a minute.
    """
    try:
        path = Path(name).expanduser()
        places = [place for place in (path, ROOT / path) if name and place.is_dir()]
        is_file = path.is_file()
    except (OSError, RuntimeError) as error:  # no such user, too long a name
        raise UserError(f"{flag} {name}: {reason(error)}") from error
    if places:
        if not (places[0] / "config.json").exists():
            raise UserError(f"{flag} {name}: no config.json in this folder, so it holds no model")
        return str(places[0])
    if is_file:
        raise UserError(f"{flag} {name}: this is a file; the folder that holds config.json is wanted")
    owner, _, rest = name.partition("/")
    local = Path(owner).is_dir() or (ROOT / owner).is_dir()
    if local or not owner.strip(".~") or not rest or "/" in rest:
        raise UserError(f"{flag} {name}: no such folder (a model of the hub is named owner/name)")
    return name


def cannot_write(path, error: BaseException) -> UserError:
    """Return the UserError that says why a path could not be written. A full disk is named as such, whatever a library
    calls it.
    """
    place = Path(path)
    while not place.exists() and place != place.parent:
        place = place.parent
    full = getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error)
    full = full or shutil.disk_usage(place).free < 1 << 20
    why = "the disk is full (No space left on device)" if full else getattr(error, "strerror", None) or reason(error)
    return UserError(f"cannot write {path}: {why}")


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write a file whole or not at all: `with replacing(path) as part`, and write to part. Its folder is created.

    Raises UserError.
    """
    part = path.with_name(path.name + ".part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except (OSError, RuntimeError, SafetensorError) as error:  # torch and safetensors have types of their own
        raise cannot_write(path, error) from error


def write_atomically(path: Path, text: str) -> None:
    """Write a text file, whole or not at all. Raises UserError."""
    with replacing(path) as part, open(part, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def check_writable(folder: Path) -> None:
    """Create a folder, if there is none. Raises UserError if nothing can be written there: better before an hour of
    work than after it.
    """
    trial = folder / f".trial-{os.getpid()}"  # a name that no file of the user has
    write_atomically(trial, "")
    trial.unlink()


def save_weights(
    weights: dict[str, torch.Tensor], folder, name: str = "drafter.safetensors", notes: dict[str, str] | None = None
) -> None:
    """Write tensors, and notes about them, to folder/name, whole or not at all. Raises UserError."""
    with replacing(Path(folder) / name) as part:
        metadata = {"format": "pt", **(notes or {})}
        save_file({key: w.contiguous() for key, w in weights.items()}, part, metadata=metadata)


def read_notes(path) -> dict[str, str]:
    """Return the notes of a safetensors file that `save_weights` has written; {} if there are none."""
    try:
        with safe_open(path, "pt") as file:
            return file.metadata() or {}
    except (OSError, SafetensorError):
        return {}


def load_weights(module: torch.nn.Module, path, what: str, extras: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Fill a module from a safetensors file -> the tensors named in `extras`, as far as the file has them; they are not
    the module's. what: such as "a drafter". Raises UserError with the path and the reason.
    """
    try:
        weights = load_file(path)
        others = {name: weights.pop(name) for name in extras if name in weights}
        module.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load {what} for this policy from {path}: {reason(error)}") from error
    return others
