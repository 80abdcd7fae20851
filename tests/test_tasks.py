"""Tasks: verifiers give every text a grade, splits are disjoint, prompts have the style that was asked for, and rewards
reach the update.
"""

import json
import random
import re
import tempfile
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import cases, caught, rows_of, tiny
from hypothesis import given
from hypothesis import strategies as st
from test_loop import SMALL, run_main
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoTokenizer, LlamaConfig, PreTrainedTokenizerFast

import drafter
import tasks
import train_grpo
from base.pretrain import make_tokenizer, trace
from parts.cli import UserError
from parts.tasks.answers import answer_tag, canonical, evaluate, last_number
from parts.tasks.data_files import read_jsonl
from tasks import GSM8K, Countdown, Grade, Problem, encode_prompt, gsm8k_row, make_task
from train_grpo import Worker, advantages

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


def test_hostile_texts_get_a_grade():
    for text in HOSTILE:
        for wrapped in (text, f"<answer>{text}</answer>", f"#### {text}"):
            Countdown().grade(PROBLEM, wrapped)
            GSM8K().grade(Problem("", "", Fraction(3)), wrapped)


@cases(600)
@given(st.text(alphabet="0123456789+-*/() .<>answer=\u0663", max_size=200) | st.text(max_size=100))
def test_any_text_gets_a_grade(text):
    for wrapped in (text, f"<answer>{text}</answer>"):
        grade = Countdown().grade(PROBLEM, wrapped)
        assert grade.lenient or not grade.strict
        GSM8K().grade(Problem("", "", Fraction(3)), wrapped)


def stack_machine(text: str):
    """Return (value, numbers) of a fully bracketed expression by the shunting-yard algorithm; None: it divides by 0."""
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
    """Return "(a operator b)" for (a, operator, b)."""
    return f"({''.join(parts)})"


EXPRESSIONS = st.recursive(
    st.integers(1, 99).map(str), lambda s: st.tuples(s, st.sampled_from("+-*/"), s).map(bracketed), max_leaves=6
)


@cases(100)
@given(EXPRESSIONS)
def test_evaluate_agrees_with_an_independent_stack_machine(expression):
    assert evaluate(expression) == stack_machine(expression)


def test_canonical_forms_by_hand():
    same = {
        "(3+4)*2": ["2*(3+4)", "(4+3)*2", "((4)+3) * 2"],
        "2*3+2*4": ["2*4+3*2", "(2*3)+(4*2)"],
        "3+5-4": ["5+3-4", "3-(4-5)", "5-(4-3)"],
        "8/2/2": ["8/(2*2)"],
        "(1+1)*8/4": ["8/(4/(1+1))"],
        "29": ["29", "(29)"],
    }
    for form, expressions in same.items():
        assert [canonical(expression) for expression in expressions] == [form] * len(expressions)
    assert [canonical(text) for text in ("", "3(4)", "-3", "1/0", "7*3+8=29", "2**3")] == [None] * 6


def turned(expression: str) -> str:
    """Return a sum or product of two operands with their order changed, and everything else as it is."""
    match = re.fullmatch(r"\((\d+|\(.*\))([+*])(\d+|\(.*\))\)", expression)
    return f"({match[3]}{match[2]}{match[1]})" if match and evaluate(match[1]) and evaluate(match[3]) else expression


def check_canonical(expression):
    """A canonical form has the same value and numbers, is its own form, and is that of other orders of operands."""
    form = tasks.canonical(expression)
    if stack_machine(expression) is None:
        assert form is None
        return
    value, numbers = evaluate(form)
    assert (value, sorted(numbers)) == (stack_machine(expression)[0], sorted(stack_machine(expression)[1]))
    assert tasks.canonical(form) == form == tasks.canonical(turned(expression))


@cases(100)
@given(EXPRESSIONS)
def test_canonical_forms(expression):
    check_canonical(expression)


def test_wrong_canonical_forms_are_caught(monkeypatch):
    monkeypatch.setattr(tasks, "canonical", lambda text: text)
    caught(check_canonical, "(3*7)")
    monkeypatch.setattr(tasks, "canonical", lambda text: canonical(text.replace("-", "+")))
    caught(check_canonical, "(8-3)")


def test_the_final_answer_of_a_search_in_words():
    final = Countdown().final
    assert final("<think>\n7*3=21\n</think>\n<answer> (7*3)+8 </answer>") == final("<answer>8+3*7</answer>") == "3*7+8"
    assert final("<answer> 7*3 </answer>") == "3*7"  # wrong, but an answer
    for text in ("", "7*3+8", "<answer>7*3+8", "<answer>twenty</answer>", "<answer>7*3+8=29</answer>"):
        assert final(text) is None


