import json
import random
import re
import tempfile
import time
from fractions import Fraction
from pathlib import Path

import pytest
from conftest import cases, caught
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from base.pretrain import make_tokenizer, trace
from parts.common import UserError
from tasks import GSM8K, Countdown, Problem, answer_tag, encode_prompt, evaluate, last_number, make_task, read_jsonl

PROBLEM = Problem("", "3,7,8=29<think>", ((3, 7, 8), 29))
HOSTILE = [
    "97**98**99",
    "9" * 10_000_000,
    "(" * 100_000 + "1" + ")" * 100_000,
    "(" * 55 + "1" + ")" * 55,
    "1/0",
    "1/(2-2)",
    "٣+٤",
    "3+7²",
    "",
    " ",
    "-",
    "()",
    "3(4)",
    "3.5+1",
    "1e9",
    "007",
    "0x10",
    "1_0",
    "3 if 1 else 2",
    "__import__('os')",
    "a+b",
    "3//2",
    "3%2",
    "~3",
    "+3",
    "3+7\x00",
    "\ud800",
    "3+",
    "None",
    "<answer>" * 100_000,
    "<answer>(7*3)+8</answer>" * 10_000,
    "</answer><answer>",
    "1+" * 59 + "1",
]


def test_verifiers_are_total_and_fast():
    task = Countdown()
    gsm = GSM8K()
    for text in HOSTILE:
        for wrapped in (text, f"<answer>{text}</answer>", f"#### {text}"):
            started = time.process_time()
            task.grade(PROBLEM, wrapped)
            gsm.grade(Problem("", "", Fraction(3)), wrapped)
            assert time.process_time() - started < 2, text[:40]  # a hang, not a benchmark


@cases(600)
@given(st.text(alphabet="0123456789+-*/() .<>answer=\u0663", max_size=200) | st.text(max_size=100))
def test_any_text_gets_a_grade(text):
    for wrapped in (text, f"<answer>{text}</answer>"):
        grade = Countdown().grade(PROBLEM, wrapped)
        assert grade.lenient or not grade.strict
        GSM8K().grade(Problem("", "", Fraction(3)), wrapped)


def stack_machine(text: str):
    """(value, numbers) of fully bracketed text, by the shunting-yard algorithm; None for a division by 0."""
    values = []
    operators = []
    numbers = []
    for token in re.findall(r"[0-9]+|.", text):
        if token.isdigit():
            values.append(Fraction(token))
            numbers.append(int(token))
        elif token == ")":
            b = values.pop()
            a = values.pop()
            operator = operators.pop()
            if operator == "/" and b == 0:
                return None
            values.append({"+": a + b, "-": a - b, "*": a * b, "/": a / b if b else None}[operator])
        elif token != "(":
            operators.append(token)
    return values[0], numbers


def bracketed(parts):
    """(a, operator, b) -> "(a operator b)"."""
    return f"({''.join(parts)})"


EXPRESSIONS = st.recursive(
    st.integers(1, 99).map(str), lambda s: st.tuples(s, st.sampled_from("+-*/"), s).map(bracketed), max_leaves=6
)


@cases(100)
@given(EXPRESSIONS)
def test_evaluate_agrees_with_an_independent_stack_machine(expression):
    assert evaluate(expression) == stack_machine(expression)


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("...</think><answer>(7*3)+8</answer>", True, True),
        ("<answer> 8 + 3*7 </answer>", True, True),
        ("so (7*3)+8 = 29 it is", False, True),
        ("<answer>(7*3)+8", False, True),
        ("<answer>7*3+8=29</answer>", False, True),
        ("<answer>29</answer>", False, False),
        ("<answer>7*3+8+8-8</answer>", False, False),
        ("<answer>7*3</answer>", False, False),
        ("<answer>1</answer><answer>(7*3)+8</answer>", True, True),
        ("<answer>(7*3)+8</answer><answer>1</answer>", False, True),
    ],
)
def test_countdown_grades(text, strict, lenient):
    grade = Countdown().grade(PROBLEM, text)
    assert (grade.strict, grade.lenient) == (strict, lenient)


def check_every_number_once(task):
    assert not task.grade(PROBLEM, "<answer>29</answer>").strict
    assert not task.grade(PROBLEM, "<answer>7*3+8*1</answer>").strict


def test_numbers_must_be_used_once_and_a_lax_verifier_is_caught(monkeypatch):
    check_every_number_once(Countdown())
    monkeypatch.setattr(
        Countdown,
        "grade",
        lambda self, p, text: type("G", (), {"strict": evaluate(answer_tag(text))[0] == p.answer[1]}),
    )
    caught(check_every_number_once, Countdown())


