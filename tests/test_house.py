"""Rules for all files: imports go one way, functions are short, every flag has a description and shows its default."""

import ast
import re
import sys

import pytest
from conftest import ROOT, caught

import base.merge
import base.searcher
import base.smollm2
import bench.__main__
import bench.memory
import drafter
import export
import generate
import test_time.config
import tlt
import train_grpo
from base import pretrain
from parts.cli import fields, parse_flags

# ---------------------------------------------------------------- what may import what

# a file may import files of the lines above its own, and no others of the project
ORDER = (ROOT / "docs/walk.md").read_text().partition("## What may import what")[2]


def full_name(name: str) -> str:
    """Return the module of a name in the list: engine/sampling -> parts.engine.sampling, cli -> parts.cli."""
    return "parts." + name.replace("/", ".") if (ROOT / f"parts/{name}.py").exists() else name


HEIGHT = {}  # module -> the number of its line
for height, line in enumerate(re.findall(r"^    (\S+(?: \S+)*)", ORDER, re.MULTILINE)):  # two spaces end the names
    HEIGHT |= {full_name(name): height for name in line.split()}
SOURCES = [path for path in ROOT.rglob("*.py") if not {"tests", ".venv", "runs"} & set(path.relative_to(ROOT).parts)]
PACKAGES = {"base", "bench", "test_time"}  # each counts as one file
SCRIPTS = {path.stem for path in ROOT.glob("*.py")} | PACKAGES


def short_name(module: str) -> str:
    """Return the name of a module in HEIGHT: parts.cli stays, bench.engine becomes bench."""
    first, _, rest = module.partition(".")
    return module if first == "parts" and rest else first


def imports_of(text: str) -> set[str]:
    """Return the modules that a file imports, also inside functions, by their names in HEIGHT."""
    names = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            names |= {short_name(alias.name) for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "a relative import"
            names.add(short_name(node.module))
            names |= {short_name(f"{node.module}.{alias.name}") for alias in node.names}
    return names


def project_files() -> dict[str, str]:
    """Return the texts of all files by their names in HEIGHT."""
    files: dict[str, str] = {}
    for path in SOURCES:
        name = short_name(".".join(path.relative_to(ROOT).with_suffix("").parts))
        files[name] = files.get(name, "") + "\n" + path.read_text()
    return files


def check_imports_go_up(files: dict[str, str]) -> None:
    """Every file imports only files of the lines above its own, so there can be no circle. files: name -> text."""
    for name, text in files.items():
        for other in imports_of(text) & HEIGHT.keys() - {name}:
            assert HEIGHT[other] < HEIGHT[name], f"{name} imports {other}"


def test_every_file_is_in_the_list():
    assert project_files().keys() == HEIGHT.keys()


def test_imports_go_one_way():
    files = project_files()
    check_imports_go_up(files)
    caught(check_imports_go_up, {**files, "rollout": "from drafter import Drafter"})
    caught(check_imports_go_up, {**files, "parts.engine.kv_cache": "def main():\n    import tlt"})
    caught(check_imports_go_up, {**files, "parts.devices": "from parts.engine.forward import forward"})
    caught(check_imports_go_up, {**files, "parts.devices": "from parts.engine import forward"})
    caught(check_imports_go_up, {**files, "report": "import tasks"})  # on the same line


def check_parts_import_no_scripts(files: dict[str, str]) -> None:
    """Nothing in parts/ imports a script, or bench, test_time and base. files: name -> text."""
    for name, text in files.items():
        if name.startswith("parts."):
            assert not imports_of(text) & SCRIPTS, name


def test_parts_import_no_scripts():
    files = project_files()
    scripts = "train_grpo rollout drafter spot tlt strategy tasks report generate export bench test_time base".split()
    assert set(scripts) <= SCRIPTS
    check_parts_import_no_scripts(files)
    for script in scripts:
        for text in (
            f"import {script}",
            f"from {script} import x",
            f"def function():\n    import {script}.x",
            f"class Class:\n    def method(self):\n        from {script}.x import y",
        ):
            caught(check_parts_import_no_scripts, {**files, "parts.running.demo": text})


def check_no_circle(imports: dict[str, set[str]]) -> None:
    """imports: file -> the files that it imports."""
    left = dict(imports)
    while left:  # take away the files that import none of the rest, until no file is left
        free = [name for name, targets in left.items() if not targets & left.keys()]
        assert free, f"a circle: {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("package", ["bench", "test_time"])
def test_packages_have_no_circle_of_imports(package):
    imports = {}
    for path in (ROOT / package).glob("*.py"):
        imports[path.stem] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == package:
                imports[path.stem] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.module.startswith(package + "."):
                imports[path.stem].add(node.module.split(".")[1])
    check_no_circle(imports)
    caught(check_no_circle, {**imports, "a": {"b"}, "b": {"c"}, "c": {"a"}})


def test_plain_grpo_knows_nothing_of_tlt_or_sharding():
    text = (ROOT / "train_grpo.py").read_text()
    others = {"tlt", "spot", "drafter", "strategy", "parts.training.fsdp", "safetensors", "json"}
    assert not imports_of(text) & others
    for word in ("fsdp", "full_tensor", "state_dict", "sharded", "safetensors"):
        assert word not in text.lower().replace("a policy that is to be sharded", "")


# ---------------------------------------------------------------- functions


def check_short_functions(text: str) -> None:
    """A function has at most 60 lines."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_functions_are_short(path):
    check_short_functions(path.read_text())


def test_a_long_function_is_caught():
    check_short_functions("def function():\n" + "    x = 1\n" * 59)
    caught(check_short_functions, "def function():\n" + "    x = 1\n" * 60)


def check_no_dangerous_calls(text: str) -> None:
    """Nothing evaluates text, unpickles files from outside, or runs code from the hub."""
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, ast.Call):
            continue
        call = ast.unparse(node)
        assert not call.startswith(("eval(", "exec(", "pickle."))
        assert not call.startswith("torch.load(") or "weights_only=True" in call
        assert "trust_remote_code=True" not in call


def test_dangerous_calls_are_absent():
    for path in SOURCES:
        check_no_dangerous_calls(path.read_text())
    for call in ("eval(x)", "exec(x)", "pickle.load(f)", "torch.load(f)", "AutoModel.load(x, trust_remote_code=True)"):
        caught(check_no_dangerous_calls, f"def function(x, f):\n    return {call}")


# ---------------------------------------------------------------- flags

CONFIGS = {
    "train_grpo.py": train_grpo.Config,
    "tlt.py": tlt.TLTConfig,
    "drafter.py": drafter.Command,
    "generate.py": generate.Command,
    "export.py": export.Command,
    "base.pretrain": pretrain.Command,
    "base.smollm2": base.smollm2.Command,
    "base.searcher": base.searcher.Command,
    "base.merge": base.merge.Command,
    "test_time": test_time.config.Config,
    "bench.memory": bench.memory.Command,
    **{f"bench {name}": module.Config for name, module in bench.__main__.TABLES.items()},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_flag_has_a_description_and_shows_its_default(name, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit) as end:
        parse_flags(CONFIGS[name], "what it does", ["--help"])
    assert end.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for field in fields(CONFIGS[name]):
        assert len(field.metadata["help"]) >= 4, field.name
        default = field.default
        shown = " ".join(map(str, default)) if isinstance(default, tuple) else str(default)
        assert f"[{shown}]" in text, field.name
