"""Answers in texts: numbers are read as a person reads them, boxes with their brackets in pairs, and answers in LaTeX
are compared by a child process, which may hang.
"""

import random
import threading
from fractions import Fraction

import pytest
from conftest import cases, caught
from hypothesis import given
from hypothesis import strategies as st

from parts.cli import UserError
from parts.tasks import answers
from parts.tasks.answers import LOOKED_AT, LatexChecker, answer_tag, boxed_answer, last_number
from parts.tasks.latex_worker import only_a_word
from tasks import Chain, Countdown, Problem, make_task

# ---------------------------------------------------------------- the number at a text's end

NUMBERS = {
    "42": ["42", "042", "42.0", "+42", "$42", "US$42", "42 apples", "42kg", "42%", "**42**", "(42)", "x = 42", "1. 42"],
    "42 ": ["10 + 32 = 42", "40 or 42", "84/2", "84 / 2", "\\frac{84}{2}", "\\boxed{42}", "\\$42", "the answer - 42"],
    "42  ": ["5, 42", "1: 42", "7\n42", "so:\n- 42", "Rs.42", "is *42*", "42.", "it is\u00a042", "$84/2$"],
    "-42": ["-42", "\u221242", "\u201342", "- 42", "= -42", "-$42", "$-42", "-(42)", "-84/2", "-\\frac{84}{2}"],
    "1234": ["1,234", "1 234", "1{,}234", "1\\,234", "1\u202f234", "1234.0", "$1,234.00"],
    "3/4": ["3/4", ".75", "0.75", "\\frac{3}{4}", "\\dfrac{3}{4}", "75/100"],
    "1/42": ["1/42", "\\frac{1}{42}"],
    "12345678901234542": ["12345678901234542", "12 345 678 901 234 542"],
}
NO_NUMBERS = (
    "; none; 1e42; 0x42; x42; x-42; 2^42; 2^{42}; 10-20; 10 - 20; 10\u201320; 10\u221220; 6*7; 6 x 7; 6 \\times 7; "
    "40+2; 40 + 2; 40 +\n2; 1 1/2; (1+84)/2; 1/2/3; 84/0; 84/-2; 2(42); f(42); x*42; x + 42; n/42; \\sqrt{42}; 10:42; "
    "1,42; 1.2.3; 1.234,5; 12,34,567; 1,234 567; 1234 567; 1_000; 1'234; "
    "2024-01-42; 42\u00b2; \u0664\u0662; 4\u0662; \u066442"
).split("; ")


def check_numbers(read):
    for value, texts in NUMBERS.items():
        for text in texts:
            assert read(text) == Fraction(value.strip()), text
    for text in NO_NUMBERS:
        assert read(text) is None, text


def test_numbers_are_read_as_a_person_reads_them(monkeypatch):
    check_numbers(last_number)
    caught(check_numbers, lambda text: Fraction((answers.NUMBER.findall(text) or "0")[-1].replace(",", "")))
    for name, broken in [
        ("joins", lambda gap: False),
        ("JOINS_WITHOUT_SPACE", set()),
        ("SPELLINGS", {}),
        ("sign_before", lambda text, start, previous: 1),
        ("LATEX_FRACTION", answers.re.compile("(x)(y)(?!)")),
        ("OPENING", ""),
    ]:
        with monkeypatch.context() as patch:
            patch.setattr(answers, name, broken)
            caught(check_numbers, last_number)


SPACES = [",", " ", "{,}", "\\,", "\u202f"]
BEFORE = ["", "so ", "x = ", "**", "$", "\\boxed{", "The answer is ", "7 + 3 = ", "5 of "]
AFTER = ["", ".", " apples", "%", "**", "}", "\n"]


@cases(300)
@given(
    st.integers(0, 10**12),
    st.integers(0, 99) | st.none(),
    st.sampled_from(["", "-", "\u2212"]),
    *map(st.sampled_from, (SPACES, BEFORE, AFTER)),
)
def test_any_number_is_read_in_any_spelling(whole, cents, sign, space, before, after):
    text = f"{whole:,}".replace(",", space) + ("" if cents is None else f".{cents:02}")
    value = whole + Fraction(cents or 0, 100)
    assert last_number(before + sign + text + after) == (-value if sign else value)