def test_gsm8k_grades_and_numbers():
    problem = Problem("", "", last_number("#### 1,234.50"))
    assert problem.answer == Fraction("1234.5")
    for text, strict, lenient in [
        ("<answer>$1,234.5</answer>", True, True),
        ("... #### 1234.5", True, True),
        ("it is 1234.50", False, True),
        ("<answer>1234</answer> 1234.5", False, True),
        ("", False, False),
        ("١٢٣٤", False, False),
    ]:
        grade = GSM8K().grade(problem, text)
        assert (grade.strict, grade.lenient) == (strict, lenient), text
    assert last_number("-5") == -5 and last_number("3/4") == 4 and last_number("none") is None


def test_gsm8k_reads_local_jsonl_and_names_bad_lines(tmp_path):
    good = json.dumps({"question": "1+1?", "answer": "two\n#### 2"})
    (tmp_path / "train.jsonl").write_text(good + "\n\n" + good)
    task = make_task("gsm8k", str(tmp_path))
    assert task.problem("train", 5).answer == 2 and task.grade(task.problem("train", 0), "#### 2").strict
    for bad in (
        "{",
        "[]",
        '{"question": 1, "answer": "#### 2"}',
        '{"question": "x", "answer": "#### none"}',
        '{"question": "x", "answer": "2"}',
        "[" * 100_000,
    ):
        (tmp_path / "bad.jsonl").write_text(good + "\n" + bad)
        with pytest.raises(UserError, match="line 2"):
            read_jsonl(tmp_path / "bad.jsonl")
    for content in (b"", b"\xff\xfe"):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="bad.jsonl"):
            read_jsonl(tmp_path / "bad.jsonl")
    with pytest.raises(UserError, match="missing.jsonl"):
        read_jsonl(tmp_path / "missing.jsonl")


LINES = [
    '{"question": "1+1?", "answer": "two\\n#### 2"}',
    '{"question": "x", "answer": "####"}',
    "[1]",
    "",
    "null",
    '{"a": 1',
]
TEXT_FILES = st.lists(st.sampled_from(LINES) | st.text(max_size=40), max_size=5).map(
    lambda lines: "\n".join(lines).encode("utf-8", "surrogatepass")
)


@cases(60)
@given(TEXT_FILES | st.binary(max_size=60))
def test_any_file_is_problems_or_a_named_mistake(content):
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(content)
        file.flush()
        try:
            rows = read_jsonl(Path(file.name))
        except UserError as error:
            assert file.name in str(error)
        else:
            assert rows
            assert all(last_number(row["answer"].rpartition("####")[2]) is not None for row in rows)


def check_splits(task):
    def pairs(split):
        problems = [task.problem(split, i) for i in range(2000)]
        return {(tuple(sorted(p.answer[0])), p.answer[1]) for p in problems}

    train = pairs("train")
    test = pairs("test")
    assert not train & test and len(test) > 400


def test_held_out_problems_are_disjoint_from_training(monkeypatch):
    check_splits(Countdown())
    assert Countdown().problem("train", 7) == Countdown().problem("train", 7) != Countdown().problem("train", 8)
    # a split that ignores the problem
    monkeypatch.setattr("tasks.zlib.crc32", lambda data: 0 if random.random() < 0.5 else 1)
    caught(check_splits, Countdown())


def test_demonstrations_are_right_and_tokens_round_trip():
    tokenizer = make_tokenizer()
    rng = random.Random(0)
    task = Countdown()
    for i in range(200):
        problem = task.problem("train", i)
        text = trace(*problem.answer, rng)
        assert tokenizer.decode(tokenizer.encode(problem.trace + text)) == problem.trace + text
        gave_up = text.endswith("</think><eos>")  # a search over 4 numbers may
        assert gave_up or task.grade(problem, text).strict
    right = 0
    for i in range(400):
        problem = task.problem("train", i)
        right += task.grade(problem, trace(*problem.answer, rng, claim=0.1, quit=0.03, slip=0.05)).strict
    assert 0.2 < right / 400 < 0.6


def test_prompt_styles(tmp_path):
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    problem = Countdown().problem("train", 0)
    assert tokenizer.decode(encode_prompt(problem, saved)) == problem.trace  # the style survives saving
    with pytest.raises(UserError, match="no token for 'A'"):
        encode_prompt(problem, tokenizer, "base")
    with pytest.raises(UserError, match="chat template"):
        encode_prompt(problem, tokenizer, "chat")
    with pytest.raises(UserError, match="no trace form"):
        encode_prompt(Problem("1+1?", "", 2), tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert encode_prompt(Problem("<pad>3,4=7", "", 7), tokenizer, "chat")  # a <pad> that is written is meant
    with pytest.raises(UserError, match="no token for 'U'"):
        encode_prompt(problem, tokenizer, "chat")
