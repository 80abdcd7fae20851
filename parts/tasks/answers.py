"""Answers found in texts and compared: what the tasks' verifiers are made of.

    answer_tag      what stands in <answer> </answer>
    boxed_answer    what stands in \\boxed{}
    evaluate        the value of + - * / over whole numbers
    canonical       one form for all orders and brackets of the same sums and products
    last_number     the number that a text ends with
    LatexChecker         whether two answers in LaTeX are equal

All of them are total: any text, of any length, gets an answer in bounded time. They look at the last LOOKED_AT
characters of a text only, and walk through these a fixed number of times. Nothing is handed to Python's evaluator. (The
widespread regex-then-evaluate verifiers hang on `97**98**99`.)

Equality in LaTeX is a matter for a computer algebra system, and such a system can work for hours on ten characters. So
the work is done by a child process (parts/tasks/latex_worker.py), which the kernel ends when its time is up. Signals in
this process would not do: they reach the main thread only, and not while C code runs.

Left out: mixed numbers (`1 1/2`), powers of ten (`4.2e1`), number words; a text that ends with one has no number.
"""

import ast
import functools
import json
import operator
import re
import subprocess
import sys
import threading
from fractions import Fraction

from parts.cli import UserError
from parts.files import ROOT

LOOKED_AT = 100_000  # characters, from the end of a text
ANSWER_LOOKED_AT = 500  # characters of an answer in LaTeX; the longest of MATH's 5,000 test problems has 81


def answer_tag(text: str) -> str | None:
    """Return the text between the last <answer> and the </answer> after it, or None."""
    text = text[-LOOKED_AT:]
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    return None if start < 0 or end < 0 else text[start + len("<answer>") : end]


MAX_BOXES = 20  # that are tried
BOX = re.compile(r"\\(?:boxed|fbox)\s*(?:\{|(\d+(?:\.\d+)?|[A-Za-z]))")  # \boxed{...}, \boxed 5, \boxed5, \fbox{...}


def boxed_answer(text: str) -> str | None:
    r"""Return the content of the last complete \boxed{} or \fbox{}, with its inner brackets in pairs; None if there is
    none, or if it is longer than 500 characters.
    """
    text = text[-LOOKED_AT:]
    for box in list(BOX.finditer(text))[: -MAX_BOXES - 1 : -1]:  # the last one first
        content = box[1] or closed_brackets(text[box.end() : box.end() + ANSWER_LOOKED_AT])
        if content is not None:
            return content.strip()
    return None


def closed_brackets(text: str) -> str | None:
    """Return the text up to the bracket that closes the one before it; None if none does."""
    depth = 1
    for match in re.finditer(r"\\.|[{}]", text, re.DOTALL):  # \{ and \} are no brackets
        depth += {"{": 1, "}": -1}.get(match[0], 0)
        if not depth:
            return text[: match.start()]
    return None


PROSE = re.compile(r"[A-Za-z]{2,}[\s,.]+[A-Za-z]{2,}[\s,.]+[A-Za-z]{2,}")  # three words in a row
LATEX_TEXT = re.compile(r"\\(?:text|mbox|textbf|mathrm)\s*\{[^{}]*\}")


def stated_answer(solution: str) -> str | None:
    r"""Return the final answer of a gold answer or solution: its last \boxed{}, what follows its last ####, or all of
    it if that is no prose; None if none of these.
    """
    boxed = boxed_answer(solution)
    if boxed:
        return boxed
    _, mark, last = solution.rpartition("####")
    answer = last.strip()
    return None if not answer or (not mark and PROSE.search(LATEX_TEXT.sub("", answer))) else answer


# ---------------------------------------------------------------- arithmetic

OPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MAX_EXPRESSION = 120  # characters; with 6 numbers of 2 digits and all brackets one needs about 40


# what a walk over a parsed expression may raise: ** and // are not in OPS, nor are calls such as 3(4), and signs; the
# parser itself gives up on deep brackets
NOT_ARITHMETIC = (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError)


