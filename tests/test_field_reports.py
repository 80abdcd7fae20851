"""Inputs that users of trainers, servers and tokenizers have reported elsewhere, each with its right result."""

import json
import re
import sys

import pytest
import torch
from conftest import ROOT, caught, finish, launch, rows_of, run_in_process, tiny
from helpers import make_engine, responses_of
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, GenerationConfig, GraniteConfig, LlamaConfig, PhimoeConfig, Starcoder2Config

import drafter
import tasks
import train_grpo
from base.pretrain import make_tokenizer
from parts.cli import UserError
from parts.engine.interfaces import DraftPlan, Strategy
from parts.engine.model_loading import decode, deployed_sampling, load_model
from parts.engine.sampling import Sampling
from parts.running import checkpoints
from parts.running.metrics_log import to_json
from parts.tasks.answers import boxed_answer, stated_answer
from parts.training.logprobs import checkpoint_layers, noise_settings, token_scores, update_mode

# ---------------------------------------------------------------- noise in training

NOISY = {
    "llama": (LlamaConfig, {"attention_dropout": 0.1}),
    "granite": (GraniteConfig, {"attention_dropout": 0.1}),
    "starcoder2": (Starcoder2Config, {"attention_dropout": 0.1, "residual_dropout": 0.1, "embedding_dropout": 0.1}),
    "phimoe": (PhimoeConfig, {"router_jitter_noise": 0.1, "input_jitter_noise": 0.1, "num_local_experts": 2}),
}


def noisy_model(family: str):
    config_class, changes = NOISY[family]
    return tiny(config_class, **changes)


def check_trainer_is_the_policy_that_generates(model, mode, responses) -> None:
    """The trainer's log-probabilities are those of the rollout."""
    with mode(model):
        logp, _ = token_scores(model, responses, 1.0)
        logp.sum().backward()
    rollout = torch.cat([r.logprobs for r in responses])
    assert (logp.detach() - rollout).abs().max() < 1e-3


class TrainingMode:
    """The broken variant: dropout and jitter are on."""

    def __init__(self, model):
        self.model = model

    def __enter__(self):
        self.model.train()

    def __exit__(self, *_):
        self.model.eval()


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", NOISY)
def test_dropout_and_router_noise_are_off_in_the_update(family, checkpointing):
    model = noisy_model(family)
    responses = responses_of(model, 3)
    assert noise_settings(model.config)
    if checkpointing:
        checkpoint_layers(model)
    check_trainer_is_the_policy_that_generates(model, update_mode, responses)
    assert not any(module.training for module in model.modules())
    if family != "phimoe":  # its noise needs luck to change the choice of experts
        caught(check_trainer_is_the_policy_that_generates, model, TrainingMode, responses)


def test_layers_are_checkpointed_although_the_model_is_in_evaluation_mode():
    """The backward runs each layer once more."""

    def forwards(mode) -> int:
        model = tiny(LlamaConfig)
        responses = responses_of(model, 2)
        checkpoint_layers(model)
        calls = []
        for layer in model.get_decoder().layers:
            layer.self_attn.register_forward_pre_hook(lambda *_: calls.append(1))
        with mode(model):
            token_scores(model, responses, 1.0)[0].sum().backward()
        return len(calls)

    assert forwards(update_mode) == 4
    assert forwards(lambda model: torch.enable_grad()) == 2


def test_a_drafter_learns_without_dropout():
    model = noisy_model("llama")
    model.config.attention_dropout = 0.9
    assert not any(module.training for module in drafter.Drafter(model).modules())


def test_a_noisy_policy_keeps_its_gap_and_says_that_noise_is_off(tmp_path, capsys):
    folder = tmp_path / "noisy"
    noisy_model("llama").save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    run_in_process(train_grpo.main, folder, tmp_path / "out", "--steps", 1, "--eval-every", 0, "--kl", 0.1)
    (row,) = rows_of(tmp_path / "out")
    assert row["entropy"] is not None  # it trained, because of the KL term: it solves nothing
    assert 0 < row["gap_max"] < 1e-3
    text = capsys.readouterr()
    assert "attention_dropout 0.1: off in training" in text.out + text.err
    assert "WARNING" not in text.out + text.err


