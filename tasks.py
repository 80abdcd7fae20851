"""Tasks: what the policy is asked, and how its text is graded.

A task is a small class with two methods, see `Task`:

    problem(split, index) -> Problem       the index-th problem of "train" or "test", the same every time
    grade(problem, text)  -> Grade         strict: right, and in the format that was asked for (this is the reward)
                                           lenient: right answer anywhere in the text

The two grades tell format errors from thinking errors. For search at test time a task also says how a text's steps and
final answer are found.

Countdown is one task at two scales. A language model reads the well-known prompt ("use the numbers [..] to make N",
think in <think>, answer in <answer>); the tiny model of base/pretrain.py reads `3,7,8=29<think>` and writes search
traces. Both end in `<answer> expression </answer>`, so one verifier serves both.

Verifiers are total: any text, of any length, gets a grade in bounded time. A policy under RL will write everything,
so the expression is never handed to Python's evaluator: it is cut to a short ASCII string, parsed by `ast`, and
walked with + - * / over exact fractions. (The widespread regex-then-evaluate verifiers hang on `97**98**99`.)

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

from parts.common import UserError


@dataclass(frozen=True)
class Problem:
    """A question and what its verifier needs."""

    prompt: str  # the question in words, for a language model
    trace: str  # the same question for the tiny model ("" if the task has no such form)
    answer: object  # (numbers, target), or the gold number


@dataclass(frozen=True)
class Grade:
    """Of a text."""

    strict: bool
    lenient: bool


class Task:
    """The base class of tasks. A new one needs `problem` and `grade`, and a line in `make_task`."""

    # for search at test time; a task without them cannot be searched
    step_end = ""  # the token that ends a step
    again = ""  # what stands between two attempts
    longest = 0  # tokens of an attempt, at most

    def problem(self, split: str, index: int) -> Problem:
        """The index-th problem of "train" or "test", the same every time it is asked for."""
        raise NotImplementedError

    def grade(self, problem: Problem, text: str) -> Grade:
        """Total: any text gets a grade in bounded time."""
        raise NotImplementedError

    def final(self, text: str) -> str | None:
        """The answer that a text gives, or None; equal answers are equal strings. For search at test time."""
        raise NotImplementedError


def answer_tag(text: str) -> str | None:
    """The text between the last <answer> and the </answer> after it, or None. Linear time: plain searches, no regex."""
    start = text.rfind("<answer>")
    end = text.find("</answer>", start)
    return None if start < 0 or end < 0 else text[start + len("<answer>") : end]


# ---------------------------------------------------------------- Countdown

OPS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
MAX_EXPRESSION = 120  # characters; with 6 numbers of 2 digits and all brackets one needs about 40


def evaluate(expression: str) -> tuple[Fraction, list[int]] | None:
    """(value, numbers used) of an arithmetic expression over whole numbers with + - * / and brackets; None if it is
    anything else.
    """
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

    # the walk covers ** and // (not in OPS), calls such as 3(4), and signs; the parser itself gives up on deep brackets
    try:
        return walk(ast.parse(expression.strip(), mode="eval").body), numbers
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None


class Countdown(Task):
    """Make the target from the numbers, each used exactly once. Held-out problems share no (numbers, target) pair
    with training.

    sizes: how many numbers, drawn evenly from this tuple. high: numbers are 1..high. The target is made by a random
    solution whose intermediate results are whole and at most 99.
    """

    def __init__(self, sizes=(3, 3, 4), high=10):
        self.sizes = tuple(sizes)
        self.high = high

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
    high = max(a, b)
    low = min(a, b)
    moves = [("+", high, low, high + low), ("*", high, low, high * low), ("-", high, low, high - low)]
    if low > 1 and high % low == 0:
        moves.append(("/", high, low, high // low))
    return [move for move in moves if 0 < move[3] <= 99]


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


def countdown_problem(numbers, target) -> Problem:
    """In both forms."""
    return Problem(
        f"Using the numbers {list(numbers)}, create an equation that equals {target}. You can use basic arithmetic "
        "operations (+, -, *, /) and each number exactly once. Show your work in <think> </think> tags, and return the "
        "final answer in <answer> </answer> tags, for example <answer> (1 + 2) / 3 </answer>.",
        f"{','.join(map(str, numbers))}={target}<think>",
        (tuple(numbers), target),
    )


# ---------------------------------------------------------------- Chain


class Chain(Task):
    """Functions applied one after the other: `7:cfa=` wants f(c(7)), then a of that, a step a line: `c12;f3;a29;#29`.

    Made for test-time search (test_time/): steps show their values, the final answer is canonical, and a step that
    is wrong is never made good later, since the functions are affine and invertible: x -> (m x + b) mod 31. A tiny
    policy has to know the 16 of them by heart.
    """

    LETTERS = "abcdefghijklmnop"
    MODULUS = 31
    step_end = ";"
    again = "|"
    longest = 48

    @staticmethod
    def apply(name, x):
        """The function of that letter."""
        m = zlib.crc32(f"factor {name}".encode())
        b = zlib.crc32(f"summand {name}".encode())
        return ((m % 29 + 2) * x + b) % 31

    def problem(self, split, index):
        rng = random.Random(f"chain {split} {index}")
        while True:
            start = rng.randrange(self.MODULUS)
            names = "".join(rng.choices(self.LETTERS, k=rng.randint(1, 10)))
            if (zlib.crc32(f"{start}{names}".encode()) % 8 == 0) == (split == "test"):
                break
        y = start
        for name in names:
            y = self.apply(name, y)
        functions = []
        for name in sorted(set(names)):
            summand = self.apply(name, 0)
            factor = (self.apply(name, 1) - summand) % 31
            functions.append(f"{name}(x) = {factor} x + {summand}")
        prompt = (
            f"All numbers are modulo 31. {', '.join(functions)}. Start with {start} and apply {', then '.join(names)}. "
            "Write each step as a function's name and its result, ended by a semicolon, and at the end # and the last "
            "result."
        )
        return Problem(prompt, f"{start}:{names}=", (start, names, y))

    def final(self, text):
        """As Task.final."""
        _, mark, rest = text.rpartition("#")
        match = re.match(r"\s*([0-9]{1,3})(?![0-9])", rest) if mark else None
        return str(int(match[1])) if match else None

    def grade(self, problem, text):
        right = self.final(text) == str(problem.answer[2])
        return Grade(right, right)


# ---------------------------------------------------------------- GSM8K

NUMBER = re.compile(r"[-+]?\d{1,15}(?:,\d{3}){0,5}(?:\.\d{1,10})?", re.ASCII)


def last_number(text: str) -> Fraction | None:
    """The last number in the last 400 characters of the text, as an exact fraction; None if there is none."""
    numbers = NUMBER.findall(text[-400:])
    return Fraction(numbers[-1].replace(",", "")) if numbers else None


class GSM8K(Task):
    """Grade-school mathematics. source: "hub" (openai/gsm8k, config main) or a folder with train.jsonl and test.jsonl
    of its format.
    """

    step_end = "\n"
    again = "\nOnce more:\n"
    longest = 512

    def __init__(self, source: str = "hub"):
        self.source = source
        self.splits: dict[str, list[dict]] = {}

    def rows(self, split):
        """All rows of a split, read once. Raises UserError."""
        if split not in self.splits:
            local = Path(self.source) / f"{split}.jsonl"
            self.splits[split] = self.from_hub(split) if self.source == "hub" else read_jsonl(local)
        return self.splits[split]

    def from_hub(self, split: str) -> list[dict]:
        """The rows of the hub's data set. Raises UserError."""
        try:
            from datasets import load_dataset

            return list(load_dataset("openai/gsm8k", "main", split=split))
        except Exception as error:  # the hub's failures have many types; the mend is the same for all
            problem = f"cannot load openai/gsm8k from the hub ({type(error).__name__})"
            raise UserError(f"{problem}: give a local folder with --data") from error

    def problem(self, split, index):
        rows = self.rows(split)
        row = rows[index % len(rows)]
        how = "Reason step by step in <think> </think> tags, then give the final number in <answer> </answer> tags."
        return Problem(f"{row['question']}\n{how}", "", last_number(row["answer"].split("####")[-1]))

    def final(self, text):
        """As Task.final. A gold solution ends in "#### 72": models know that format, too."""
        stated = answer_tag(text)
        if stated is None:
            _, mark, rest = text.rpartition("####")
            stated = rest if mark else None
        number = last_number(stated) if stated is not None and len(stated) < 100 else None
        return None if number is None else str(number)

    def grade(self, problem, text):
        strict = self.final(text) == str(problem.answer)
        return Grade(strict, strict or last_number(text) == problem.answer)