@cases(200)
@given(st.integers(0, 10**6), st.sampled_from("+ - * / ^ x e : . , '".split()), st.integers(0, 10**6))
def test_no_number_is_read_from_an_expression(a, operator, b):
    got = last_number(f"{a}{operator}{b}")
    spellings = {"/": Fraction(a, b) if b else None}
    if operator in ".,":
        spellings = {".": Fraction(f"{a}.{b}"), ",": Fraction(f"{a}{b}") if len(str(b)) == 3 and a < 1000 else None}
    assert got == spellings.get(operator)


def test_a_number_that_may_begin_before_the_part_that_is_read_is_none():
    assert last_number("9" * 400) == int("9" * 400)
    assert last_number("1" + "9" * 400) is None
    assert last_number("x" * 399 + " 42") == 42
    assert last_number("1" + "." * 398 + "42") == 42


# ---------------------------------------------------------------- only the end of a text is looked at


class Long:
    """A long text that only allows its last characters to be taken."""

    def __init__(self, end: str):
        self.end = end

    def __len__(self):
        return 10_000_000

    def __getitem__(self, part):
        assert isinstance(part, slice)
        assert part.stop is part.step is None
        assert part.start is not None and -LOOKED_AT <= part.start < 0
        return ("x" * LOOKED_AT + self.end)[part]

    def __getattr__(self, name):
        raise AssertionError(f"{name} of a whole text")


def check_looks_at_the_end(countdown, chain, gsm8k):
    assert countdown.grade(Problem("", "", ((3, 7, 8), 29)), Long("<answer>7*3+8</answer>")).strict
    assert countdown.grade(Problem("", "", ((3, 7, 8), 29)), Long("so 7*3+8 is it")).lenient
    assert chain.grade(Problem("", "", ("", "", 7)), Long("#7")).strict
    assert gsm8k.grade(Problem("", "", Fraction(7)), Long("#### 7")).strict
    assert gsm8k.grade(Problem("", "", Fraction(7)), Long("<answer>7</answer>")).strict
    assert gsm8k.grade(Problem("", "", Fraction(7)), Long("is 7")).lenient


def test_a_grade_looks_at_a_bounded_number_of_characters(monkeypatch):
    good = (Countdown(), Chain(), make_task("gsm8k"))
    check_looks_at_the_end(*good)
    assert boxed_answer(Long("\\boxed{7}")) == "7"
    assert boxed_answer("\\boxed{" + "{}" * 300 + "}") is None  # longer than an answer may be

    class WholeChain(Chain):
        def final(self, text):
            return super().final("#" + text.rpartition("#")[2])

    caught(check_looks_at_the_end, good[0], WholeChain(), good[2])
    monkeypatch.setattr("tasks.answer_tag", lambda text: text[text.rfind("<answer>") : text.rfind("</answer>")])
    caught(check_looks_at_the_end, *good)


def check_evaluations(task, monkeypatch):
    """A text with thousands of expressions has at most 21 of them evaluated."""
    calls = []
    with monkeypatch.context() as patch:
        patch.setattr("tasks.evaluate", lambda text: calls.append(text))
        task.grade(Problem("", "", ((3, 7, 8), 29)), "1+1 x " * 1000 + "<answer>1+1</answer>")
    assert 2 <= len(calls) <= 21


def test_a_grade_evaluates_a_bounded_number_of_expressions(monkeypatch):
    class EveryExpression(Countdown):
        def grade(self, problem, text):
            found = [super(EveryExpression, self).grade(problem, part) for part in text.split("x")]
            return found[-1]

    check_evaluations(Countdown(), monkeypatch)
    caught(check_evaluations, EveryExpression(), monkeypatch)


# ---------------------------------------------------------------- answers between tags and in boxes


def test_the_text_between_the_last_answer_tags():
    assert answer_tag("<answer>1</answer> <answer>\n2\n</answer>") == "\n2\n"
    assert answer_tag("<answer>1</answer><answer>2") is None
    assert answer_tag("</answer>") is answer_tag("") is None


