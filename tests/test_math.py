"""The task math: problems come from any data set with the right columns, and math-verify decides about the answers."""

import json
import re
import sys
import zlib
from types import SimpleNamespace

import datasets
import pytest
from conftest import caught
from test_loop import SMALL, run_main

import tasks
from parts.cli import UserError, check_package
from parts.tasks.data_files import read_jsonl
from tasks import Math, Problem, make_task

ROWS = [{"problem": f"{n} + 1 = ?", "solution": f"Add: $\\boxed{{{n + 1}}}$.", "answer": str(n + 1)} for n in range(40)]


class Equality:
    """A LatexChecker without math-verify: answers are equal if their texts are."""

    def equal(self, gold, answer):
        return gold == answer

    def found(self, gold, text):
        return f"is ${gold}$" in text


@pytest.fixture(autouse=True)
def installed(request, monkeypatch):
    """Most tests do without math-verify."""
    if "real" not in request.fixturenames:
        monkeypatch.setattr(tasks, "check_package", lambda *names: None)
        monkeypatch.setattr(tasks, "LatexChecker", Equality)


def write(path, rows):
    """Write rows into a .jsonl file -> its path as a text."""
    path.parent.mkdir(exist_ok=True)
    path.write_text("\n".join(json.dumps(row) for row in rows))
    return str(path)


def pairs(task, split, count=100):
    """Return the set of (question, gold answer) of the first problems of a split."""
    problems = [task.problem(split, i) for i in range(count)]
    return {(p.prompt.splitlines()[0], p.answer) for p in problems}


WANTED = {(row["problem"], row["answer"]) for row in ROWS}


# ---------------------------------------------------------------- where problems come from


def check_division(data):
    """No problem is lost, about an eighth is held out, and a problem that occurs twice is in one split."""
    task = make_task("math", data)
    train = pairs(task, "train")
    test = pairs(task, "test")
    assert train | test == WANTED
    assert not train & test
    assert 1 <= len(test) <= 12


def test_a_single_file_is_divided_into_train_and_test(tmp_path, monkeypatch):
    data = write(tmp_path / "data" / "all.jsonl", ROWS + ROWS)
    check_division(data)
    check_division(str(tmp_path / "data"))
    first = make_task("math", data)
    again = make_task("math", data)
    assert [first.problem("test", i) for i in range(9)] == [again.problem("test", i) for i in range(9)]

    def by_index(splits):
        (found,) = splits.values()
        return {"train": found[5:], "test": found[:5]}

    monkeypatch.setattr(tasks, "halves", by_index)
    caught(check_division, data)


def test_a_folder_with_both_splits_keeps_them(tmp_path):
    for name, part in (("train", ROWS[:30]), ("test", ROWS[30:]), ("other", ROWS)):
        write(tmp_path / f"{name}.jsonl", part)
    task = make_task("math", str(tmp_path))
    assert pairs(task, "train") == {(row["problem"], row["answer"]) for row in ROWS[:30]}
    assert pairs(task, "test") == {(row["problem"], row["answer"]) for row in ROWS[30:]}


def test_problems_are_shuffled(tmp_path):
    """Data files are often sorted by subject."""
    write(tmp_path / "train.jsonl", ROWS)
    write(tmp_path / "test.jsonl", ROWS)
    task = make_task("math", str(tmp_path))
    order = [task.problem("train", i).answer for i in range(40)]
    assert sorted(order, key=int) == [row["answer"] for row in ROWS] != order


def test_a_data_set_of_the_hub_is_loaded_by_name_and_config(monkeypatch):
    loaded = []

    def load_dataset(path, config):
        loaded.append((path, config))
        return {"train": iter(ROWS[:30]), "test": iter(ROWS[30:])} if path == "a/both" else {"test": iter(ROWS)}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(pairs(make_task("math", "a/both:algebra"), "train")) == 30
    check_division("a/one")
    assert loaded == [("a/both", "algebra"), ("a/one", None)]
    monkeypatch.setattr(datasets, "load_dataset", lambda path, config: {}["no network"])
    with pytest.raises(UserError, match="cannot load a/c from the hub .KeyError.*--data"):
        make_task("math", "a/c").problem("train", 0)


GOLD = [
    ({"problem": "p", "answer": "\\frac12"}, "\\frac12"),
    ({"question": "p", "answer": 204}, "204"),
    ({"question": "p", "answer": "six threes\n#### 18"}, "18"),
    ({"prompt": "p", "solution": "so \\boxed{\\frac{1}{2}} it is, \\boxed{2}."}, "2"),
    ({"problem": "p", "solution": "\\boxed{3}", "answer": "4"}, "4"),
    ({"problem": "p", "question": "q", "final_answer": " 5 "}, "5"),
]


def check_columns(columns):
    task = make_task("math", "unused", columns)
    for row, gold in GOLD:
        assert task.take(row, "place") == ("p", gold, "place")


def test_columns_are_found_by_their_names(monkeypatch):
    check_columns("")
    with monkeypatch.context() as patch:
        patch.setitem(Math.COLUMNS, "answer", ("solution", "answer", "final_answer"))
        caught(check_columns, "")
    task = make_task("math", "unused", "text, gold")
    row = {"problem": "x", "text": "p", "answer": "1", "gold": "2"}
    assert task.take(row, "place") == ("p", "2", "place")


