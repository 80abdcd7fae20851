"""Tasks: what the policy is asked, and how its text is graded.

A task is a small class with two methods, see `Task`:

    problem(split, index) -> Problem       the index-th problem of "train" or "test", the same every time
    grade(problem, text)  -> Grade         strict: right, and in the format that was asked for (this is the reward)
                                           lenient: right answer anywhere in the text

The two grades distinguish format errors from reasoning errors. For search at test time a task also says how the steps
and the final answer of a text are found.

Countdown is one task at two scales. A language model reads the well-known prompt ("use the numbers [..] to make N",
think in <think>, answer in <answer>); the tiny model of base/pretrain.py reads `3,7,8=29<think>` and writes search
traces. Both end in `<answer> expression </answer>`, so one verifier serves both.

Verifiers are total: any text, of any length, gets a grade in bounded time, since a policy under RL will write
everything. parts/tasks/answers.py reads texts, parts/tasks/data_files.py reads problems from files.

The reward is 1 for a text that is strictly right, else 0, unless the task's grade gives another number.

Left out: format rewards (they are easily farmed), code execution tasks.
"""

import json
import math
import random
import re
import zlib
from collections.abc import Hashable
from dataclasses import dataclass

from parts.cli import UserError, check_package, flag, reason
from parts.tasks.answers import (
    LOOKED_AT,
    LatexChecker,
    answer_tag,
    boxed_answer,
    canonical,
    evaluate,
    last_number,
    stated_answer,
)
from parts.tasks.data_files import check_text, halves, load_splits, pick_columns, read_hub


@dataclass(frozen=True)
class TaskFlags:
    """Settings that choose the task and the form of its prompts; each a command-line flag."""

    task: str = flag(
        "countdown", "countdown, countdown-3 (three numbers), countdown-hard (numbers to 99), chain, gsm8k, math"
    )
    data: str = flag("", "gsm8k, math: a folder with train and test (.jsonl, .parquet), or owner/name; math: or a file")
    columns: str = flag(
        "", "math: the columns of problem and answer, e.g. prompt,reward_model.ground_truth; empty: found"
    )
    prompt_style: str = flag("auto", "how problems become prompts", ("auto", "trace", "chat", "base"))
    system: str = flag("", "system prompt, for chat templates")
    chat_args: str = flag("", "arguments of the chat template, as JSON, e.g. '{\"enable_thinking\": false}'")


@dataclass(frozen=True)
class Problem:
    """A question, and what its verifier needs."""

    prompt: str  # the question in words, for a language model
    trace: str  # the same question for the tiny model ("" if the task has no such form)
    answer: object  # (numbers, target), or the gold number, or the gold answer in LaTeX
    name: str = ""  # where it comes from, e.g. "data.jsonl, line 7"
    messages: list[dict] | None = None  # a whole conversation (role, content) that takes the place of `prompt` in chats


@dataclass(frozen=True)
class Grade:
    """The grade of a text. pass@k and all shares of right responses count `strict`, whatever the reward is."""

    strict: bool
    lenient: bool
    reward: float | None = None  # what the policy is rewarded with: any finite number; None: 1.0 if strict, else 0.0

    def __post_init__(self):
        """Raises UserError for a reward that is no number: it would spoil the whole step."""
        reward = float(self.strict if self.reward is None else self.reward)
        if not math.isfinite(reward):
            raise UserError(f"a task's reward is {reward}: it must be a finite number")
        object.__setattr__(self, "reward", reward)  # frozen: the way to set a field once


class Task:
    """The base class of tasks. A new one needs `problem` and `grade`, and a line in `make_task`."""

    # for search at test time; a task without them cannot be searched
    step_end = ""  # the text that ends a step: every token that contains it does
    again = ""  # what stands between two attempts
    longest = 0  # tokens of an attempt, at most

    def problem(self, split: str, index: int) -> Problem:
        """Return the index-th problem of "train" or "test", the same every time."""
        raise NotImplementedError

    def identity(self, problem: Problem) -> Hashable:
        """Return what two problems share if they are the same question."""
        return problem.prompt

    def count(self, split: str) -> int | None:
        """Return how many problems a split has; None: they are made as needed, without end."""
        return None

    def grade(self, problem: Problem, text: str) -> Grade:
        """Grade a text. Any text must get a grade in bounded time. Several threads may call it at once."""
        raise NotImplementedError

    def final(self, text: str) -> str | None:
        """The answer that a text gives, or None; equal answers are equal strings. For search at test time."""
        raise NotImplementedError


