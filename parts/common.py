"""What the scripts share: mistakes told in one line, flags from a dataclass, folders found, files whole or absent."""

import argparse
import contextlib
import errno
import importlib.util
import json
import math
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import field, fields
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

ROOT = Path(__file__).resolve().parent.parent  # the folder of the scripts, and of base/


class UserError(Exception):
    """A mistake of the user's, shown as one line (what, which value, how to mend it) with exit status 2."""


def reason(error: BaseException) -> str:
    """What an exception says, on one line of at most 300 characters. Many have their reason on a later line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def script_name() -> str:
    """As the user knows it: tlt.py, or bench for `python -m bench`."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def usage_name() -> str:
    """What the user types: tlt.py, or python -m bench engine."""
    name = script_name()
    if name.endswith(".py"):
        return name
    table = sys.argv[1:2] if name == "bench" else []
    return " ".join(["python -m", name, *table])


def run(main) -> None:
    """Run a script's main. A UserError becomes one line and exit status 2, Ctrl-C one line and 130."""
    try:
        main()
    except UserError as error:
        print(f"{script_name()}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        sys.exit(130)


# ---------------------------------------------------------------- flags


def flag(default, text: str, choices=None, positional: bool = False):
    """A field of a settings dataclass that becomes a command-line flag. A tuple takes several values."""
    return field(default=default, metadata={"help": text, "choices": choices, "positional": positional})


def parse_flags(config_class, description: str, argv: list[str] | None = None, before: list[str] | None = None):
    """An instance of the dataclass from the command line. Unknown flags and wrong values exit with status 2.

    Any dataclass whose fields come from `flag` will do. max_new becomes --max-new, a bool also gets --no-...
    before: flags that all others override. A field named `config` is a JSON file with settings, which override `before`
    and are overridden by the command line. Raises UserError.
    """
    parser = make_parser(config_class, description)
    values = parser.parse_args(argv)
    file = getattr(values, "config", "")
    if before or file:
        settings = parser.parse_args(before or [])
        if file:
            vars(settings).update(read_settings(file, config_class))
        values = parser.parse_args(argv, settings)  # sets what is typed, and nothing else
        if file:
            values.config = ""  # all settings are here now
    return config_class(**{name: tuple(v) if isinstance(v, list) else v for name, v in vars(values).items()})


def make_parser(config_class, description: str) -> argparse.ArgumentParser:
    """See parse_flags."""
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog=usage_name(), description=description, formatter_class=style)
    for f in fields(config_class):
        several = isinstance(f.default, tuple)
        shown = " ".join(map(str, f.default)) if several else f.default
        settings = {"default": f.default, "help": f"{f.metadata['help']} [{shown}]".replace("%", "%%")}
        if isinstance(f.default, bool):
            parser.add_argument(flag_name(f.name), action=argparse.BooleanOptionalAction, **settings)
            continue
        settings["choices"] = f.metadata["choices"]
        settings["type"] = type(f.default[0]) if several else type(f.default)
        if f.metadata["positional"]:
            parser.add_argument(f.name, nargs="?", **settings)
        else:
            parser.add_argument(flag_name(f.name), nargs="+" if several else None, **settings)
    return parser


def read_settings(path: str, config_class) -> dict:
    """Settings by the names of the dataclass's fields, from a JSON file such as a run writes (config.json). Raises
    UserError.
    """
    known = {f.name: f for f in fields(config_class)}
    try:
        content = json.loads(Path(path).read_text())
        unknown = ", ".join(sorted(content.keys() - known.keys()))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"--config {path}: {reason(error)}") from error
    except AttributeError as error:
        raise UserError(f"--config {path}: no settings by name, as a run's config.json has them") from error
    if unknown:
        raise UserError(f"--config {path}: {script_name()} has no settings named {unknown}")
    for name, value in content.items():
        content[name] = checked(value, known[name], f"--config {path}: {name}")
    return content


KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}


def checked(value, field, what: str):
    """A setting from a JSON file, as its field's type. Raises UserError that begins with `what`."""
    kind = type(field.default)
    choices = field.metadata["choices"]
    whole_is_number = kind is float and type(value) is int and abs(value) < 1 << 53
    if (type(value) is kind or whole_is_number) and (not choices or value in choices):
        return kind(value)
    raise UserError(f"{what} {json.dumps(value)}: must be {' or '.join(choices) if choices else KINDS[kind]}")


def flag_name(name: str) -> str:
    """max_new -> --max-new"""
    return "--" + name.replace("_", "-")


def check_at_least(config, low: float, *names: str) -> None:
    """Raises UserError for the first of the config's fields that is below `low`, or no finite number."""
    for name in names:
        value = getattr(config, name)
        if not low <= value < math.inf:  # nor nan
            wanted = f"at least {low}" if value < low else "a finite number"
            raise UserError(f"{flag_name(name)} {value}: must be {wanted}")


def check_above(config, low: float, *names: str) -> None:
    """Raises UserError for the first of the config's fields that is not above `low`; infinity is."""
    for name in names:
        value = getattr(config, name)
        if not value > low:  # nor nan
            raise UserError(f"{flag_name(name)} {value}: must be above {low}")


def check_package(package: str, wanted_by: str, module: str = "") -> None:
    """Raises UserError if a package is not installed. wanted_by: the flag; module: its name in Python, if another."""
    found = importlib.util.find_spec(module or package)
    if found is None or found.origin is None:  # without an origin it is a folder of that name
        raise UserError(f"{wanted_by}: this needs the package {package}; install it with `pip install {package}`")


# ---------------------------------------------------------------- folders and files


def pick_device(name: str = "auto") -> str:
    """cuda or cpu. name: auto takes a GPU if there is one. Raises UserError for cuda where there is none."""
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if name != "cpu" and torch.cuda.is_available() else "cpu"


def find_folder(name: str, flag: str = "--model") -> str:
    """A policy's folder, looked for here and beside the scripts; what looks like a hub name (owner/name) comes back
    as it is.

    Raises UserError at once for what can be neither: the hub is asked for nothing that cannot be there, since without a
    network that takes half a minute.
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
    """The UserError that says why a path could not be written. A full disk is named as such, whatever a library calls
    it.
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
    """A file is written, whole or not at all: `with replacing(path) as part` and write to part. The folder is made.

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
    with replacing(path) as part, open(part, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def save_weights(weights: dict[str, torch.Tensor], folder, name: str = "drafter.safetensors") -> None:
    """Write tensors to folder/name, whole or not at all. Raises UserError."""
    with replacing(Path(folder) / name) as part:
        save_file({key: w.contiguous() for key, w in weights.items()}, part, metadata={"format": "pt"})


def load_weights(module: torch.nn.Module, path, what: str, extras: tuple[str, ...] = ()) -> dict[str, torch.Tensor]:
    """Fill a module from a safetensors file -> the tensors named in `extras` that the file has, which are not the
    module's. Raises UserError naming the path and the reason. what: "a drafter".
    """
    try:
        weights = load_file(path)
        others = {name: weights.pop(name) for name in extras if name in weights}
        module.load_state_dict(weights)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise UserError(f"cannot load {what} for this policy from {path}: {reason(error)}") from error
    return others