def test_mistakes_in_the_data_are_one_line(tmp_path):
    def error(data, columns=""):
        with pytest.raises(UserError) as caught_error:
            make_task("math", data, columns).problem("test", 0)
        assert "\n" not in str(caught_error.value)
        return str(caught_error.value)

    good = ROWS[0]
    trained = next(row for row in ROWS if zlib.crc32(row["problem"].encode()) % 8)
    assert re.search(
        "bad.jsonl, line 2: no column for the answer .*--columns; has problem, text",
        error(write(tmp_path / "bad.jsonl", [good, {"problem": "p", "text": "t"}])),
    )
    assert "no column for the problem (text)" in error(write(tmp_path / "bad.jsonl", [good]), "text,answer")
    assert "line 1: no column for the problem" in error(write(tmp_path / "bad.jsonl", [[1]]))
    assert "answer must be a text that is not empty" in error(write(tmp_path / "bad.jsonl", [{**good, "answer": " "}]))
    assert "answer: wants messages" in error(write(tmp_path / "bad.jsonl", [{**good, "answer": ["1"]}]))
    assert "too few problems" in error(write(tmp_path / "bad.jsonl", [trained]))
    assert "two names are wanted" in error("x.jsonl", "problem")
    assert "two names are wanted" in error("x.jsonl", "problem,")
    assert "--data FOLDER" in error("")
    (tmp_path / "empty").mkdir()
    assert "has no such file" in error(str(tmp_path / "empty"))
    write(tmp_path / "two" / "a.jsonl", ROWS)
    write(tmp_path / "two" / "b.jsonl", ROWS)
    assert "has a.jsonl, b.jsonl" in error(str(tmp_path / "two"))
    nowhere = ["no-such", "no/such/folder", "no/such.jsonl", str(tmp_path / "no"), "~nobody/x", "a/", "x" * 5000]
    for name in [*nowhere, "tests/no"]:  # tests/ is a folder, so it is no owner on the hub
        assert "no such file or folder" in error(name), name


def test_line_separators_inside_a_text_do_not_end_a_row(tmp_path):
    """JSON may hold characters that Python's splitlines takes for the end of a line."""
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"problem": "a\u2028b\x85c"}, ensure_ascii=False), encoding="utf-8")
    assert read_jsonl(path, lambda row, where: row) == [{"problem": "a\u2028b\x85c"}]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


def test_a_missing_package_is_one_line_at_the_start(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(tasks, "check_package", check_package)
    monkeypatch.setitem(sys.modules, "math_verify", None)
    flags = ["--task", "math", "--data", write(tmp_path / "all.jsonl", ROWS), "--out", tmp_path / "out", *SMALL]
    with pytest.raises(SystemExit) as end:
        run_main(monkeypatch, "--model", model_folder, *flags)
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert end.value.code == 2
    assert "pip install math-verify" in line


# ---------------------------------------------------------------- grades


def check_cases(task, cases) -> None:
    """Check the grades of cases (gold, text, strict, lenient)."""
    for gold, text, strict, lenient in cases:
        grade = task.grade(Problem("", "", gold), text)
        assert (grade.strict, grade.lenient) == (strict, lenient), text[:40]


def check_grades(task):
    cases = [
        ("7", "so \\boxed{7}", True, True),
        ("7", "\\boxed{8} no, \\boxed{7}", True, True),
        ("7", "\\boxed{7} no, \\boxed{8}", False, False),
        ("7", "<think>\\boxed{8}</think>\\boxed{7}", True, True),
        ("7", "<think>\\boxed{7}</think> It is 8.", False, False),
        ("7", "<think>\\boxed{7}", True, True),  # the thinking is never closed
        ("7", "It is 7.", False, True),
        ("7", "It is 77.", False, False),
        ("1,234", "It is 1234.", False, True),
        ("(1, 2)", "It is 2.", False, False),
        ("x", "It is $x$.", False, True),
        ("x", "\\boxed{x", False, False),
        ("7", "", False, False),
        ("7", "\\boxed{7}" + "x" * 200_000, False, False),
    ]
    check_cases(task, cases)


def test_the_last_box_after_the_thinking_is_graded(monkeypatch):
    check_grades(make_task("math", "unused"))
    with monkeypatch.context() as patch:
        patch.setattr(tasks, "boxed_answer", lambda text: text.partition("\\boxed{")[2].partition("}")[0] or None)
        caught(check_grades, make_task("math", "unused"))
    whole = SimpleNamespace(grade=lambda problem, text: Math.grade(task, problem, text.replace("</think>", "")))
    task = make_task("math", "unused")
    caught(check_grades, whole)


@pytest.fixture
def real():
    """A task with math-verify itself, where that is installed."""
    pytest.importorskip("math_verify")
    task = make_task("math", "unused")
    yield task
    task.checker.close()


def test_grades_with_math_verify(real):
    cases = [
        ("\\frac{3}{4}", "Hence $\\boxed{0.75}$.", True, True),
        ("\\frac{3}{4}", "The final answer is $0.75$.", False, True),
        ("\\frac{3}{4}", "The final answer is $0.7$.", False, False),
        ("\\left(3, \\frac{\\pi}{2}\\right)", "\\boxed{(3, \\pi/2)}", True, True),
        ("42", "\\boxed{1e42}", False, False),
        ("42", "\\boxed{\ud800\\frac{}", False, False),
    ]
    check_cases(real, cases)