def test_a_gap_between_rollout_and_trainer_is_a_warning(model_folder, tmp_path, monkeypatch, capsys):
    """The broken variant of the test above: a trainer that is not the policy that samples."""
    monkeypatch.setattr(train_grpo, "MEAN_GAP", {torch.float32: -1.0})
    run_in_process(train_grpo.main, model_folder, tmp_path / "out", "--steps", 2, "--eval-every", 0, "--kl", 0.1)
    text = capsys.readouterr()
    assert (text.out + text.err).count("WARNING: log-probabilities of rollout and trainer differ") == 1


# ---------------------------------------------------------------- settings that cannot be saved


@pytest.mark.parametrize(
    "settings", [{"early_stopping": True}, {"length_penalty": 0.8}, {"min_p": 0.1}, {"num_beams": 4}], ids=str
)
def test_a_model_keeps_only_the_generation_settings_that_it_was_trained_with(model_folder, tmp_path, settings):
    folder = tmp_path / "model"
    model, tokenizer = load_model(str(model_folder))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings}))
    run_in_process(train_grpo.main, folder, tmp_path / "out", "--steps", 1, "--eval-every", 0)
    saved = json.loads((tmp_path / "out/policy/generation_config.json").read_text())
    assert not saved.keys() & settings.keys()
    assert saved["do_sample"] and saved["max_new_tokens"] == 24 and saved["eos_token_id"] == 1
    GenerationConfig.from_pretrained(tmp_path / "out/policy").validate(strict=True)


def test_what_cannot_be_saved_is_found_before_the_first_step(model_folder, tmp_path, monkeypatch):
    def invalid(*_):
        return GenerationConfig(do_sample=False, temperature=0.5, early_stopping=True)

    monkeypatch.setattr(train_grpo, "deployed_sampling", invalid)
    with pytest.raises(UserError, match="cannot write"):
        here_raising(train_grpo, model_folder, tmp_path / "out")
    assert not rows_of(tmp_path / "out") if (tmp_path / "out/metrics.jsonl").exists() else True
    assert not list((tmp_path / "out").glob("*trial*"))


def here_raising(script, model, out, *more) -> None:
    """Run a script's training without the handling of UserError."""
    flags = (
        f"--device cpu --model {model} --out {out} --prompts 2 --samples 2 --max-new 8 --steps 1 --eval-every 0".split()
    )
    config = train_grpo.parse_flags(train_grpo.Config, "", [*map(str, flags), *map(str, more)])
    train_grpo.check(config)
    out.mkdir(parents=True, exist_ok=True)
    train_grpo.train(config, train_grpo.Worker(config))


def test_deployed_sampling_is_what_was_trained_with():
    config = deployed_sampling(tiny(LlamaConfig), [1, 5], 0.7, 33)
    assert (config.do_sample, config.temperature, config.top_k, config.top_p) == (True, 0.7, 0, 1.0)
    assert (config.eos_token_id, config.max_new_tokens) == ([1, 5], 33)


# ---------------------------------------------------------------- rows that cannot be used


class Rows(tasks.Task):
    """Countdown problems; those of `long` have a long prompt, those of `strange` one that the tokenizer cannot read."""

    def __init__(self, size: int, long=(), strange=()):
        self.size = size
        self.long = long
        self.strange = strange
        self.countdown = tasks.Countdown()

    def count(self, split):
        return self.size

    def problem(self, split, index):
        row = index % self.size
        trace = self.countdown.problem(split, row).trace
        if row in self.long:
            trace = "1," * 300 + trace
        if row in self.strange:
            trace = "é" + trace
        return tasks.Problem("", trace, self.countdown.problem(split, row).answer, f"rows.jsonl, line {row + 1}")

    def grade(self, problem, text):
        return self.countdown.grade(problem, text)