@pytest.mark.parametrize(
    "text, strict, lenient",
    [
        ("...</think><answer>(7*3)+8</answer>", True, True),
        ("<answer> 8 + 3*7 </answer>", True, True),
        ("<answer>\n7*3+8\n</answer>", True, True),
        ("<answer>\r\n\t7*3+8\r\n</answer>\n", True, True),
        ("<answer>7*3\n+8</answer>", False, False),
        ("<answer>\n7*3+8\n29</answer>", False, True),
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


def check_answer_on_its_own_line():
    assert Countdown().grade(PROBLEM, "<answer>\n7*3+8\n</answer>").strict


def test_an_answer_on_its_own_line_gets_the_reward(monkeypatch):
    class Unstripped(str):
        def strip(self):
            return self

    check_answer_on_its_own_line()
    monkeypatch.setattr("tasks.answer_tag", lambda text: Unstripped(answer_tag(text)))
    caught(check_answer_on_its_own_line)


def check_every_number_once(task):
    assert not task.grade(PROBLEM, "<answer>29</answer>").strict
    assert not task.grade(PROBLEM, "<answer>7*3+8*1</answer>").strict


def test_each_number_must_be_used_exactly_once(monkeypatch):
    check_every_number_once(Countdown())
    monkeypatch.setattr(
        Countdown,
        "grade",
        lambda self, p, text: type("G", (), {"strict": evaluate(answer_tag(text))[0] == p.answer[1]}),
    )
    caught(check_every_number_once, Countdown())


def check_gsm8k(task):
    problem = Problem("", "", Fraction("1234.5"))
    for text, strict, lenient in [
        ("<answer>$1,234.5</answer>", True, True),
        ("<answer>\n1 234.50\n</answer>", True, True),
        ("<answer>2469/2 apples</answer>", True, True),
        ("... #### 1{,}234.5", True, True),
        ("it is 1234.50", False, True),
        ("<answer>1234</answer> 1234.5", False, True),
        ("<answer>1234.5</answer> or 7", True, True),
        ("<answer>\u22121234.5</answer>", False, False),
        ("<answer>1/1234.5</answer>", False, False),
        ("<answer>1e1234.5</answer>", False, False),
        ("<answer>1234.5" + " " * 100 + "</answer>", False, True),
        ("", False, False),
        ("\u0661\u0662\u0663\u0664", False, False),
    ]:
        grade = task.grade(problem, text)
        assert (grade.strict, grade.lenient) == (strict, lenient), text


def test_gsm8k_grades(monkeypatch):
    check_gsm8k(GSM8K())

    def by_pattern(text):
        """Return what looks like a number."""
        numbers = re.findall(r"[-+]?[0-9]{1,15}(?:,[0-9]{3})*(?:\.[0-9]+)?", text)
        return Fraction(numbers[-1].replace(",", "")) if numbers else None

    monkeypatch.setattr("tasks.last_number", by_pattern)
    caught(check_gsm8k, GSM8K())


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
            read_jsonl(tmp_path / "bad.jsonl", gsm8k_row)
    for content in (b"", b"\xff\xfe"):
        (tmp_path / "bad.jsonl").write_bytes(content)
        with pytest.raises(UserError, match="bad.jsonl"):
            read_jsonl(tmp_path / "bad.jsonl", gsm8k_row)
    with pytest.raises(UserError, match="missing.jsonl"):
        read_jsonl(tmp_path / "missing.jsonl", gsm8k_row)


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
def test_any_file_gives_problems_or_an_error_that_names_it(content):
    with tempfile.NamedTemporaryFile(suffix=".jsonl") as file:
        file.write(content)
        file.flush()
        try:
            rows = read_jsonl(Path(file.name), gsm8k_row)
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
    # splits that ignore the problem
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
        gave_up = text.endswith("</think><eos>")  # a search over 4 numbers may end so
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
    assert tokenizer.decode(encode_prompt(problem, saved)) == problem.trace  # the style is saved with the tokenizer
    with pytest.raises(UserError, match="no token for 'A'"):
        encode_prompt(problem, tokenizer, "base")
    with pytest.raises(UserError, match="chat template"):
        encode_prompt(problem, tokenizer, "chat")
    with pytest.raises(UserError, match="no trace form"):
        encode_prompt(Problem("1+1?", "", 2), tokenizer)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    assert encode_prompt(Problem("<pad>3,4=7", "", 7), tokenizer, "chat")  # <pad> may be written in a text
    with pytest.raises(UserError, match="no token for 'U'"):
        encode_prompt(problem, tokenizer, "chat")


# ---------------------------------------------------------------- chat templates

TEMPLATE = (  # of a model that thinks unless that is switched off
    "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]<think>"
    "{% if enable_thinking is defined and enable_thinking is false %}</think>{% endif %}{% endif %}"
)
NO_THINKING = '{"enable_thinking": false}'


def chat_tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per printable ASCII character, and this chat template."""
    symbols = ["<pad>", "<eos>", "\n", *map(chr, range(32, 127))]
    tokenizer = Tokenizer(models.WordLevel({symbol: i for i, symbol in enumerate(symbols)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), behavior="isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>")
    tokenizer.chat_template = template
    return tokenizer


def check_chat(encode_prompt):
    tokenizer = chat_tokenizer()
    problem = Problem("1+1?", "", 2)
    for system, chat_args, text in [
        ("", "", "[user]1+1?[assistant]<think>"),
        ("Be brief.", "", "[system]Be brief.[user]1+1?[assistant]<think>"),
        ("", NO_THINKING, "[user]1+1?[assistant]<think></think>"),
        ("S", '{"enable_thinking": true}', "[system]S[user]1+1?[assistant]<think>"),
    ]:
        assert tokenizer.decode(encode_prompt(problem, tokenizer, "auto", system, chat_args)) == text


def test_a_chat_template_gets_the_system_prompt_and_its_arguments():
    check_chat(encode_prompt)
    caught(check_chat, lambda problem, tokenizer, style, system, args: encode_prompt(problem, tokenizer, style, system))
    caught(
        check_chat, lambda problem, tokenizer, style, system, args: encode_prompt(problem, tokenizer, style, "", args)
    )

    def without_generation_prompt(problem, tokenizer, *settings):
        tokenizer.chat_template = tokenizer.chat_template.replace("add_generation_prompt", "false")
        return encode_prompt(problem, tokenizer, *settings)

    caught(check_chat, without_generation_prompt)


def test_mistakes_in_chat_settings_are_one_line():
    problem = Problem("1+1?", "1+1=", 2)
    no_system = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}x"
    for tokenizer, settings, message in [
        (chat_tokenizer(), ("chat", "", "{"), "--chat-args {: not JSON"),
        (chat_tokenizer(), ("chat", "", "[" * 100_000), "not JSON"),
        (chat_tokenizer(), ("chat", "", "[1]"), "wants names and values"),
        (chat_tokenizer(), ("chat", "", '{"enable_thinkng": false}'), "knows no enable_thinkng"),
        (chat_tokenizer(), ("chat", "", '{"tokenize": true}'), "knows no tokenize"),
        (chat_tokenizer(), ("chat", "", '{"add_generation_prompt": false}'), "template of .* fails"),
        (chat_tokenizer(no_system), ("chat", "S", ""), "no system role"),
        (chat_tokenizer("{% if"), ("chat", "", ""), "template of .* fails"),
        (chat_tokenizer(""), ("chat", "S", ""), "no chat template"),
        (chat_tokenizer(), ("base", "S", ""), "--system: only chat prompts"),
        (make_tokenizer(), ("auto", "", NO_THINKING), "--chat-args: only chat prompts.*style trace"),
        (chat_tokenizer(), ("chatty", "", ""), "none of auto, trace, chat, base"),
    ]:
        with pytest.raises(UserError, match=message) as error:
            encode_prompt(problem, tokenizer, *settings)
        assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def chat_folder(tmp_path_factory):
    """The folder of a random policy with a chat template."""
    folder = tmp_path_factory.mktemp("chat")
    tiny(LlamaConfig, max_position_embeddings=512).save_pretrained(folder)
    chat_tokenizer().save_pretrained(folder)
    return folder


def recording_encoder(prompts, keep=3, last=None):
    """Return an encode_prompt that records the prompts. keep: how many of its settings it passes on; last: the number
    of prompts after which it ends the run.
    """

    def encode_and_record(problem, tokenizer, *settings):
        ids = encode_prompt(problem, tokenizer, *settings[:keep])
        prompts.append(tokenizer.decode(ids))
        if len(prompts) == last:
            raise UserError("enough")
        return ids

    return encode_and_record


CHAT_FLAGS = ["--system", "Be brief.", "--chat-args", NO_THINKING]


def check_prompts(prompts):
    assert prompts
    for prompt in prompts:
        assert prompt.startswith("[system]Be brief.[user]Using the numbers")
        assert prompt.endswith("[assistant]<think></think>")


def test_training_uses_the_system_prompt_and_the_templates_arguments(chat_folder, tmp_path, monkeypatch):
    for keep in (3, 2):
        prompts = []
        monkeypatch.setattr(train_grpo, "encode_prompt", recording_encoder(prompts, keep))
        flags = [*SMALL, "--steps", 1, "--max-new", 4, "--out", tmp_path / str(keep), *CHAT_FLAGS]
        run_main(monkeypatch, "--model", chat_folder, *flags)
        assert len(prompts) == 2 + 3  # by `check`, and in the step
        if keep == 3:
            check_prompts(prompts)
        else:
            caught(check_prompts, prompts)


def test_drafter_py_uses_the_system_prompt_and_the_templates_arguments(chat_folder, tmp_path, monkeypatch):
    prompts = []
    monkeypatch.setattr(drafter, "encode_prompt", recording_encoder(prompts, last=2))
    monkeypatch.setattr("sys.argv", ["drafter.py", "--model", str(chat_folder), "--out", str(tmp_path), *CHAT_FLAGS])
    with pytest.raises(UserError, match="enough"):
        drafter.main()
    check_prompts(prompts)


def test_bad_chat_settings_end_a_run_before_it_begins(chat_folder, model_folder, tmp_path, monkeypatch, capsys):
    for folder, message in ((chat_folder, "not JSON"), (model_folder, "--chat-args: only chat prompts")):
        with pytest.raises(SystemExit) as end:
            run_main(monkeypatch, "--model", folder, "--out", tmp_path / "out", *SMALL, "--chat-args", "{")
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert end.value.code == 2
        assert message in line
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- rewards that are numbers


def test_a_grade_has_a_reward():
    assert [Grade(True, True).reward, Grade(False, True).reward] == [1.0, 0.0]
    assert Grade(True, True) == Grade(True, True, 1.0) != Grade(True, True, 0.5)
    assert Grade(False, False, -2).reward == -2.0
    for reward in (float("nan"), float("inf")):
        with pytest.raises(UserError, match="finite number"):
            Grade(True, True, reward)


class Measured(Countdown):
    """A text of even length is right; the reward does not depend on that, and is often below 0."""

    def grade(self, problem, text):
        return Grade(len(text) % 2 == 0, True, reward=0.3 - len(text) / 40)


def check_rewards(model_folder, out, monkeypatch):
    """The update gets the rewards, and shares of right responses count the right ones."""
    seen = []
    responses_of = {True: [], False: []}  # learn -> responses
    right_rollout = Worker.rollout

    def recording_advantages(rewards, loss):
        seen.append(rewards)
        return advantages(rewards, loss)

    def rollout(self, engine, groups, sampling, grade, progress, learn):
        responses = right_rollout(self, engine, groups, sampling, grade, progress, learn)
        responses_of[learn] += responses
        return responses

    with monkeypatch.context() as patch:
        patch.setattr(train_grpo, "make_task", lambda *settings: Measured())
        patch.setattr(train_grpo, "advantages", recording_advantages)
        patch.setattr(Worker, "rollout", rollout)
        run_main(patch, "--model", model_folder, "--out", out, *SMALL, "--steps", 1, "--eval-every", 1)
    lengths = [len(make_tokenizer().decode(r.tokens)) for r in responses_of[True]]
    wanted = torch.tensor([0.3 - n / 40 for n in lengths]).view(3, 4)
    assert torch.equal(torch.cat(seen), wanted)
    assert len({n % 2 for n in lengths}) == 2 and (wanted < 0).any()
    before, step, _ = rows_of(out)
    assert step["reward"] == pytest.approx(wanted.mean().item())
    even = torch.tensor([n % 2 == 0 for n in lengths]).view(3, 4)
    assert step["solved"] == pytest.approx(even.any(1).float().mean().item())
    held_out = responses_of[False][:8]
    assert before["eval"]["pass@1"] == pytest.approx(sum(r.grade.strict for r in held_out) / 8)


def test_rewards_may_be_any_numbers(model_folder, tmp_path, monkeypatch):
    check_rewards(model_folder, tmp_path / "good", monkeypatch)

    def right_or_wrong(self):
        object.__setattr__(self, "reward", float(self.strict))

    monkeypatch.setattr(Grade, "__post_init__", right_or_wrong)
    caught(check_rewards, model_folder, tmp_path / "broken", monkeypatch)


@pytest.mark.parametrize("argv", [("countdown", "problems.jsonl"), ("chain", "", "a,b"), ("gsm8k", "folder", "a,b")])
def test_data_that_a_task_does_not_read_is_refused(argv):
    """Else a run with a forgotten --task would train on Countdown for hours."""
    with pytest.raises(UserError, match=f"--task .*{argv[0]}|not {argv[0]}"):
        make_task(*argv)