# ---------------------------------------------------------------- Countdown


class Countdown(Task):
    """Make the target from the numbers, each used exactly once. Held-out problems share no (numbers, target) pair
    with training.

    sizes: how many numbers, drawn evenly from this tuple. high: numbers are 1..high. The target is made by a random
    solution whose intermediate results are whole and at most 99.

    For search at test time, in words: a line is a step, and equal expressions (see `canonical`) are equal answers.
    """

    step_end = "\n"
    again = "\nOnce more:\n"
    longest = 640

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

    def identity(self, problem):
        """As Task.identity: the order of the numbers makes no other question."""
        numbers, target = problem.answer
        return tuple(sorted(numbers)), target

    def final(self, text):
        """As Task.final. An expression whose value is not the target is an answer, too: a wrong one."""
        stated = answer_tag(text)
        return None if stated is None else canonical(stated.strip())

    def grade(self, problem, text):
        numbers, target = problem.answer

        def right(expression):
            got = evaluate(expression)
            return got is not None and got[0] == target and sorted(got[1]) == sorted(numbers)

        tag = answer_tag(text)
        strict = tag is not None and right(tag.strip())
        # lenient: any of the last 20 stretches of arithmetic in the last 2,000 characters ("... so 7*3+8 = 29")
        candidates = re.findall(r"[0-9+\-*/() ]{3,}", text[-2000:])[-20:]
        return Grade(strict, strict or any(right(c) for c in candidates))