BOXES = {
    "\\boxed{1} or \\boxed{ 2 } it is": "2",
    "\\boxed{\\frac{1}{2}}.": "\\frac{1}{2}",
    "\\boxed{\\{1, 2\\}}": "\\{1, 2\\}",
    "\\boxed{\\left\\{1\\right.}}": "\\left\\{1\\right.",
    "\\boxed{\\\\}": "\\\\",
    "\\boxed{\\boxed{3}}": "3",
    "\\boxed{}": "",
    "\\boxed{1} \\boxed{2": "1",
    "\\boxed{1} \\fbox{2}": "2",
    "\\boxed 5.": "5",
    "\\boxed2.5 it is": "2.5",
    "\\boxed {7}": "7",
}


def check_boxes(read):
    for text, content in BOXES.items():
        assert read(text) == content
    for text in ("", "42", "\\boxed", "\\boxed{", "\\boxed{{1}", "\\boxed{1\\}"):
        assert read(text) is None


def test_the_content_of_the_last_box():
    def to_the_first_bracket(text):
        start = text.rfind("\\boxed{")
        end = text.find("}", start)
        return text[start + 7 : end].strip() if start >= 0 and end >= 0 else None

    check_boxes(boxed_answer)
    caught(check_boxes, to_the_first_bracket)
    caught(check_boxes, lambda text: boxed_answer(text.replace("\\{", "{").replace("\\}", "}")))


def paired(parts):
    """Return "{a}b" for (a, b)."""
    return "{" + parts[0] + "}" + parts[1]


PAIRED = st.recursive(st.text("ab1 ", max_size=3), lambda s: st.tuples(s, s).map(paired), max_leaves=8)


@cases(200)
@given(PAIRED, st.text(max_size=20))
def test_brackets_in_pairs_are_one_answer(content, rest):
    rest = rest.replace("\\boxed", "")
    assert boxed_answer("see \\boxed{" + content + "}" + rest) == content.strip()


# ---------------------------------------------------------------- the child process that compares answers

