"""Tasks: what the policy is asked, and how its text is graded.

A task is one small class with two methods:

    problem(split, index) -> Problem       the index-th problem of "train" or "test", the same every time it is asked for
    grade(problem, text)  -> Grade         strict: right, and in the format that was asked for (this is the reward)
                                           lenient: right answer anywhere in the text (tells format errors from thinking errors)

and, for test-time search, `final(text)` (the answer it gives), `step_end` (the token that ends a step), `again` (what stands between two attempts) and `longest` (tokens
of an attempt, at most).

Countdown is one task at two scales. A language model reads the well-known prompt ("use the numbers [..] to make N", think in
<think>, answer in <answer>); the tiny from-scratch model of pretrain.py reads `3,7,8=29<think>` and writes search traces. Both end
in `<answer> expression </answer>`, so one verifier serves both.

Verifiers are total: any text, of any length, gets a grade in bounded time. A policy under RL will write everything, so the
expression is never handed to Python's evaluator: it is cut to a short ASCII string, parsed by `ast`, and walked with + - * / over
exact fractions. (The widespread regex-then-evaluate verifiers hang on `97**98**99`.)

Left out: format rewards (they are easily farmed), partial credit, code execution tasks.
"""

import ast
import json
import operator
import random
import re
import zlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path


class UserError(Exception):
    """A mistake of the user's: shown as one line (what, which value, how to mend it), exit status 2, no traceback."""


@dataclass(frozen=True)
class Problem:
    prompt: str     # the question in words, for a language model
    trace: str      # the same question for the tiny model ("" if the task has no such form)
    answer: object  # what the verifier needs: (numbers, target) or the gold number


@dataclass(frozen=True)
class Grade:
    strict: bool
    lenient: bool


def answer_tag(text):
    """The text between the last <answer> and the </answer> after it, or None. Linear time: plain searches, no regex."""
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    return None if start < 0 or end < 0 else text[start + len("<answer>"):end]


# ---------------------------------------------------------------- Countdown

OPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MAX_EXPRESSION = 120  # characters; with 6 numbers of 2 digits and all brackets one needs about 40


def evaluate(expression):
    """(value, numbers used) of an arithmetic expression over whole numbers with + - * / and brackets; None if it is anything else."""
    if len(expression) > MAX_EXPRESSION or not re.fullmatch(r"[0-9+\-*/() ]+", expression):
        return None
    numbers = []

    def walk(node):
        if isinstance(node, ast.Constant) and type(node.value) is int:
            numbers.append(node.value)
            return Fraction(node.value)
        if isinstance(node, ast.BinOp) and type(node.op) in OPS:
            return OPS[type(node.op)](walk(node.left), walk(node.right))
        raise ValueError(f"not arithmetic: {type(node).__name__}")

    try:  # the walk covers ** and // (not in OPS), calls such as 3(4), signs; the parser itself gives up on deep brackets
        return walk(ast.parse(expression.strip(), mode="eval").body), numbers
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


class Countdown:
    """Make the target from the numbers, each used exactly once. Held-out problems share no (numbers, target) pair with training.

    sizes: how many numbers, drawn evenly from this tuple. high: numbers are 1..high. The target is made by a random solution
    whose intermediate results are whole and at most 99.
    """

    def __init__(self, sizes=(3, 3, 4), high=10):
        self.sizes, self.high = tuple(sizes), high

    def problem(self, split, index):
        rng = random.Random(f"countdown {split} {index}")
        while True:
            numbers = [rng.randint(1, self.high) for _ in range(rng.choice(self.sizes))]
            target = random_target(numbers, rng)
            held_out = zlib.crc32(repr((sorted(numbers), target)).encode()) % 8 == 0
            if target and target not in numbers and held_out == (split == "test"):
                return countdown_problem(numbers, target)

    def grade(self, problem, text):
        numbers, target = problem.answer

        def right(expression):
            got = evaluate(expression)
            return got is not None and got[0] == target and sorted(got[1]) == sorted(numbers)

        tag = answer_tag(text)
        strict = tag is not None and right(tag)
        # lenient: any of the last 20 stretches of arithmetic in the last 2,000 characters ("... so 7*3+8 = 29")
        candidates = re.findall(r"[0-9+\-*/() ]{3,}", text[-2000:])[-20:]
        return Grade(strict, strict or any(right(c) for c in candidates))