def test_a_row_that_does_not_fit_is_skipped_by_name(model_folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train_grpo, "make_task", lambda *_: Rows(8, long=(6,), strange=(2,)))
    run_in_process(train_grpo.main, model_folder, tmp_path / "out", "--steps", 3, "--eval-every", 0)
    text = capsys.readouterr()
    assert len(rows_of(tmp_path / "out")) == 3
    assert "2 of 8 train problems will be skipped: rows.jsonl, line 3: " in text.out
    shown = text.out + text.err
    assert "skipped: rows.jsonl, line 7: prompt + response of" in shown
    assert "skipped: rows.jsonl, line 3: " in shown


def test_data_without_any_usable_row_is_refused(model_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_grpo, "make_task", lambda *_: Rows(4, long=range(4)))
    with pytest.raises(UserError, match="line 1: prompt . response of"):
        here_raising(train_grpo, model_folder, tmp_path / "out")


def test_the_replacement_of_a_row_depends_on_its_index_alone(model_folder, tmp_path, monkeypatch):
    """Two runs, the second resumed in the middle, make the same tokens."""
    monkeypatch.setattr(train_grpo, "make_task", lambda *_: Rows(8, long=(1, 6)))
    run_in_process(train_grpo.main, model_folder, tmp_path / "whole", "--steps", 3, "--eval-every", 0)
    run_in_process(train_grpo.main, model_folder, tmp_path / "parts", "--steps", 2, "--eval-every", 0)
    run_in_process(train_grpo.main, model_folder, tmp_path / "parts", "--steps", 3, "--eval-every", 0, "--resume")
    digests = [[row["digest"] for row in rows_of(tmp_path / name)] for name in ("whole", "parts")]
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    "row, message",
    [
        ({"question": "bad \ud83d end", "answer": "#### 4"}, "line 2: .* is half a character"),
        ({"question": " ", "answer": "#### 4"}, "line 2: the question is empty"),
    ],
    ids=["a lone surrogate", "an empty question"],
)
def test_a_row_of_gsm8k_that_is_no_question_is_refused_by_name(tmp_path, row, message):
    good = {"question": "1 + 1?", "answer": "#### 2"}
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("\n".join(json.dumps(r) for r in (good, row)))
    with pytest.raises(UserError, match=message):
        tasks.make_task("gsm8k", str(tmp_path)).problem("train", 0)


# ---------------------------------------------------------------- gold answers


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{5}", "5"),
        (r"so \boxed 5.", "5"),
        (r"so \boxed5, since $3<5$.", "5"),
        (r"\fbox{12}", "12"),
        (r"\boxed{5}\boxed{", "5"),
        (r"\boxed{\frac{1}{2}} and \boxed{\{3\}}", r"\{3\}"),
        (r"\boxed12", "12"),
        (r"\boxed", None),
        ("5", None),
    ],
)
def test_boxes_of_all_kinds_are_read(text, answer):
    assert boxed_answer(text) == answer


@pytest.mark.parametrize(
    "solution, answer",
    [
        ("We have 3 apples and 4 pears. The answer is 7.", None),
        (r"So $x=5$ or $x=3$ and thus \boxed5, since $3<5$.", "5"),
        ("work\n#### 12", "12"),
        ("12", "12"),
        (r"\frac{1}{2}", r"\frac{1}{2}"),
        (r"\text{all of the above}", r"\text{all of the above}"),
        ("(-\\infty, 3]", "(-\\infty, 3]"),
    ],
)
def test_an_answer_is_found_or_refused(tmp_path, solution, answer):
    assert stated_answer(solution) == answer
    (tmp_path / "data.jsonl").write_text(json.dumps({"problem": "How many?", "solution": solution}))
    task = tasks.make_task("math", str(tmp_path / "data.jsonl"))
    if answer is None:
        with pytest.raises(UserError, match="line 1: no final answer in"):
            task.rows("train")
    else:
        splits = [split for split in ("train", "test") if task.splits.get(split) or not task.splits]
        rows = [row for split in ("train", "test") for row in rows_or_none(task, split)]
        assert splits and rows[0][1] == answer


def rows_or_none(task, split: str) -> list:
    """The rows of a split; one row is all that there is, so one split is empty."""
    try:
        return task.rows(split)
    except UserError:
        return []


# ---------------------------------------------------------------- resuming