STUB = """
import __main__
import signal
import time
__main__.SECONDS = {seconds}
class LatexExtractionConfig:
    def __init__(self, **settings): pass
parsed = []
def parse(text, how, parsing_timeout):
    assert parsing_timeout is None
    parsed.append(text)
    print("a library prints")
    if "raise" in text: raise ValueError(text)
    start = time.process_time()
    if "slow" in text:
        while time.process_time() < 60:
            try: sum(range(1000))
            except BaseException: pass
            if "bounded" in text and time.process_time() > start + 0.5: break
    return text
def verify(gold, given, timeout_seconds):
    assert timeout_seconds is None
    return parsed.count(gold) == 1 if "once" in given else "same" in given
"""


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """Install a fake math_verify, which does what the texts say -> a function that writes another one."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    def write(seconds: float = 0.1, more: str = "") -> None:
        (tmp_path / "math_verify.py").write_text(STUB.replace("{seconds}", str(seconds)) + more)

    write()
    return write


@pytest.fixture
def checker():
    checker = LatexChecker()
    yield checker
    checker.close()


def check_slow(checker):
    """The answer is no, though the child process would say yes half a second later."""
    assert not checker.equal("1", "slow bounded same")


def test_a_child_process_whose_time_is_up_is_replaced(stub, checker, monkeypatch):
    starts = []
    start = answers.start_child
    monkeypatch.setattr(answers, "start_child", lambda: starts.append(1) or start())
    assert checker.equal("1", "same")
    assert not checker.equal("1", "another")
    assert not checker.equal("1", "raise same")
    assert len(starts) == 1
    check_slow(checker)
    check_slow(checker)  # the answer is remembered
    assert checker.equal("2", "same")
    assert len(starts) == 2
    stub(seconds=60)
    checker.close()
    checker.ask.cache_clear()
    caught(check_slow, checker)


FORGETFUL = """
import functools
import sympy.parsing.sympy_parser
import sympy.physics.units
functools.lru_cache = lambda maxsize: lambda function: function
"""


def check_gold_is_parsed_once():
    checker = LatexChecker()
    replies = [checker.equal("1", text) for text in ("another", "once", "and once more")]
    checker.close()
    assert replies == [False, True, True]


def test_a_gold_answer_is_parsed_once(stub):
    check_gold_is_parsed_once()
    stub(more=FORGETFUL)
    caught(check_gold_is_parsed_once)


def test_any_answer_is_compared_and_from_any_thread(stub, checker):
    replies = []
    thread = threading.Thread(target=lambda: replies.append(checker.equal("1", "same")))
    thread.start()
    thread.join()
    assert replies == [True]
    assert checker.found("1", "x" * 5000 + "same") and not checker.found("1", "same" + "x" * 5000)
    for text in ("\ud800", "\x00", "\n", "yes\nyes", '"]', "\u2028"):
        assert not checker.equal("1", text)
        assert checker.equal("1", text + "same")


def test_equal_texts_need_no_child_process(monkeypatch):
    monkeypatch.setattr(answers, "start_child", lambda: pytest.fail("a child process was started"))
    assert LatexChecker().equal("\\frac{1}{2}", " \\frac {1} {2}")


def test_a_child_process_that_does_not_start_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "math_verify.py").write_text("raise ImportError('antlr is\\nof another version')")
    with pytest.raises(UserError, match="antlr is of another version.*pip install math-verify"):
        LatexChecker().equal("1", "2")
    (tmp_path / "math_verify.py").write_text("import os; os._exit(1)")
    with pytest.raises(UserError, match="no reason given"):
        LatexChecker().equal("1", "2")


def check_guard(guard):
    passed = guard(lambda code, *names: code)
    for code in ("Integer (42 )", "Float ('0.5' )", "Symbol ('kilo' )", "E "):
        assert passed(code, {}, {}) == code
    for code in (
        "exit ( )",
        "Integer (9 )**Integer (9 )",
        "__import__ ('os' ).system ('ls' )",
        "Symbol ('x' ) .y ",
        "f ('x' )",
    ):
        with pytest.raises(ValueError):
            passed(code, {}, {})
            raise AssertionError(code)


def test_only_single_numbers_and_names_are_evaluated():
    check_guard(only_a_word)
    caught(check_guard, lambda evaluate: evaluate)


# ---------------------------------------------------------------- with math-verify itself

EQUAL = [
    ("\\frac{1}{2}", "0.5"),
    ("\\frac{1}{2}", "\\dfrac12"),
    ("x^2+2x+1", "(x+1)^2"),
    ("\\left(3, \\frac{\\pi}{2}\\right)", "(3, \\pi/2)"),
    ("\\{1,2\\}", "\\{2, 1\\}"),
    ("2\\sqrt{3}", "\\sqrt{12}"),
    ("1,234", "1234"),
    ("\\text{(A)}", "\\text{(A)}"),
    ("[0,1)", "[0, 1)"),
    ("5", "x = 5"),
]
UNEQUAL = [
    ("42", "-42"),
    ("42", "12345678901234542"),
    ("42", "1/42"),
    ("[0,1)", "[0,1]"),
    ("(1,2)", "(2,1)"),
    ("5", ""),
]


@pytest.fixture(scope="module")
def real():
    pytest.importorskip("math_verify")
    checker = LatexChecker()
    yield checker
    checker.close()


def test_answers_in_latex_are_compared_by_value(real):
    for gold, answer in EQUAL:
        assert real.equal(gold, answer), (gold, answer)
    for gold, answer in UNEQUAL:
        assert not real.equal(gold, answer), (gold, answer)
    assert real.found("\\frac{1}{2}", "So the final answer is $0.5$.")
    assert not real.found("\\frac{1}{2}", "So the final answer is $0.6$.")
    assert not real.found("42", "I know nothing")


def test_no_text_is_run_as_code(real, tmp_path):
    harm = tmp_path / "harm"
    rng = random.Random(0)
    for code in (
        f"__import__('os').system('touch {harm}')",
        f"\\text{{open('{harm}','w')}}",
        "exit()",
    ):
        assert not real.equal("42", code)
    for _ in range(10):
        assert real.equal("42", "".join(rng.choices("\\{}^_frac()[]$,.=x 19\ud800\x00", k=12))) in (True, False)
    assert not harm.exists()
    assert real.equal("42", "42.0")
