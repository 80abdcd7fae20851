"""A run's folder and its checkpoints: every file is written whole or not at all, and no run destroys another by
mistake.

    out/config.json, metrics.jsonl, curves.png, timeline.png, trace.json
    out/policy/                 the final policy, an ordinary Hugging Face folder
    out/checkpoint-NNNNNN/      a Hugging Face folder, or an adapter (--lora-rank), with drafter/, optimizer.pt,
                                state.json (step, config, metrics) and checksums.json
    out/earlier-run/            checkpoints of the run that was here before, until this one has written its first
    out/.lock                   held by the run that writes here; the system releases it however that run ends
    out/.launch                 which call of torchrun has begun this run

Seeds and data follow from the number of the step, so a checkpoint needs no state of random generators. States of policy
and optimizer are stored whole, by the names of the weights: a sharded run can continue unsharded, and vice versa.
"""

import contextlib
import fcntl
import hashlib
import json
import os
import platform
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from tqdm import tqdm

from parts.cli import UserError, flag_name
from parts.files import cannot_write, write_atomically
from parts.running.metrics_log import to_json
from parts.training import lora

FORMAT = 3  # of checkpoints
KEPT = 2  # checkpoints
PATTERN = "checkpoint-??????"
WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)
# settings that a resumed run may not change, since the checkpoint's weights are made of them
FIXED = ("model", "lora_rank")
# settings that it may change without a message; of all others it prints the change
MAY_CHANGE = ("steps", "resume", "out", "workers", "workers_per_gpu", "track")


# ---------------------------------------------------------------- the folder


@contextlib.contextmanager
def claim(out) -> Iterator[None]:
    """Hold the folder while the block runs. Raises UserError if another run holds it, or if it cannot be written."""
    path = Path(out) / ".lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+", encoding="utf-8", errors="backslashreplace")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--out {out}: {cannot_write(out, error)}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            raise UserError(
                f"--out {out}: in use by {file.read().strip()}; wait for it, or choose another --out"
            ) from error
        except OSError as error:  # e.g. a file system without locks
            raise UserError(f"--out {out}: cannot lock it: {error.strerror}") from error
        file.truncate(0)
        file.write(
            f"process {os.getpid()} on {platform.node()} since {time.strftime('%H:%M:%S')}: {' '.join(sys.argv)}"
        )
        file.flush()
        yield


def restarted() -> bool:
    """Return whether torchrun has started this process again after a failure (--max-restarts): then the run resumes by
    itself.
    """
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0


def launch() -> str:
    """Return a name for this call of torchrun, the same in every attempt of it: its agent is the parent process."""
    return f"{os.environ.get('TORCHELASTIC_RUN_ID')} {os.getppid()} {platform.node()}"


def has_begun(out: Path) -> bool:
    """Return whether an earlier attempt of this call of torchrun has come as far as `prepare`. If not, the checkpoints
    in the folder are of another run. What rank 0 says counts: other hosts have other agents.
    """
    path = out / ".launch"
    return path.exists() and path.read_text(encoding="utf-8") == launch()


def start_from(config, say: Callable[[str], None], begun: bool = True) -> Path | None:
    """Return the checkpoint that a run continues from; None: it starts from the beginning.

    config: train_grpo.Config; say: see `newest`; begun: see `has_begun`. Raises UserError if --resume finds none, or
    one whose FIXED settings are others.
    """
    if not config.resume and not (restarted() and begun):
        return None
    out = Path(config.out)
    checkpoint = newest(out, say)
    if checkpoint is None:
        if restarted():
            return None
        raise nothing_to_resume(out)
    before = read_state(checkpoint)["config"]
    for name in FIXED:
        was = before.get(name, getattr(config, name))
        if not same_setting(name, was, getattr(config, name)):
            flag = flag_name(name)
            raise UserError(f"{flag} {getattr(config, name)}: {checkpoint} continues with {flag} {was} only")
    return checkpoint