def parse(expression: str) -> ast.expr:
    """Return the tree of an expression over whole numbers. Raises one of NOT_ARITHMETIC."""
    if len(expression) > MAX_EXPRESSION or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        raise ValueError("not arithmetic")
    return ast.parse(expression.strip(), mode="eval").body


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """Return (value, numbers used) of an arithmetic expression over whole numbers with + - * / and brackets; None if it
    is anything else. It is parsed by `ast` and evaluated over exact fractions.
    """
    numbers = []

    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPS:
            return OPS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError(f"not arithmetic: {type(node).__name__}")

    try:
        return walk(parse(expression)), numbers
    except NOT_ARITHMETIC:
        return None


# the operators of sums and of products: the first keeps an operand as it is, the second negates or inverts it
SUM = {ast.Add: "+", ast.Sub: "-"}
PRODUCT = {ast.Mult: "*", ast.Div: "/"}


def operands(node: ast.expr, level: dict, kept: bool = True) -> list[tuple[bool, ast.expr]]:
    """Return the operands of a sum or a product, brackets opened: (True if added or multiplied, operand)."""
    if not (isinstance(node, ast.BinOp) and type(node.op) in level):
        return [(kept, node)]
    right_kept = kept == (type(node.op) in (ast.Add, ast.Mult))
    return operands(node.left, level, kept) + operands(node.right, level, right_kept)


def canonical(expression: str) -> str | None:
    """Return one form for all expressions that differ only in the order and the brackets of their sums and products:
    2*(3+4), (4+3)*2 and (3+4)*2 are the same answer, 2*3+2*4 is another one. None for what `evaluate` gives None.
    """

    def walk(node):
        if isinstance(node, ast.Constant):
            return str(node.value)
        is_sum = type(node.op) in SUM
        level = SUM if is_sum else PRODUCT
        kept_sign, other_sign = level.values()
        parts = []
        for kept, operand in operands(node, level):
            text = walk(operand)
            in_brackets = not is_sum and isinstance(operand, ast.BinOp)
            parts.append((not kept, f"({text})" if in_brackets else text))
        return "".join((other_sign if other else kept_sign) + text for other, text in sorted(parts))[1:]

    return walk(parse(expression)) if evaluate(expression) else None


# ---------------------------------------------------------------- the number at a text's end

NUMBER_LOOKED_AT = 400  # characters, from the end of a text
GROUPED = r"\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?!\d)"  # 1,234 and 1 234
NUMBER = re.compile(rf"(?:{GROUPED}|\d+)(?:\.\d+)?|(?<![\w.])\.\d+", re.ASCII)
ASIDE = re.compile(r"[\s(){}\[\]$€£]")
# Two numbers are one expression if this stands between them, ASIDE left out: 10-20, 6 * 7, 2(42), 1e42 ...
JOINS = re.compile(r"|[-+]{1,2}|(?:\*\*?|[/^×÷·_xXeE]|\\times|\\cdot|\\div)[-+]?")
JOINS_WITHOUT_SPACE = {",", ".", ":", "'"}  # ... or this alone: 1,42 and 10:42, but not "1. 42"
OPENING = " $€£([{*"  # may stand between a sign and its number
SPELLINGS = str.maketrans(
    {
        **dict.fromkeys("\u2212\u2013\u2010\u2011\uff0d", "-"),  # minus signs, hyphens, the dash of ranges
        **dict.fromkeys("\u00a0\u2007\u2009\u202f~", " "),  # spaces that do not break a line
    }
)
LATEX_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]*)\}\{([^{}]*)\}")


def last_number(text: str) -> Fraction | None:
    """The number that comes last in the last 400 characters of the text, exact; None if there is none.

    It is read as a person would. 1,234 and 1 234 and 1{,}234 are one number, 84/2 is a fraction. A number that is part
    of something else is none: 10-20, 6*7, 1e42, 0x42, 2^42, x42.
    """
    end = text[-NUMBER_LOOKED_AT:].translate(SPELLINGS).replace("{,}", ",").replace("\\,", " ")
    end = LATEX_FRACTION.sub(r"(\1)/(\2)", end)
    found = list(NUMBER.finditer(end))
    if not found or end[found[-1].end() :][:1].isdigit():  # a superscript, or a digit of another script
        return None
    first = len(found) - 1
    value = number_of(found[first])
    if first and ASIDE.sub("", end[found[first - 1].end() : found[first].start()]) == "/":
        first -= 1
        value = number_of(found[first]) / value if value else None
    is_cut = len(text) > NUMBER_LOOKED_AT and found[first].start() == 0
    sign = sign_before(end, found[first].start(), found[first - 1].end() if first else 0)
    return sign * value if sign and value is not None and not is_cut else None