def combine(a, b):
    """All (symbol, x, y, result) of two whole numbers whose result is whole and in 1..99."""
    if a < b:
        a, b = b, a
    found = [("+", a, b, a + b), ("*", a, b, a * b), ("-", a, b, a - b)]
    if b > 1 and a % b == 0:
        found.append(("/", a, b, a // b))
    return [f for f in found if 0 < f[3] <= 99]


def random_target(numbers, rng):
    """The value of one random solution over all the numbers (None if it left 1..99)."""
    state = list(numbers)
    while len(state) > 1:
        rng.shuffle(state)
        options = combine(state.pop(), state.pop())
        if not options:
            return None
        state.append(rng.choice(options)[3])
    return state[0]


def countdown_problem(numbers, target):
    return Problem(
        f"Using the numbers {list(numbers)}, create an equation that equals {target}. You can use basic arithmetic operations "
        "(+, -, *, /) and each number exactly once. Show your work in <think> </think> tags, and return the final answer "
        "in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.",
        f"{','.join(map(str, numbers))}={target}<think>", (tuple(numbers), target))


# ---------------------------------------------------------------- Chain


class Chain:
    """Functions applied one after the other: `7:cfa=` wants f(c(7)), then a of that, a step a line: `c12;f3;a29;#29`.

    Made for test-time search (test_time.py): steps show their values, the final answer is canonical, and a step that is wrong is never made good later, since
    the functions are affine and invertible: x -> (m x + b) mod 31. A tiny policy has to know the 16 of them by heart.
    """

    LETTERS, MODULUS = "abcdefghijklmnop", 31
    step_end, again, longest = ";", "|", 48

    @staticmethod
    def apply(name, x):
        m, b = (zlib.crc32(f"{part} {name}".encode()) for part in ("factor", "summand"))
        return ((m % 29 + 2) * x + b) % 31

    def problem(self, split, index):
        rng = random.Random(f"chain {split} {index}")
        while True:
            start, names = rng.randrange(self.MODULUS), "".join(rng.choices(self.LETTERS, k=rng.randint(1, 10)))
            if (zlib.crc32(f"{start}{names}".encode()) % 8 == 0) == (split == "test"):
                break
        y = start
        for name in names:
            y = self.apply(name, y)
        words = ", ".join(f"{n}(x) = {(self.apply(n, 1) - self.apply(n, 0)) % 31} x + {self.apply(n, 0)}" for n in sorted(set(names)))
        return Problem(f"All numbers are modulo 31. {words}. Start with {start} and apply {', then '.join(names)}. Write each step as a function's name and its "
                       "result, ended by a semicolon, and at the end # and the last result.", f"{start}:{names}=", (start, names, y))

    def final(self, text):
        """The answer that a text gives, or None. Equal answers are equal strings."""
        found = re.match(r"\s*([0-9]{1,3})(?![0-9])", text.rpartition("#")[2]) if "#" in text else None
        return str(int(found[1])) if found else None

    def grade(self, problem, text):
        right = self.final(text) == str(problem.answer[2])
        return Grade(right, right)


# ---------------------------------------------------------------- GSM8K

NUMBER = re.compile(r"[-+]?\d{1,15}(?:,\d{3}){0,5}(?:\.\d{1,10})?", re.ASCII)


def last_number(text):
    """The last number in the last 400 characters of the text, as an exact fraction; None if there is none."""
    found = NUMBER.findall(text[-400:])
    return Fraction(found[-1].replace(",", "")) if found else None


class GSM8K:
    """Grade-school mathematics. source: "hub" (openai/gsm8k, config main) or a folder with train.jsonl and test.jsonl of its format."""

    step_end, again, longest = "\n", "\nOnce more:\n", 512

    def __init__(self, source="hub"):
        self.source, self.splits = source, {}

    def rows(self, split):
        if split not in self.splits:
            if self.source == "hub":
                try:
                    from datasets import load_dataset
                    self.splits[split] = list(load_dataset("openai/gsm8k", "main", split=split))
                except Exception as error:  # the hub's failures have many types; the mend is the same for all
                    raise UserError(f"cannot load openai/gsm8k from the hub ({type(error).__name__}): "
                                    "give a local folder with --data") from error
            else:
                self.splits[split] = read_jsonl(Path(self.source) / f"{split}.jsonl")
        return self.splits[split]

    def problem(self, split, index):
        rows = self.rows(split)
        row = rows[index % len(rows)]
        return Problem(row["question"] + "\nReason step by step in <think> </think> tags, then give the final number in "
                       "<answer> </answer> tags.", "", last_number(row["answer"].split("####")[-1]))

    def final(self, text):
        """The answer that a text gives, or None. Equal answers are equal strings."""
        tag = answer_tag(text)
        # a gold solution ends in "#### 72": also a format that models know
        stated = tag if tag is not None else text.rpartition("####")[2] if "####" in text else None
        number = last_number(stated) if stated is not None and len(stated) < 100 else None
        return None if number is None else str(number)

    def grade(self, problem, text):
        strict = self.final(text) == str(problem.answer)
        return Grade(strict, strict or last_number(text) == problem.answer)


def read_jsonl(path):
    """Rows with a "question" and a gold "answer" ending in `#### number`. Raises UserError naming the file and the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = []
    for n, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}, line {n}: not JSON ({error})") from error
        if not (isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
            raise UserError(f"{path}, line {n}: wants an object with the strings \"question\" and \"answer\"")
        if last_number(row["answer"].split("####")[-1]) is None or "####" not in row["answer"]:
            raise UserError(f"{path}, line {n}: the answer must end in `#### number`, got ...{row['answer'][-40:]!r}")
        rows.append(row)
    if not rows:
        raise UserError(f"{path}: holds no problems")
    return rows


# ---------------------------------------------------------------- from problem to tokens

BASE_PROMPT = ("A conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
               "User: {}\nAssistant: Let me solve this step by step.\n<think>")


def encode_prompt(problem, tokenizer, style="auto"):
    """Token ids of the prompt, a list of int.

    style: "trace" (the tiny model's own language), "chat" (the tokenizer's chat template), "base" (a plain-text dialogue for
    models without one), or "auto": what the tokenizer's config says, else chat. Raises UserError if the style does not fit.
    """
    if style == "auto":
        style = tokenizer.init_kwargs.get("prompt_style", "chat")
    if style == "trace":
        if not problem.trace:
            raise UserError("this task has no trace form: the tiny models know --task countdown (base) and chain (base/chain) only")
        return tokenizer.encode(problem.trace, add_special_tokens=False)
    if style == "base":
        return tokenizer.encode(BASE_PROMPT.format(problem.prompt))
    if style != "chat":
        raise UserError(f"prompt style {style!r} is none of auto, trace, chat, base")
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path} has no chat template: use --prompt-style base")
    text = tokenizer.apply_chat_template([{"role": "user", "content": problem.prompt}], tokenize=False, add_generation_prompt=True)
    return tokenizer.encode(text, add_special_tokens=False)


def make_task(name, data=""):
    """The task of that name. data: "" for its default source, or a folder. A new task is one line here. Raises UserError."""
    known = {"countdown": Countdown, "countdown-hard": lambda: Countdown(sizes=(3, 4), high=99),  # the scale for real language models
             "chain": Chain, "gsm8k": lambda: GSM8K(data or "hub")}
    if name not in known:
        raise UserError(f"task {name!r} is none of {', '.join(known)}")
    return known[name]()
