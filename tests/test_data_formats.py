"""Data and inputs as people have them: parquet, conversations, nested columns, encodings, other policies' drafters."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, caught, flags_for, rows_of, tiny
from datasets import Dataset
from helpers import filled_buffer, make_drafter, responses_of
from transformers import LlamaConfig

import drafter
import spot
import tasks
import train_grpo
from base.pretrain import make_tokenizer
from parts.cli import UserError
from parts.running.timers import WorkerTimer

PLAIN = [{"problem": f"What is {i} + 1?", "answer": str(i + 1)} for i in range(20)]
# TRL's conversational format
CONVERSATIONS = [
    {
        "prompt": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": f"What is {i} + 1?"}],
        "solution": f"It is \\boxed{{{i + 1}}}.",
    }
    for i in range(20)
]
# verl's format
NESTED = [
    {
        "data_source": "hand-made",
        "prompt": [{"role": "user", "content": f"What is {i} + 1?"}],
        "reward_model": {"style": "rule", "ground_truth": str(i + 1)},
        "extra_info": {"split": "train", "index": i},
    }
    for i in range(20)
]
GSM8K = [{"question": f"What is {i} + 1?", "answer": f"Add them.\n#### {i + 1}"} for i in range(20)]


def write_jsonl(path, rows) -> None:
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_parquet(path, rows) -> None:
    Dataset.from_list(rows).to_parquet(str(path))


WRITERS = {".jsonl": write_jsonl, ".parquet": write_parquet}


def answers_of(task) -> list:
    """The gold answers of all problems, sorted."""
    rows = []
    for split in ("train", "test"):
        rows += [task.problem(split, i).answer for i in range(task.count(split))]
    return sorted(map(int, rows))


@pytest.mark.parametrize("suffix", WRITERS)
@pytest.mark.parametrize("rows", [PLAIN, CONVERSATIONS, NESTED], ids=["plain", "conversations", "nested"])
def test_formats_of_the_field_are_read(tmp_path, rows, suffix):
    path = tmp_path / f"data{suffix}"
    WRITERS[suffix](path, rows)
    for data in (path, tmp_path):  # a file, and the folder that it is alone in
        assert answers_of(tasks.make_task("math", str(data))) == list(range(1, 21))


@pytest.mark.parametrize("suffix", WRITERS)
def test_train_and_test_of_a_folder_are_its_splits(tmp_path, suffix):
    WRITERS[suffix](tmp_path / f"train{suffix}", GSM8K[:15])
    WRITERS[suffix](tmp_path / f"test{suffix}", GSM8K[15:])
    task = tasks.make_task("gsm8k", str(tmp_path))
    assert (task.count("train"), task.count("test")) == (15, 5)
    assert task.problem("test", 0).answer == 16
    assert task.problem("test", 0).name == f"{tmp_path}/test{suffix}, {'row' if suffix == '.parquet' else 'line'} 1"


def test_nested_columns_are_named_with_dots(tmp_path):
    rows = [{"prompt": f"What is {i}?", "meta": {"truth": 7}, "other": {"truth": 8}} for i in range(20)]
    write_parquet(tmp_path / "data.parquet", rows)
    task = tasks.make_task("math", str(tmp_path / "data.parquet"), "prompt,meta.truth")
    assert set(answers_of(task)) == {7}
    with pytest.raises(UserError, match="no column for the answer .*; has prompt, meta.truth, other.truth"):
        answers_of(tasks.make_task("math", str(tmp_path / "data.parquet")))


class ChatTokenizer:
    """Writes a chat as text."""

    chat_template = "a template"
    init_kwargs: dict = {}
    is_fast = False
    name_or_path = "chat"

    def apply_chat_template(self, chat, tokenize, add_generation_prompt):
        return "|".join(f"{message['role']}:{message['content']}" for message in chat)

    def encode(self, text, add_special_tokens):
        return list(text)


@pytest.mark.parametrize(
    "rows, prompt",
    [
        (CONVERSATIONS, "system:Be brief.|user:What is 0 + 1?"),
        (NESTED, "system:Think.|user:What is 0 + 1?"),
    ],
    ids=["its own system message stays", "--system is put in front"],
)
def test_a_conversation_goes_through_the_chat_template_as_it_is(tmp_path, rows, prompt):
    write_jsonl(tmp_path / "data.jsonl", rows[:1] * 20)
    task = tasks.make_task("math", str(tmp_path / "data.jsonl"))
    split = "train" if task_has(task, "train") else "test"
    assert "".join(tasks.encode_prompt(task.problem(split, 0), ChatTokenizer(), system="Think.")) == prompt


def task_has(task, split: str) -> bool:
    """One problem that comes twenty times is in one split only."""
    try:
        return task.count(split) > 0
    except UserError:
        return False


@pytest.mark.parametrize(
    "prompt",
    [[], [{"role": "user"}], [{"role": "assistant", "content": "Hello"}], ["text"], [{"role": "user", "content": 3}]],
    ids=str,
)
def test_what_is_no_conversation_is_refused_by_its_place(tmp_path, prompt):
    write_jsonl(tmp_path / "data.jsonl", [{"prompt": prompt, "answer": "1"}])
    with pytest.raises(UserError, match="line 1: prompt: wants messages with role and content"):
        tasks.make_task("math", str(tmp_path / "data.jsonl")).count("train")


def test_files_of_windows_are_read_or_say_what_to_do(tmp_path):
    text = "\n".join(map(json.dumps, PLAIN))
    path = tmp_path / "data.jsonl"
    path.write_bytes(text.replace("\n", "\r\n").encode("utf-8-sig"))
    assert answers_of(tasks.make_task("math", str(path))) == list(range(1, 21))
    path.write_bytes(text.encode("utf-16"))
    with pytest.raises(UserError, match="it is UTF-16; convert it with `iconv -f UTF-16 -t UTF-8`"):
        tasks.make_task("math", str(path)).count("train")


def test_a_broken_parquet_file_is_one_line(tmp_path):
    (tmp_path / "data.parquet").write_bytes(b"PAR1 but not really")
    with pytest.raises(UserError, match="cannot read .*data.parquet"):
        tasks.make_task("math", str(tmp_path / "data.parquet")).count("train")


# ---------------------------------------------------------------- encodings


def test_a_run_works_in_a_locale_without_unicode(model_folder, tmp_path):
    out = tmp_path / "größe"
    flags = flags_for(model_folder, out, "--steps", 1, "--eval-every", 0, no_warm_start=False)
    locale = {**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    command = [sys.executable, "train_grpo.py", *flags]
    done = subprocess.run(command, cwd=ROOT, env=locale, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert len(rows_of(out)) == 1
    assert (out / "policy/model.safetensors").exists()


def check_encodings_are_named(text: str) -> None:
    """Every file of text is opened with its encoding."""
    for line in text.splitlines():
        opens = any(call in line for call in (".read_text(", ".write_text(")) or (
            "open(" in line and any(mode in line for mode in ('"w"', '"a"', '"a+"', '"r"'))
        )
        assert not opens or "encoding=" in line or "Popen" in line, line


def test_text_files_are_opened_with_an_encoding():
    for path in [*ROOT.glob("*.py"), *(ROOT / "parts").rglob("*.py")]:
        check_encodings_are_named(path.read_text(encoding="utf-8"))
    caught(check_encodings_are_named, 'with open(path, "w") as file:')
    caught(check_encodings_are_named, "text = path.read_text()")


# ---------------------------------------------------------------- drafters of other policies


def test_a_drafter_of_another_policy_is_named(tmp_path, capsys):
    model = tiny(LlamaConfig)
    drafter.Drafter(model).save(tmp_path)
    drafter.Drafter(model).load(tmp_path)
    with torch.no_grad():  # what reinforcement learning does to a policy is not another policy
        model.get_input_embeddings().weight.mul_(1.01).add_(torch.randn(118, 32) * 1e-3)
    drafter.Drafter(model).load(tmp_path)
    assert capsys.readouterr().err == ""
    with torch.no_grad():
        model.get_input_embeddings().weight.copy_(torch.randn(118, 32) * torch.linspace(0.5, 2, 32))
    drafter.Drafter(model).load(tmp_path)
    assert "was made for another policy" in capsys.readouterr().err


def test_the_drafters_of_base_say_for_which_policy_they_were_made():
    from parts.engine.model_loading import load_model
    from parts.files import read_notes

    for folder in ("base", "base/chain", "base/chain/revise"):
        notes = read_notes(ROOT / folder / "drafter/drafter.safetensors")
        model, _ = load_model(str(ROOT / folder))
        assert drafter.is_same_policy(notes["policy_fingerprint"], model.get_input_embeddings().weight)
    base, _ = load_model(str(ROOT / "base"))
    chain = read_notes(ROOT / "base/chain/drafter/drafter.safetensors")["policy_fingerprint"]
    assert not drafter.is_same_policy(chain, base.get_input_embeddings().weight)


# ---------------------------------------------------------------- the warm start


def spot_trainer_with(agreements, own: float) -> spot.SpotTrainer:
    """A spot trainer whose agreement on held-out sequences is scripted; `own`: on the data that it learns from."""
    model = tiny(LlamaConfig)
    config = SimpleNamespace(seed=0, draft_vocab=0, warm_start=100, drafter="adaptive", drafter_from="", model="base")
    trainer = object.__new__(spot.SpotTrainer)
    trainer.__dict__.update(
        needs_warm_start=True,
        warm_start_limit=100.0,
        warm_seconds_left=100.0,
        rank=0,
        learner=make_drafter(model),
        recent_agreement=own,
    )
    trainer.buffer = filled_buffer(responses_of(model))
    trainer.choose_draft_vocab = lambda: None
    trainer.agreement = lambda *_: next(agreements)
    trainer.average = lambda *_: 1
    trainer.config = config
    return trainer


def turns_of(trainer, seconds: float, monkeypatch) -> int:
    """How often the warm start trains, in turns of AVERAGE_EVERY seconds."""
    turns = []
    monkeypatch.setattr(spot, "train_until", lambda *_: turns.append(1))
    trainer.warm_start(seconds, WorkerTimer(), lambda tensors: None)
    return len(turns)


def test_a_warm_start_ends_when_the_drafter_is_good_or_the_data_is_learned_or_time_is_up(monkeypatch):
    assert turns_of(spot_trainer_with(iter([0.1, 0.2, 0.85, 0.9]), 0.0), 100, monkeypatch) == 3
    assert turns_of(spot_trainer_with(iter([0.1] * 9), 0.99), 100, monkeypatch) == 1
    assert turns_of(spot_trainer_with(iter([0.1] * 99), 0.5), 10, monkeypatch) == 2


def test_a_warm_start_that_cannot_be_won_back_is_left_out(monkeypatch, capsys):
    assert turns_of(spot_trainer_with(iter([]), 0.0), 0.5, monkeypatch) == 0
    assert "warm start of the drafter: the steps that are left" in capsys.readouterr().out


def test_tokenizers_without_chat_template_read_the_last_message_of_a_conversation(tmp_path):
    write_jsonl(tmp_path / "data.jsonl", CONVERSATIONS)
    task = tasks.make_task("math", str(tmp_path / "data.jsonl"))
    assert task.problem("train", 0).prompt.startswith("What is")
    assert train_grpo.Config().samples > 1
    assert make_tokenizer().chat_template is None