def combine(a, b):
    """Return all (symbol, x, y, result) of two whole numbers whose result is whole and in 1..99."""
    high = max(a, b)
    low = min(a, b)
    moves = [("+", high, low, high + low), ("*", high, low, high * low), ("-", high, low, high - low)]
    if low > 1 and high % low == 0:
        moves.append(("/", high, low, high // low))
    return [move for move in moves if 0 < move[3] <= 99]


def random_target(numbers, rng):
    """Return the value of one random solution over all the numbers (None if it left 1..99)."""
    state = list(numbers)
    while len(state) > 1:
        rng.shuffle(state)
        options = combine(state.pop(), state.pop())
        if not options:
            return None
        state.append(rng.choice(options)[3])
    return state[0]


def countdown_problem(numbers, target) -> Problem:
    """Return the problem in both forms, for language models and for the tiny model."""
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
        """Apply the function of that letter."""
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
        _, mark, rest = text[-LOOKED_AT:].rpartition("#")
        match = re.match(r"\s*([0-9]{1,3})(?![0-9])", rest) if mark else None
        return str(int(match[1])) if match else None

    def grade(self, problem, text):
        right = self.final(text) == str(problem.answer[2])
        return Grade(right, right)


# ---------------------------------------------------------------- GSM8K


class GSM8K(Task):
    """Grade-school mathematics. source: "hub" (openai/gsm8k, config main), or a folder with train.jsonl and test.jsonl
    in its format.
    """

    step_end = "\n"
    again = "\nOnce more:\n"
    longest = 512

    def __init__(self, source: str = "hub"):
        self.source = source
        self.splits: dict[str, list[dict]] = {}

    def rows(self, split):
        """All rows of a split, read once. Raises UserError."""
        if split not in self.splits and self.source == "hub":
            self.splits = read_hub("openai/gsm8k:main", gsm8k_row)
        elif split not in self.splits:
            self.splits = load_splits(self.source, gsm8k_row)
        if split not in self.splits:
            raise UserError(f"--data {self.source}: has no {split} split")
        return self.splits[split]

    def count(self, split):
        return len(self.rows(split))

    def problem(self, split, index):
        rows = self.rows(split)
        row = rows[index % len(rows)]
        how = "Reason step by step in <think> </think> tags, then give the final number in <answer> </answer> tags."
        gold = last_number(row["answer"].split("####")[-1])
        return Problem(f"{row['question']}\n{how}", "", gold, row["place"])

    def final(self, text):
        """As Task.final. A gold solution ends in "#### 72": models know that format, too."""
        stated = answer_tag(text)
        if stated is None:
            _, mark, rest = text[-LOOKED_AT:].rpartition("####")
            stated = rest if mark else None
        number = last_number(stated) if stated is not None and len(stated) < 100 else None
        return None if number is None else str(number)

    def grade(self, problem, text):
        strict = self.final(text) == str(problem.answer)
        return Grade(strict, strict or last_number(text) == problem.answer)


def gsm8k_row(row, where: str) -> dict:
    """A row with a "question" and a gold "answer" ending in `#### number`. Raises UserError naming `where`."""
    if not (isinstance(row, dict) and isinstance(row.get("question"), str) and isinstance(row.get("answer"), str)):
        raise UserError(f'{where}: wants an object with the strings "question" and "answer"')
    if last_number(row["answer"].split("####")[-1]) is None or "####" not in row["answer"]:
        raise UserError(f"{where}: the answer must end in `#### number`, got ...{row['answer'][-40:]!r}")
    if not row["question"].strip():
        raise UserError(f"{where}: the question is empty")
    check_text(row["question"], where)
    return {**row, "place": where}


# ---------------------------------------------------------------- Math


class Math(Task):
    r"""Mathematics with answers in LaTeX, from any data set with problems and answers. Compared by math-verify.

    data: as parts/tasks/data_files.py says. If it is not divided, an eighth of the problems is held out, chosen by
    their text. The order is shuffled, since such files are often sorted by subject. columns: the names in the data of
    problem and answer, parted by a comma; "": those of COLUMNS that come first. An answer may be a whole solution: then
    what stands in its last \boxed{}, or behind ####, counts.

    strict: the last \boxed{} of the text, behind </think> if there is one, equals the gold answer. lenient: or else the
    number that comes last does, or, in a text without \boxed{}, the answer that math-verify finds at its end.
    """

    COLUMNS = {
        "problem": ("problem", "question", "prompt"),
        "answer": ("answer", "final_answer", "solution", "ground_truth", "reward_model.ground_truth"),
    }

    def __init__(self, data: str, columns: str = ""):
        """Raises UserError."""
        if not data:
            raise UserError("--task math: --data FOLDER, FILE.jsonl or owner/name is wanted, with problems and answers")
        names = [name.strip() for name in columns.split(",")]
        if columns and (len(names) != 2 or not all(names)):
            raise UserError(f"--columns {columns}: two names are wanted, of the problem and the answer: problem,answer")
        check_package("math-verify", "--task math", "math_verify")
        self.data = data
        self.columns = dict(zip(self.COLUMNS, [[name] for name in names])) if columns else self.COLUMNS
        self.splits: dict[str, list[tuple[str, str, str]]] = {}
        self.checker = LatexChecker()

    def rows(self, split):
        """(problem, gold answer) of a split, read once. Raises UserError."""
        if not self.splits:
            self.splits = halves(load_splits(self.data, self.take))
            for name, rows in self.splits.items():
                random.Random(f"math {name}").shuffle(rows)
        if not self.splits[split]:
            raise UserError(f"--data {self.data}: too few problems, none is in the {split} split; add train and test")
        return self.splits[split]

    def take(self, row, where: str) -> tuple[str, str, str]:
        """Return (problem, gold answer, place) of a row of the data. Raises UserError with the place."""
        problem, solution = pick_columns(row, self.columns, where)
        answer = stated_answer(solution) if isinstance(solution, str) else None
        if answer is None:
            end = str(solution)[-40:]
            raise UserError(f"{where}: no final answer in ...{end!r}: \\boxed{{}} or #### must mark it in a solution")
        return problem, answer, where

    def count(self, split):
        return len(self.rows(split))

    def problem(self, split, index):
        rows = self.rows(split)
        question, gold, place = rows[index % len(rows)]
        if isinstance(question, list):  # a conversation says itself how to answer
            return Problem(question[-1]["content"], "", gold, place, question)
        return Problem(f"{question}\nReason step by step, and put the final answer in \\boxed{{}}.", "", gold, place)

    def grade(self, problem, text):
        gold = problem.answer
        text = text[-LOOKED_AT:].rpartition("</think>")[2]
        boxed = boxed_answer(text)
        strict = boxed is not None and self.checker.equal(gold, boxed)
        number = last_number(gold) if re.fullmatch(r"-?[0-9,.]+", gold) else None
        is_last = number is not None and last_number(text) == number
        return Grade(strict, strict or is_last or (boxed is None and self.checker.found(gold, text)))


# ---------------------------------------------------------------- from problem to tokens

BASE_PROMPT = (
    "A conversation between User and Assistant. The user asks a question, and the Assistant solves it.\n"
    "User: {}\nAssistant: Let me solve this step by step.\n<think>"
)


def encode(text: str, tokenizer, special: bool = False) -> list[int]:
    """Return the token ids of a text. special: with the special tokens that the tokenizer puts in front, but without
    those that it appends: a response is to follow.

    Raises UserError for a symbol that the tokenizer has no token for: it would silently be read as <unk> or <pad>.
    """
    front = special_prefix(tokenizer) if special else []
    if not tokenizer.is_fast:  # such a tokenizer does not say which symbols made a token
        return front + tokenizer.encode(text, add_special_tokens=False)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
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
    return front + found["input_ids"]


def special_prefix(tokenizer) -> list[int]:
    """Return the special tokens that the tokenizer puts in front of a text, such as BOS."""
    with_special = tokenizer.encode("a", add_special_tokens=True)
    plain = tokenizer.encode("a", add_special_tokens=False)
    for start in range(len(with_special) - len(plain) + 1):
        if with_special[start : start + len(plain)] == plain:
            return with_special[:start]
    return []


def encode_prompt(problem: Problem, tokenizer, style: str = "auto", system: str = "", chat_args: str = "") -> list[int]:
    """Return the token ids of a problem's prompt.

    style: "trace" (the tiny model's own language), "chat" (the tokenizer's chat template), "base" (a plain-text
    dialogue for models without one), or "auto": what the tokenizer's config says, else chat. system, chat_args: see
    TaskFlags; for chat only. Raises UserError if the style, or one of these two, does not fit.
    """
    if style == "auto":
        style = tokenizer.init_kwargs.get("prompt_style", "chat")
    if style not in ("trace", "base", "chat"):
        raise UserError(f"prompt style {style!r} is none of auto, trace, chat, base")
    if style != "chat" and (system or chat_args):
        name = "--system" if system else "--chat-args"
        raise UserError(f"{name}: only chat prompts have one, and this model's are of the style {style}")
    if style == "trace":
        if not problem.trace:
            raise UserError(
                "this task has no trace form: the tiny models know --task countdown (base) and chain (base/chain) only"
            )
        return encode(problem.trace, tokenizer)
    if style == "base":
        return encode(BASE_PROMPT.format(problem.prompt), tokenizer, special=True)
    return encode(chat_text(problem, tokenizer, system, chat_args), tokenizer)


def chat_text(problem: Problem, tokenizer, system: str, chat_args: str) -> str:
    """Return the problem in the tokenizer's chat template, up to where the response begins. What the template puts
    there (an opened <think>, or a closed one) belongs to the prompt. A problem that has a system message of its own
    keeps it. Raises UserError.
    """
    if not tokenizer.chat_template:
        raise UserError(f"{tokenizer.name_or_path} has no chat template: use --prompt-style base")
    try:
        args = json.loads(chat_args or "{}")
    except (ValueError, RecursionError) as error:
        raise UserError(f"--chat-args {chat_args}: not JSON ({error})") from error
    if not isinstance(args, dict):
        raise UserError(f'--chat-args {chat_args}: wants names and values, such as {{"enable_thinking": false}}')
    for name in args:
        if name not in str(tokenizer.chat_template):
            raise UserError(f"--chat-args {chat_args}: the chat template knows no {name}")
    chat = problem.messages or [{"role": "user", "content": problem.prompt}]
    if system and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    try:
        return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True, **args)
    except Exception as error:  # a template is a program, and some refuse a system prompt
        raise UserError(f"the chat template of {tokenizer.name_or_path} fails: {reason(error)}") from error


READ_DATA = ("gsm8k", "math")  # the tasks that --data is for


def make_task(name: str, data: str = "", columns: str = "") -> Task:
    """Return the task of that name. data: "" for its default source; data and columns: see TaskFlags. A new task is one
    line here. Raises UserError.
    """
    makers = {
        "countdown": Countdown,
        "countdown-3": lambda: Countdown(sizes=(3,)),  # a whole search fits into 640 tokens of words: base/searcher.py
        "countdown-hard": lambda: Countdown(sizes=(3, 4), high=99),  # the scale for real language models
        "chain": Chain,
        "gsm8k": lambda: GSM8K(data or "hub"),
        "math": lambda: Math(data, columns),
    }
    if name not in makers:
        raise UserError(f"--task {name}: is none of {', '.join(makers)}")
    if data and name not in READ_DATA:
        raise UserError(f"--data {data}: --task {name} makes its own problems; {' and '.join(READ_DATA)} read data")
    if columns and name != "math":
        raise UserError(f"--columns {columns}: only --task math has columns to choose, not {name}")
    return makers[name]()
