"""What every script shares: mistakes of the user reported in one line, and command-line flags made from a dataclass.

    UserError                     a mistake of the user; `run` prints it as one line and exits with status 2
    flag, parse_flags             a settings dataclass whose fields become command-line flags
    check_at_least, check_above   bounds of settings, with the flag, the value and the bound in the message

It imports nothing else of the project.
"""

import argparse
import importlib.util
import json
import math
import os
import sys
from dataclasses import field, fields
from pathlib import Path


class UserError(Exception):
    """A mistake of the user. `run` shows it as one line (what, which value, what to do) with exit status 2."""


def reason(error: BaseException) -> str:
    """Return what an exception says, on one line of at most 300 characters. Many have their reason on a later line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."


def script_name() -> str:
    """Return the script's name as the user knows it: tlt.py, or bench for `python -m bench`."""
    path = Path(sys.argv[0])
    return path.parent.name if path.name == "__main__.py" else path.name


def usage_name() -> str:
    """Return what the user types to start this script: tlt.py, or python -m bench engine."""
    name = script_name()
    if name.endswith(".py"):
        return name
    table = sys.argv[1:2] if name == "bench" else []
    return " ".join(["python -m", name, *table])


def run(main) -> None:
    """Run a script's main. A UserError becomes one line and exit status 2, Ctrl-C one line and 130."""
    if sys.getfilesystemencoding() != "utf-8":  # e.g. LC_ALL=C without UTF-8 mode: libraries could not open some paths
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")  # what the terminal cannot show is escaped
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
    """Return a field of a settings dataclass that becomes a command-line flag. A tuple takes several values."""
    return field(default=default, metadata={"help": text, "choices": choices, "positional": positional})


def parse_flags(config_class, description: str, argv: list[str] | None = None, before: list[str] | None = None):
    """Return an instance of the dataclass, read from the command line. Unknown flags and wrong values exit with status
    2.

    It works for any dataclass whose fields come from `flag`. max_new becomes --max-new; a bool also gets --no-...
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
    """Return the parser that `parse_flags` uses."""
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
    """Return settings, by the names of the dataclass's fields, from a JSON file such as a run writes (config.json).
    Raises UserError.
    """
    known = {f.name: f for f in fields(config_class)}
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
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
    """Return a setting from a JSON file as its field's type. Raises UserError, which begins with `what`."""
    kind = type(field.default)
    choices = field.metadata["choices"]
    whole_is_number = kind is float and type(value) is int and abs(value) < 1 << 53
    if (type(value) is kind or whole_is_number) and (not choices or value in choices):
        return kind(value)
    raise UserError(f"{what} {json.dumps(value)}: must be {' or '.join(choices) if choices else KINDS[kind]}")


def flag_name(name: str) -> str:
    """Return the flag of a field: max_new -> --max-new."""
    return "--" + name.replace("_", "-")


def check_at_least(config, low: float, *names: str) -> None:
    """Raise UserError for the first of the config's fields that is below `low` or not a finite number."""
    for name in names:
        value = getattr(config, name)
        if not low <= value < math.inf:  # nor nan
            wanted = f"at least {low}" if value < low else "a finite number"
            raise UserError(f"{flag_name(name)} {value}: must be {wanted}")


def check_above(config, low: float, *names: str) -> None:
    """Raise UserError for the first of the config's fields that is not above `low`; infinity is allowed."""
    for name in names:
        value = getattr(config, name)
        if not value > low:  # nor nan
            raise UserError(f"{flag_name(name)} {value}: must be above {low}")


def check_package(package: str, wanted_by: str, module: str = "") -> None:
    """Raise UserError if a package is not installed. wanted_by: the flag; module: its name in Python, if it has
    another.
    """
    found = importlib.util.find_spec(module or package)
    if found is None or found.origin is None:  # without an origin it is a folder of that name
        raise UserError(f"{wanted_by}: this needs the package {package}; install it with `pip install {package}`")