def read_jsonl(path: Path) -> list[dict]:
    """Rows with a "question" and a gold "answer" ending in `#### number`. Raises UserError naming the file and the
    line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read {path}: {error}") from error
    rows = [parse_row(line, f"{path}, line {n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not rows:
        raise UserError(f"{path}: holds no problems")
    return rows


def parse_row(line: str, where: str) -> dict:
    """One line of the file. Raises UserError naming `where`."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where}: not JSON ({error})") from error
    if not (isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
        raise UserError(f'{where}: wants an object with the strings "question" and "answer"')
    if last_number(row["answer"].split("####")[-1]) is None or "####" not in row["answer"]:
        raise UserError(f"{where}: the answer must end in `#### number`, got ...{row['answer'][-40:]!r}")
    return row


# ---------------------------------------------------------------- from problem to tokens

BASE_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
    "User: {}\nAssistant: Let me solve this step by step.\n<think>"
)


def encode(text: str, tokenizer, special: bool = False) -> list[int]:
    """Token ids of a text. special: with the tokenizer's own first and last tokens.

    Raises UserError for a symbol that the tokenizer has no token for: it would silently be read as <unk> or <pad>.
    """
    if not tokenizer.is_fast:  # such a tokenizer does not say which symbols made a token
        return tokenizer.encode(text, add_special_tokens=special)
    found = tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
    for token, (start, end) in zip(found["input_ids"], found["offset_mapping"]):
        if token not in (tokenizer.unk_token_id, tokenizer.pad_token_id):
            continue
        symbol = text[start:end]
        if symbol and symbol.strip() != tokenizer.convert_ids_to_tokens(token):
            shown = text if len(text) <= 40 else text[:40] + "..."
            raise UserError(
                f"{tokenizer.name_or_path or 'this tokenizer'} has no token for {symbol!r} of the prompt {shown!r}: "
                "this model cannot read it; take a language model (the tiny ones know --task countdown and chain only)"
            )
    return found["input_ids"]


