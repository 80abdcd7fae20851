"""The README's examples run as printed, and its commands and files exist."""

import importlib
import inspect
import random
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, caught, tiny
from helpers import fixed, groups_of, make_engine, tokens_of
from test_house import HEIGHT
from test_report import responses

import report
import strategy
import tasks
import train_grpo
from parts.engine.interfaces import DraftPlan
from parts.engine.sampling import Sampling

TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def block(words: str) -> str:
    (code,) = (code for code in BLOCKS if words in code)
    return code


def test_the_example_of_a_task_runs_as_printed(tmp_path, monkeypatch):
    """reverse.py is the block and nothing else; make_task gets the two lines that are named."""
    (tmp_path / "reverse.py").write_text(block("class Reverse"))
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "reverse", raising=False)
    import_line, entry = re.search(r"the lines `(.*?)`, `(.*?)`", TEXT).groups()
    code = inspect.getsource(tasks.make_task).replace("    makers = {", f"    {import_line}\n    makers = {{{entry}")
    names = dict(vars(tasks))
    exec(code, names)
    task = names["make_task"]("reverse")
    train, test = ({task.problem(split, i).answer for i in range(50)} for split in ("train", "test"))
    assert train and test and not train & test
    problem = task.problem("train", 3)
    assert problem == task.problem("train", 3)
    assert task.grade(problem, f"<answer> {problem.answer} </answer>") == tasks.Grade(True, True)
    assert task.grade(problem, f"it is {problem.answer}") == tasks.Grade(False, True)
    assert task.grade(problem, "") == tasks.Grade(False, False)


def test_the_example_of_a_loss_runs_as_printed():
    names = dict(vars(train_grpo))
    exec(block("def policy_loss"), names)
    logp = torch.tensor([-1.0, -2.0], requires_grad=True)
    loss = names["policy_loss"](logp, logp.detach(), None, torch.tensor([1.0, -1.0]), torch.tensor([0.5, 0.5]), None)
    loss.backward()
    assert logp.grad.tolist() == [-0.5, 0.5]


def test_the_example_of_a_strategy_runs_as_printed():
    names = dict(vars(strategy))
    exec(block("class TailOnly"), names)
    tail_only = names["TailOnly"]()
    assert tail_only.choose([None] * 9) == DraftPlan()
    engine = make_engine(tiny())
    groups = groups_of(6, random.Random(1))
    plain = tokens_of(engine.generate(groups, Sampling(max_new=30)))
    assert tokens_of(engine.generate(groups, Sampling(max_new=30), tail_only)) == plain
    assert 0 < engine.stats.spec_rounds < engine.stats.rounds
    assert tokens_of(engine.generate(groups, Sampling(max_new=30), fixed("eagle", 2))) == plain


def test_the_example_of_a_metric_runs_as_printed():
    row = eval("{" + block("longest_right") + "}", dict(vars(report)), {"responses": responses(False, True)})
    assert row == {"longest_right": 2}


def headings(page) -> set[str]:
    """Of a page, as links name them."""
    lines = [line.lstrip("# ").lower() for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", line).replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_the_pages_name_exists(page):
    text = page.read_text()
    for target, _, heading in re.findall(r"\]\(([^)#]*)(#([^)]+))?\)", text):
        other = page.parent / target if target else page
        assert other.exists(), target
        assert not heading or heading in headings(other), f"{target}#{heading}"
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"(?:`|^    )make ([a-z0-9-]+)", text, re.MULTILINE):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for name in re.findall(r"`((?:tests/|bench/|test_time/|base/|parts/)?[a-z_]+\.py)`", text):
        assert (ROOT / name).exists() or (ROOT / "test_time" / name).exists(), name


def own_names(module: str) -> SimpleNamespace:
    """What a module defines; what it imports is another's."""
    names = vars(importlib.import_module(module))
    return SimpleNamespace(**{name: x for name, x in names.items() if getattr(x, "__module__", module) == module})


def check_names(text: str) -> None:
    """`file.function`, `file.Class.method` and `Class.method` are there."""
    modules = HEIGHT.keys() - {"tlt_one_page"}  # its classes have the names of others
    places = {name.rpartition(".")[2]: own_names(name) for name in modules}
    for module in list(places.values()):
        places |= {name: x for name, x in vars(module).items() if isinstance(x, type)}
    for name in re.findall(r"`([A-Za-z_]+(?:\.\w+)+)`", text):
        first, *rest = name.split(".")
        if first not in places or rest[-1] in ("py", "safetensors"):  # another library's, or a file
            continue
        place = places[first]
        for part in rest:
            assert hasattr(place, part) or part in getattr(place, "__annotations__", ()), name
            place = getattr(place, part, None)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_functions_that_the_pages_name_exist(page):
    check_names(page.read_text())


def test_a_function_that_has_moved_or_gone_is_noticed():
    caught(check_names, "the rule `rollout.Coupled`")
    caught(check_names, "`Engine.rollback` goes back")


def test_the_readme_is_read_in_one_sitting():
    assert len(TEXT.split()) <= 1350
    assert len(TEXT.splitlines()) <= 175
    assert all(len(line) <= 120 for line in TEXT.splitlines() if not line.startswith("|"))
