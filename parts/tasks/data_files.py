"""Problems from files and from the hub: rows, splits, columns.

    load_splits("FOLDER")         train and test in it (.jsonl or .parquet), or its only such file
    load_splits("FILE")           .jsonl or .parquet, not divided into train and test
    load_splits("owner/name")     a data set of the hub; "owner/name:config" for one of its parts

    halves(splits)                train and test, whatever the splits were
    pick_columns(row, ...)        the columns that are wanted: texts, or lists of chat messages

Every row is passed to the caller's `take` with its place (file and line), so that an error can name it; what `take`
returns is kept.
"""

import codecs
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

from parts.cli import UserError, reason

KINDS = (".jsonl", ".parquet")
Take = Callable[[object, str], object]  # (row, its place) -> what the task needs of it. Raises UserError


def read_file(path: Path, take: Take) -> list:
    """Return the rows of a .jsonl or .parquet file. Raises UserError."""
    return read_parquet(path, take) if path.suffix == ".parquet" else read_jsonl(path, take)


def read_jsonl(path: Path, take: Take) -> list:
    """Return the rows of a file with a JSON value on each line; empty lines are skipped. Raises UserError with the file
    and the line.
    """
    try:
        content = path.read_bytes()
        if content[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
            raise UserError(f"cannot read {path}: it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`")
        lines = content.decode("utf-8-sig").split("\n")  # not splitlines: JSON may hold other ends of lines
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = []
    for n, line in enumerate(lines, 1):
        place = f"{path}, line {n}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place}: not JSON ({error})") from error
        rows.append(take(row, place))
    if not rows:
        raise UserError(f"{path}: holds no problems")
    return rows


def read_parquet(path: Path, take: Take) -> list:
    """Return the rows of a parquet file. Raises UserError."""
    try:
        from datasets import Dataset

        rows = list(Dataset.from_parquet(str(path), keep_in_memory=True))
    except Exception as error:  # pyarrow's errors have many types
        raise UserError(f"cannot read {path}: {reason(error)}") from error
    if not rows:
        raise UserError(f"{path}: holds no problems")
    return [take(row, f"{path}, row {n}") for n, row in enumerate(rows, 1)]


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
    """Return the splits of a folder: of train and test (.jsonl or .parquet), or of its only such file. Raises
    UserError.
    """
    paths = sorted(path for kind in KINDS for path in folder.glob(f"*{kind}"))
    named = {path.stem: path for path in paths}
    if {"train", "test"} <= named.keys():
        paths = [named["train"], named["test"]]
    elif len(paths) != 1:
        found = ", ".join(path.name for path in paths) or "no such file"
        raise UserError(f"--data {folder}: wants train and test, or one file (.jsonl or .parquet); has {found}")
    return {path.stem: read_file(path, take) for path in paths}


def load_splits(data: str, take: Take) -> dict[str, list]:
    """Return the rows of each split by its name; a single split, of any name, if the data is not divided. Raises
    UserError.
    """
    path = os.path.expanduser(data)
    if os.path.isdir(path):
        return read_folder(Path(path), take)
    if os.path.exists(path):
        return {Path(path).stem: read_file(Path(path), take)}
    owner, _, name = data.partition("/")
    is_file = name.endswith(KINDS)
    if not owner or owner[0] in ".~" or not name or "/" in name or is_file or os.path.isdir(owner):
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
            held_out = zlib.crc32(str(row[0]).encode("utf-8", "replace")) % 8 == 0
            parts["test" if held_out else "train"].append(row)
    return parts


def check_text(text: str, place: str) -> None:
    """Raise UserError for a text with a lone surrogate, which no tokenizer can read."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = repr(text[error.start : error.end])
        raise UserError(f"{place}: {half} is half a character (a lone surrogate): correct the row") from error


def pick_columns(row, columns: dict[str, tuple[str, ...]], place: str) -> list:
    """Return the values of a row's columns. columns: what is wanted -> the names that it may have, the best first; a
    dot leads into a nested column: reward_model.ground_truth.

    A value is a text (numbers become texts), or a list of chat messages, each with role and content. Raises UserError
    with the place, and the columns that there are.
    """
    row = row if isinstance(row, dict) else {}
    values = []
    for kind, names in columns.items():
        name = next((name for name in names if nested(row, name) is not None), None)
        if name is None:
            wanted = f"no column for the {kind} ({', '.join(names)}), name both with --columns"
            raise UserError(f"{place}: {wanted}; has {', '.join(column_names(row)) or 'none'}")
        values.append(text_or_messages(nested(row, name), f"{place}: {name}"))
    return values


def nested(row: dict, name: str):
    """Return the value of a column; None if there is none. A name with dots leads into nested columns."""
    value: object = row
    for part in [name] if name in row else name.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def column_names(row: dict, front: str = "") -> list[str]:
    """Return the names of all columns, nested ones with dots."""
    names = []
    for name, value in row.items():
        names += column_names(value, f"{front}{name}.") if isinstance(value, dict) else [front + name]
    return names


def text_or_messages(value, what: str) -> str | list[dict]:
    """Return a column's value as a text, or as a list of chat messages. Raises UserError, which begins with `what`."""
    if isinstance(value, list):
        messages = [dict(message) for message in value if isinstance(message, dict)]
        good = [isinstance(m.get("role"), str) and isinstance(m.get("content"), str) for m in messages]
        if not value or len(messages) != len(value) or not all(good) or messages[-1]["role"] != "user":
            shown = str(value)[:40]
            raise UserError(f"{what}: wants messages with role and content, the last one of the user, got {shown!r}")
        for message in messages:
            check_text(message["content"], what)
        return messages
    text = str(value).strip() if isinstance(value, (str, int, float)) else ""
    if not text:
        raise UserError(f"{what} must be a text that is not empty, got {str(value)[:40]!r}")
    check_text(text, what)
    return text
