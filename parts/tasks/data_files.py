"""Problems from files and from the hub: rows, splits, columns.

    load_splits("FOLDER")         train.jsonl and test.jsonl in it, or the only .jsonl file
    load_splits("FILE.jsonl")     not divided into train and test
    load_splits("owner/name")     a data set of the hub; "owner/name:config" for one of its parts

    halves(splits)                train and test, whatever the splits were
    pick_columns(row, ...)        the texts of the columns that are wanted

Every row is passed to the caller's `take` with its place (file and line), so that an error can name it; what `take`
returns is kept.
"""

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

from parts.cli import UserError, reason

Take = Callable[[object, str], object]  # (row, its place) -> what the task needs of it. Raises UserError


def read_jsonl(path: Path, take: Take) -> list:
    """Return the rows of a file with a JSON value on each line; empty lines are skipped. Raises UserError with the file
    and the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines: JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = []
    for n, line in enumerate(lines, 1):
        where = f"{path}, line {n}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{where}: not JSON ({error})") from error
        rows.append(take(row, where))
    if not rows:
        raise UserError(f"{path}: holds no problems")
    return rows


def read_hub(name: str, take: Take) -> dict[str, list]:
    """Return the splits of a data set of the hub, "owner/name" or "owner/name:config". Raises UserError."""
    path, _, config = name.partition(":")
    try:
        from datasets import load_dataset

        splits = {split: list(rows) for split, rows in load_dataset(path, config or None).items()}
    except Exception as error:  # the hub's failures have many types; the advice is the same for all
        problem = f"cannot load {name} from the hub ({type(error).__name__}: {reason(error)})"
        raise UserError(f"{problem}: give a local folder with --data") from error
    return {
        split: [take(row, f"{name}, {split}, row {n}") for n, row in enumerate(rows, 1)]
        for split, rows in splits.items()
    }


def read_folder(folder: Path, take: Take) -> dict[str, list]:
    """Return the splits of a folder, from train.jsonl and test.jsonl or its only .jsonl file. Raises UserError."""
    names = sorted(path.name for path in folder.glob("*.jsonl"))
    if {"train.jsonl", "test.jsonl"} <= {*names}:
        names = ["train.jsonl", "test.jsonl"]
    elif len(names) != 1:
        found = ", ".join(names) or "no .jsonl file"
        raise UserError(f"--data {folder}: wants train.jsonl and test.jsonl, or one .jsonl file; has {found}")
    return {name.removesuffix(".jsonl"): read_jsonl(folder / name, take) for name in names}


def load_splits(data: str, take: Take) -> dict[str, list]:
    """Return the rows of each split by its name; a single split, of any name, if the data is not divided. Raises
    UserError.
    """
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        return read_folder(Path(path), take)
    if os.path.exists(path):
        return {Path(path).stem: read_jsonl(Path(path), take)}
    owner, _, name = data.partition("/")
    if not owner or owner[0] in ".~" or not name or "/" in name or name.endswith(".jsonl") or os.path.isdir(owner):
        raise UserError(f"--data {data}: no such file or folder (a data set of the hub is named owner/name)")
    return read_hub(data, take)


def halves(splits: dict[str, list[tuple]]) -> dict[str, list[tuple]]:
    """Return the splits train and test of (problem, ...). If one is missing, all rows are divided anew, and an
    eighth of the problems is held out: a problem that occurs twice is in the same split both times.
    """
    if {"train", "test"} <= splits.keys():
        return {name: splits[name] for name in ("train", "test")}
    parts: dict[str, list[tuple]] = {"train": [], "test": []}
    for rows in splits.values():
        for row in rows:
            held_out = zlib.crc32(row[0].encode("utf-8", "replace")) % 8 == 0
            parts["test" if held_out else "train"].append(row)
    return parts


def check_text(text: str, place: str) -> None:
    """Raise UserError for a text with a lone surrogate, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{place}: {text[error.start : error.end]!r} is half a character: mend or remove the row"
        ) from error


def pick_columns(row, columns: dict[str, tuple[str, ...]], where: str) -> list[str]:
    """Return the texts of a row's columns. columns: what is wanted -> the names that it may have, the best first.

    Numbers become texts. Raises UserError with `where`, and the columns that there are.
    """
    row = row if isinstance(row, dict) else {}
    texts = []
    for kind, names in columns.items():
        name = next((name for name in names if name in row), None)
        if name is None:
            wanted = f"no column for the {kind} ({', '.join(names)}), name both with --columns"
            raise UserError(f"{where}: {wanted}; has {', '.join(row) or 'none'}")
        text = str(row[name]).strip() if isinstance(row[name], (str, int, float)) else ""
        if not text:
            raise UserError(f"{where}: {name} must be a text that is not empty, got {str(row[name])[:40]!r}")
        check_text(text, where)
        texts.append(text)
    return texts