def same_setting(name: str, before, now) -> bool:
    """Return whether a setting is the same; folders are the same however their path is written."""
    if name == "model" and Path(before).is_dir() and Path(now).is_dir():
        return Path(before).resolve() == Path(now).resolve()
    return before == now


def nothing_to_resume(out: Path) -> UserError:
    """Return the UserError for --resume in a folder without an intact checkpoint."""
    aside = out / "earlier-run"
    hint = f" (those in {aside} are of the run before: move them up to continue from them)" if aside.exists() else ""
    return UserError(f"--resume: no checkpoint in {out}{hint}; start without it")


def check_not_replaced(out: Path, name: str, value: str) -> None:
    """Raise UserError if a new run in `out` would move or replace the folder that it starts from."""
    folder = Path(value).expanduser().resolve()
    for path in (folder, *folder.parents) if value else ():
        if path.parent == out.resolve() and (path.name in ("policy", "earlier-run") or path.match(PATTERN)):
            raise UserError(
                f"{flag_name(name)} {value}: lies in --out {out}, where a new run replaces checkpoints and policy/; "
                "choose another --out"
            )


def prepare(out: Path, config, start: Path | None) -> None:
    """Write config.json and .launch. A new run moves the checkpoints of an earlier one aside, so that --resume cannot
    continue from them.
    """
    if start is not None:
        before = read_state(start)["config"]
        changes = []
        for name, value in asdict(config).items():
            if name not in MAY_CHANGE and before.get(name, value) != value:
                changes.append(f"{name} {before[name]} -> {value}")
        if changes:
            tqdm.write("continues with other settings than before: " + ", ".join(changes))
    else:
        for old in sorted(out.glob(PATTERN)):
            aside = out / "earlier-run" / old.name
            aside.parent.mkdir(exist_ok=True)
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(old, aside)
    write_atomically(out / "config.json", json.dumps(asdict(config), indent=1))
    write_atomically(out / ".launch", launch())


def save_folder(folder: Path, fill: Callable[[Path], None]) -> None:
    """Let `fill(path)` write a folder beside its final place, then rename it. If that fails, nothing is left, and
    UserError is raised.
    """
    part = folder.with_name(folder.name + ".part")
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        fill(part)
        for path in part.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except Exception as error:  # disk full, read-only, ...: each library has its own exception
        failure = cannot_write(folder, error)  # first: once the part is removed, the disk is not full any more
        shutil.rmtree(part, ignore_errors=True)
        raise failure from error


# ---------------------------------------------------------------- writing


def whole_weights(model) -> dict[str, torch.Tensor]:
    """Return the policy's weights as a whole, with adapters merged, on the host. Without adapters only rank 0 gets
    them. All workers take part.
    """
    if lora.layers_of(model):
        return under_one_name(model, lora.merged_weights(model))
    return under_one_name(model, get_model_state_dict(model, options=WHOLE))