def test_a_resumed_run_keeps_its_model(model_folder, tmp_path, monkeypatch):
    out = tmp_path / "out"
    run_in_process(train_grpo.main, model_folder, out, "--steps", 1, "--eval-every", 0)
    with pytest.raises(UserError, match="--model base: .* continues with --model .* only"):
        here_raising(train_grpo, "base", out, "--resume", "--steps", 2)
    assert json.loads((out / "config.json").read_text())["model"] == str(model_folder)
    monkeypatch.chdir(model_folder.parent)  # the same folder, written in another way
    run_in_process(train_grpo.main, model_folder.name, out, "--steps", 2, "--eval-every", 0, "--resume")
    caught(check_other_model_is_refused, lambda name, before, now: True)
    check_other_model_is_refused(checkpoints.same_setting)


def check_other_model_is_refused(same) -> None:
    assert not same("model", "a/b", "c/d")
    assert same("model", "a/b", "a/b")


# ---------------------------------------------------------------- models and drafters that do not fit


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors"])
def test_quantized_weights_are_refused_in_one_line(model_folder, tmp_path, method):
    folder = tmp_path / "quantized"
    model, tokenizer = load_model(str(model_folder))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": method}}))
    with pytest.raises(UserError, match=f"its weights are quantized .{method}"):
        load_model(str(folder))


def test_a_draft_vocabulary_beyond_the_policy_is_refused(model_folder, tmp_path):
    model, _ = load_model(str(model_folder))
    small = drafter.Drafter(model)
    small.draft_vocab = torch.arange(0, 118, 2).int()
    small.save(tmp_path)
    drafter.Drafter(model).load(tmp_path)
    weights = load_file(tmp_path / "drafter.safetensors")
    weights["draft_vocab"][-1] = 118
    save_file(weights, tmp_path / "drafter.safetensors")
    with pytest.raises(UserError, match="token ids up to 118, the policy has 118"):
        drafter.Drafter(model).load(tmp_path)


class SlowTokenizer:
    """As slow tokenizers: an id that it does not know is an error."""

    def __len__(self):
        return 10

    def decode(self, ids, skip_special_tokens):
        assert all(token < 10 for token in ids)
        return " ".join(map(str, ids))


def test_ids_that_the_tokenizer_does_not_know_are_left_out_of_texts():
    assert decode([3, 500, 9, 10], SlowTokenizer()) == "3 9"


# ---------------------------------------------------------------- special tokens around prompts


class Wrapping:
    """A tokenizer that puts ids in front and behind, as some do with BOS and EOS."""

    is_fast = False

    def __init__(self, front: list[int], behind: list[int]):
        self.front = front
        self.behind = behind

    def encode(self, text, add_special_tokens):
        plain = [10 + ord(symbol) % 50 for symbol in text]
        return self.front + plain + self.behind if add_special_tokens else plain


@pytest.mark.parametrize("front", [[], [1], [1, 2]])
@pytest.mark.parametrize("behind", [[], [3]])
def test_prompts_begin_with_special_tokens_but_do_not_end_with_them(front, behind):
    tokenizer = Wrapping(front, behind)
    plain = tokenizer.encode("text", add_special_tokens=False)
    assert tasks.encode("text", tokenizer, special=True) == front + plain
    assert tasks.encode("text", tokenizer) == plain


# ---------------------------------------------------------------- alarms


def test_numbers_that_are_not_finite_are_null_in_json():
    text = to_json({"loss": float("nan"), "deep": [{"x": float("inf")}, 1.5]})
    assert json.loads(text) == {"loss": None, "deep": [{"x": None}, 1.5]}


class Rewards:
    """Every second step has no variance."""

    def __init__(self):
        self.training = object.__new__(train_grpo.Training)
        self.training.bad_steps = 0
        self.training.out = ROOT / "no such folder"
        self.training.report = type("Report", (), {"bar": type("Bar", (), {"close": lambda self: None})()})()