def number_of(match: re.Match) -> Fraction:
    """Return the value of what NUMBER matches."""
    return Fraction(re.sub("[ ,]", "", match[0]))


def sign_before(text: str, start: int, previous: int) -> int:
    """Return the sign of the number that starts there, 1 or -1; 0: it is part of something else.

    previous: where the number before it ends; 0: there is none.
    """
    gap = text[previous:start]
    if previous and (gap in JOINS_WITHOUT_SPACE or joins(gap)):
        return 0
    head = text[:start].rstrip(OPENING)
    opening = text[len(head) : start]
    left = head[:-1].rstrip(" ")[-1:]  # what stands before a sign
    is_apart = left != head[-2:-1]
    if head[-1:] == "-":
        if left.isalnum() and not is_apart:
            return 0  # x-42
        is_dash = " " in opening and (left.isalnum() or left == "\n")  # "the answer - 42", or a list
        return 1 if is_dash else -1
    if head[-1:] == "+":
        return 0 if left.isalnum() else 1
    is_operand = head[-1:].isalnum() and opening[:1] in ("", "(", "[", "*")  # x42, f(42), x*42; not \boxed{42}, US$42
    return 0 if is_operand or head.endswith(("^", "_", "/", "√", "×", "÷", "·", "\\times", "\\cdot", "sqrt")) else 1


def joins(gap: str) -> bool:
    """Return whether two numbers with this between them are one expression."""
    core = ASIDE.sub("", gap)
    return bool(JOINS.fullmatch(core)) and (bool(core) or "\n" not in gap)


# ---------------------------------------------------------------- equal answers in LaTeX

TEXT_LOOKED_AT = 1000  # characters, from the end of a text in which an answer is searched


class LatexChecker:
    """Says whether two answers are equal. It asks parts/tasks/latex_worker.py, in a child process that starts with the
    first question and ends with this process.

    A question that takes the child more than its time or memory ends the child; the answer is then no, and the next
    question starts another one. Pairs are remembered, so that what is slow is slow once.
    """

    def __init__(self):
        self.child: subprocess.Popen | None = None
        self.one_at_a_time = threading.Lock()
        self.ask = functools.lru_cache(maxsize=4096)(self.ask_child)

    def equal(self, gold: str, answer: str) -> bool:
        """Return whether two answers in LaTeX are equal. Raises UserError if the child process cannot be started."""
        if "".join(gold.split()) == "".join(answer.split()):
            return True
        return self.ask("equal", gold, answer)

    def found(self, gold: str, text: str) -> bool:
        """Return whether the answer that math-verify finds at the text's end equals the gold one. Raises UserError."""
        return self.ask("found", gold, text[-TEXT_LOOKED_AT:])

    def ask_child(self, *question: str) -> bool:
        """Ask the child process, without remembering the reply. Threads take turns."""
        with self.one_at_a_time:
            if self.child is None:
                self.child = start_child()
            try:
                self.child.stdin.write(json.dumps(question) + "\n")
                self.child.stdin.flush()
                reply = self.child.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if not reply:
                self.close()
            return reply == "yes\n"

    def close(self) -> None:
        """End the child process."""
        if self.child is not None:
            self.child.kill()
            self.child.communicate()
            self.child = None


def start_child() -> subprocess.Popen:
    """Start parts/tasks/latex_worker.py -> the process, ready for questions. Raises UserError."""
    command = [sys.executable, "-m", "parts.tasks.latex_worker"]
    pipe = subprocess.PIPE
    child = subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, text=True)
    said = child.stdout.readline().strip()
    if said != "ready":
        child.kill()
        child.communicate()
        raise UserError(f"math-verify does not start ({said or 'no reason given'}): pip install math-verify")
    return child
