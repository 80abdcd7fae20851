"""The house: imports go one way, files and functions fit a reader, every flag explains itself."""

import ast
import re
import sys

import pytest
from conftest import ROOT, caught

import bench.__main__
import drafter
import export
import generate
import test_time.config
import tlt
import train_grpo
from base import pretrain
from parts import cli as common

# a file may import files of the lines above its own, nothing else of the project
ORDER = (ROOT / "docs/walk.md").read_text().partition("## What may import what")[2]


def full_name(name: str) -> str:
    """common -> parts.common"""
    return f"parts.{name}" if (ROOT / f"parts/{name}.py").exists() else name


HEIGHT = {}
for height, line in enumerate(re.findall(r"^    (\S+(?: \S+)*)", ORDER, re.MULTILINE)):  # two spaces end the names
    HEIGHT |= {full_name(name): height for name in line.split()}
SOURCES = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv", "runs"} & set(path.relative_to(ROOT).parts)]


def short(module: str) -> str:
    """The name in HEIGHT: parts.common, but bench for bench.engine."""
    first, _, rest = module.partition(".")
    return module if first == "parts" and rest else first


def imports_of(text: str) -> set[str]:
    """Modules that a file imports, by their names in HEIGHT; also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {short(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module == "parts":
            names |= {f"parts.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(short(node.module))
    return names


def check_arrows(files: dict[str, str]) -> None:
    """files: name -> its text. Every import of the project's goes up the list, so there can be no circle."""
    for name, text in files.items():
        for other in imports_of(text) & HEIGHT.keys() - {name}:
            assert HEIGHT[other] < HEIGHT[name], f"{name} imports {other}"


def project_files() -> dict[str, str]:
    """Their texts, by their names in HEIGHT; bench/ and test_time/ count as one file each."""
    files: dict[str, str] = {}
    for path in SOURCES:
        name = short(".".join(path.relative_to(ROOT).with_suffix("").parts))
        files[name] = files.get(name, "") + "\n" + path.read_text()
    return files


def test_imports_go_one_way():
    files = project_files()
    assert files.keys() == HEIGHT.keys()
    check_arrows(files)
    caught(check_arrows, {**files, "rollout": "from drafter import Drafter"})
    caught(check_arrows, {**files, "parts.modeling": "def main():\n    import tlt"})
    caught(check_arrows, {**files, "parts.sampling": "import tasks"})  # on the same line


def test_packages_have_no_circle_inside():
    for package in ("bench", "test_time"):
        arrows = {}
        for path in (ROOT / package).glob("*.py"):
            nodes = ast.walk(ast.parse(path.read_text()))
            arrows[path.stem] = set()
            for node in nodes:
                if isinstance(node, ast.ImportFrom) and node.module == package:
                    arrows[path.stem] |= {alias.name for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module.startswith(package + "."):
                    arrows[path.stem].add(node.module.split(".")[1])
        while arrows:  # take away files that import none of the rest, until nothing is left
            free = [name for name, targets in arrows.items() if not targets & arrows.keys()]
            assert free, f"a circle in {package}: {sorted(arrows)}"
            for name in free:
                del arrows[name]


def test_plain_grpo_knows_nothing_of_tlt_or_sharding():
    text = (ROOT / "train_grpo.py").read_text()
    assert not imports_of(text) & {"tlt", "parts.shard", "parts.spot", "drafter", "strategy", "safetensors", "json"}
    for word in ("fsdp", "full_tensor", "state_dict", "sharded", "safetensors"):
        assert word not in text.lower().replace("a policy that is to be sharded", "")


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_fit_a_reader(path):
    text = path.read_text()
    assert len(text.splitlines()) <= 450
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_four_scripts_stay_small():
    names = ("train_grpo.py", "rollout.py", "drafter.py", "tlt.py")
    assert sum(len((ROOT / name).read_text().splitlines()) for name in names) <= 1680


def test_dangerous_calls_are_absent():
    """Nothing evaluates text, unpickles files from outside, or runs code from the hub."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node)
            assert not call.startswith(("eval(", "exec(", "pickle."))
            assert not call.startswith("torch.load(") or "weights_only=True" in call
            assert "trust_remote_code=True" not in call


CONFIGS = {
    "train_grpo.py": train_grpo.Config,
    "tlt.py": tlt.TLTConfig,
    "drafter.py": drafter.Command,
    "generate.py": generate.Command,
    "export.py": export.Command,
    "base.pretrain": pretrain.Command,
    "test_time": test_time.config.Config,
    **{f"bench {name}": module.Config for name, module in bench.__main__.TABLES.items()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_flag_has_a_text_and_its_default(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as end:
        common.parse_flags(CONFIGS[name], "what it does", ["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in common.fields(CONFIGS[name]):
        assert len(field.metadata["help"]) >= 4, field.name
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert f"[{shown}]" in text, field.name