def check_bad_steps_add_up(check_gradient) -> None:
    run = Rewards().training
    rows = [{"step": 1, "skipped": 1, "grad_norm": 0.0}, {"step": 2, "skipped": 0, "grad_norm": 0.0}]
    with pytest.raises(UserError, match="three steps in a row"):
        for i in range(6):
            check_gradient(run, {**rows[i % 2], "step": i + 1})
    assert run.bad_steps == 3


def test_steps_without_variance_do_not_reset_the_alarm():
    check_bad_steps_add_up(train_grpo.Training.check_gradient)

    def resets(training, row):
        training.bad_steps = training.bad_steps + 1 if row["skipped"] else 0
        if training.bad_steps == 3:
            raise UserError("three steps in a row")

    with pytest.raises(pytest.fail.Exception):
        check_bad_steps_add_up(resets)


def test_a_gradient_that_is_finite_resets_the_alarm():
    run = Rewards().training
    for skipped, norm in ((1, 0.0), (1, 0.0), (0, 0.5), (1, 0.0), (1, 0.0)):
        train_grpo.Training.check_gradient(run, {"step": 1, "skipped": skipped, "grad_norm": norm})
    assert run.bad_steps == 2


def test_a_broken_policy_is_not_saved(chain_policy, tmp_path):
    out = tmp_path / "out"
    process = launch(
        chain_policy, out, "--task", "chain", "--steps", 8, "--lr", 1e30, "--eval-every", 0, "--workers", 1
    )
    text = finish(process, code=2)
    assert re.search(r"step \d: a (logit|log-probability) of .* is not finite; lower --lr", text), text
    for folder in out.glob(checkpoints.PATTERN):
        for name, weight in load_file(folder / "model.safetensors").items():
            assert weight.isfinite().all(), (folder, name)
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_one_sample_per_prompt_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["train_grpo.py", "--samples", "1"])
    with pytest.raises(SystemExit) as end:
        train_grpo.run(train_grpo.main)
    assert end.value.code == 2
    assert "--samples 1: a group of one sample has no variance" in capsys.readouterr().err


# ---------------------------------------------------------------- figures


class Recorder(Strategy):
    """Drafts four tokens, and keeps the reports."""

    def __init__(self):
        super().__init__(DraftPlan("eagle", 4))
        self.reports = []

    def observe(self, report):
        self.reports.append(report)


def check_draft_tokens_beyond_the_end_do_not_count(engine, traces_of) -> None:
    """Reached and accepted draft tokens, counted from the texts, are those of the statistics."""
    reached = sum(min(len(t.drafts), len(t.emitted), accepted_in(t) + 1) for t in traces_of)
    accepted = sum(accepted_in(t) for t in traces_of)
    assert (sum(engine.stats.drafted), sum(engine.stats.accepted)) == (reached, accepted)


def accepted_in(trace) -> int:
    """How many of a round's draft tokens were emitted."""
    count = 0
    for draft, token in zip(trace.drafts, trace.emitted):
        if draft != token:
            break
        count += 1
    return count


def test_acceptance_does_not_count_draft_tokens_beyond_the_end_of_a_response():
    model, _ = load_model(str(ROOT / "base"))
    trained = drafter.Drafter(model)
    trained.load(ROOT / "base/drafter")
    engine = make_engine(model, trained, slots=6, context=80)
    task = tasks.Countdown()
    tokenizer = make_tokenizer()
    from parts.engine.interfaces import Group

    groups = [Group(i, tasks.encode_prompt(task.problem("test", i), tokenizer, "trace"), [i, i + 50]) for i in range(6)]
    strategy = Recorder()
    traces = []

    def keep(trace):
        traces.append(trace._replace(drafts=list(trace.drafts), emitted=list(trace.emitted)))

    list(engine.generate(groups, Sampling(max_new=40), strategy, keep))
    check_draft_tokens_beyond_the_end_do_not_count(engine, traces)
    engine.stats.accepted[0] += 1
    caught(check_draft_tokens_beyond_the_end_do_not_count, engine, traces)
    for report in strategy.reports:
        assert all(accepted <= drafted for accepted, drafted in zip(report.accepted, report.drafted))


def test_a_config_without_noise_has_no_noise_settings():
    assert noise_settings(AutoConfig.from_pretrained(ROOT / "base")) == {}