def encode_prompt(problem: Problem, tokenizer, style: str = "auto") -> list[int]:
    """Token ids of the prompt, a list of int.

    style: "trace" (the tiny model's own language), "chat" (the tokenizer's chat template), "base" (a plain-text
    dialogue for models without one), or "auto": what the tokenizer's config says, else chat. Raises UserError if the
    style does not fit.
    """
    if style == "auto":
        style = tokenizer.init_kwargs.get("prompt_style", "chat")
    if style == "trace":
        if not problem.trace:
            raise UserError(
                "this task has no trace form: the tiny models know --task countdown (base) and chain (base/chain) only"
            )
        return encode(problem.trace, tokenizer)
    if style == "base":
        return encode(BASE_PROMPT.format(problem.prompt), tokenizer, special=True)
    if style != "chat":
        raise UserError(f"prompt style {style!r} is none of auto, trace, chat, base")
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path} has no chat template: use --prompt-style base")
    chat = [{"role": "user", "content": problem.prompt}]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    return encode(text, tokenizer)


def make_task(name: str, data: str = "") -> Task:
    """The task of that name. data: "" for its default source, or a folder. A new task is one line here. Raises
    UserError.
    """
    makers = {
        "countdown": Countdown,
        "countdown-hard": lambda: Countdown(sizes=(3, 4), high=99),  # the scale for real language models
        "chain": Chain,
        "gsm8k": lambda: GSM8K(data or "hub"),
    }
    if name not in makers:
        raise UserError(f"--task {name}: is none of {', '.join(makers)}")
    return makers[name]()