def under_one_name(model, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the weights without the second names of tied ones, such as a head that is the embedding. From a GPU, or
    from several workers, each name comes with a copy of its own, and save_pretrained would write both.
    """
    names = {name for name, _ in model.named_parameters()}
    all_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: w for name, w in weights.items() if name not in all_names - names}


def save_policy(folder: Path, model, tokenizer, weights: dict[str, torch.Tensor]) -> None:
    """Write a Hugging Face folder; with adapters, the merged weights, and in adapter/ the adapter itself."""
    model.save_pretrained(folder, state_dict=weights)
    if lora.layers_of(model):
        lora.save(folder / "adapter", model)
    tokenizer.save_pretrained(folder)


def try_to_save(out: Path, model, tokenizer) -> None:
    """Write everything but weights that a checkpoint and out/policy hold, and remove it again. Raises UserError: a
    setting that cannot be saved would else end the run at its first checkpoint.
    """
    trial = out / "trial"

    def fill(part: Path) -> None:
        model.config.save_pretrained(part)
        model.generation_config.save_pretrained(part)
        tokenizer.save_pretrained(part)

    save_folder(trial, fill)
    shutil.rmtree(trial)


def save(
    out: Path, step: int, model, optimizer, tokenizer, metrics: list[dict], config=None, writes=True, also=None
) -> None:
    """Write a checkpoint; all workers take part, one writes. If that fails, UserError is raised, and earlier
    checkpoints stay.

    also(folder): writes what belongs to it beside the policy. The newest two of this run are kept. Those of an earlier
    run are removed, now that this run has one.
    """
    adapted = bool(lora.layers_of(model))
    weights = {} if adapted else whole_weights(model)
    moments = get_optimizer_state_dict(model, optimizer, options=WHOLE)
    if not writes:
        return
    folder = out / f"checkpoint-{step:06d}"

    def fill(part: Path) -> None:
        if adapted:
            lora.save(part, model)
        else:
            save_policy(part, model, tokenizer, weights)
        if also:
            also(part)
        torch.save(moments, part / "optimizer.pt")
        state = {"format": FORMAT, "step": step, "config": asdict(config) if config else {}, "metrics": metrics}
        (part / "state.json").write_text(to_json(state), encoding="utf-8")
        sums = {name: checksum(part / name) for name in files_of(part)}
        (part / "checksums.json").write_text(json.dumps(sums), encoding="utf-8")

    try:
        save_folder(folder, fill)
    except UserError as error:
        raise UserError(f"--out {out}: {error}; the last checkpoint there: {newest(out)}") from error
    shutil.rmtree(out / "earlier-run", ignore_errors=True)
    others = sorted(path for path in out.glob(PATTERN) if path != folder)
    for old in others[: max(0, len(others) - KEPT + 1)]:
        shutil.rmtree(old)


def files_of(folder: Path) -> list[str]:
    """Return the relative paths of all files in a folder and its subfolders."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def checksum(path: Path) -> str:
    """Return the SHA-256 of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


# ---------------------------------------------------------------- reading


def damage(folder: Path) -> str:
    """Return what is wrong with a checkpoint, as text; empty if it is intact."""
    try:
        sums = json.loads((folder / "checksums.json").read_text(encoding="utf-8"))
        files = set(files_of(folder)) - {"checksums.json"}
        if files != sums.keys():
            return "missing or unknown: " + ", ".join(sorted(files ^ sums.keys()))
        changed = [name for name, known in sums.items() if checksum(folder / name) != known]
        if changed:
            return ", ".join(changed)
        version = read_state(folder)["format"]
        return "" if version == FORMAT else f"format {version}, wanted {FORMAT}"
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        return f"{type(error).__name__}: {error}"


def step_of(checkpoint: Path) -> int:
    """Return the number of steps that were done when a checkpoint was written."""
    return int(checkpoint.name.rpartition("-")[2])


def read_state(checkpoint: Path) -> dict:
    """Return the content of state.json of a checkpoint."""
    return json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))


def newest(out: Path, say: Callable[[str], None] = lambda text: None) -> Path | None:
    """Return the newest intact checkpoint, or None. Damaged ones are reported with `say`."""
    for folder in sorted(out.glob(PATTERN), reverse=True):
        wrong = damage(folder)
        if not wrong:
            return folder
        say(f"{folder} is damaged ({wrong}) and is passed over")
    return None


def load(checkpoint: Path | None, model, optimizer) -> tuple[int, list[dict]]:
    """Fill the optimizer (and adapters) from a checkpoint -> (first step to do, metrics so far). Without a checkpoint
    (0, []).
    """
    if checkpoint is None:
        return 0, []
    state = read_state(checkpoint)
    if lora.layers_of(model):
        lora.load(checkpoint, model)
    moments = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    set_optimizer_state_dict(model, optimizer, moments, options=WHOLE)
    return state["step"], state["metrics"]
