"""The engine behind the searches: a policy with its verifiers and its drafter.

`solve` runs the searches of all problems side by side: it collects their Requests, runs all Requests of a kind in one
rollout (a Request is a Group, since its attempts share a prefix), scores what was generated, adds it to the attempts
and sends them back, until every search has returned.

Whole attempts end at a stop token, steps also at a token that ends a step. Steps are decoded without speculation: they
are shorter than the prompt that the drafter would have to read before its first draft token (0.6 times the speed with
it).

--verifier-noise inverts a share of the verifier's scores, s -> 1 - s. Which ones depends only on the attempt's seed and
the step's number.
"""

import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from drafter import Drafter, EagleProposer
from parts.cli import UserError
from parts.devices import pick_device
from parts.engine.interfaces import Group, Response
from parts.engine.model_loading import load_actor, stop_tokens
from parts.engine.sampling import Sampling, sequence_seed
from parts.files import find_folder
from rollout import Engine
from strategy import Goodput, plans_for
from tasks import Problem, Task, encode_prompt
from test_time.attempts import Attempt, Ledger, ModelSizes, Request, SearchStrategy, shown_in_prompt
from test_time.verifier import Verifier, step_features

VERIFIERS = ("process", "outcome")


def check_verifiers(folder: Path) -> None:
    """Raise UserError if the policy's folder lacks a verifier."""
    for name in VERIFIERS:
        if not (folder / name).exists():
            raise UserError(f"{folder}: no verifier in {name}/ to search with; `python -m test_time learn` makes it")


class Solution(NamedTuple):
    """What a search has returned, and what it has cost."""

    attempts: list[Attempt]
    ledger: Ledger


def weights_of(module: torch.nn.Module | None) -> int:
    """Return the number of a module's weights."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


class Solver:
    """A policy, its verifiers and its drafter, as far as they are in its folder.

    speculate, verify: whether to use the drafter and the verifiers. slots: sequences that run at once. noise: share of
    the verifier's scores that are inverted. dtype: of the policy's weights, one of ACTOR_DTYPES. Raises UserError.
    """

    def __init__(
        self,
        folder,
        task: Task,
        speculate: bool = True,
        verify: bool = True,
        slots: int = 256,
        noise: float = 0.0,
        dtype: str = "auto",
    ):
        if not task.step_end:
            name = type(task).__name__.lower()
            raise UserError(f"--task {name}: search needs a task with steps and final answers: countdown, chain, gsm8k")
        self.task = task
        self.noise = noise
        self.max_new = task.longest
        self.folder = Path(find_folder(str(folder)))
        self.policy, self.tokenizer = load_actor(str(self.folder), pick_device(), dtype)
        self.stops = stop_tokens(self.policy, self.tokenizer)
        self.ends = self.stops | self.tokens_with(task.step_end)  # the tokens that end a step
        self.separator = self.tokenizer.encode(task.again, add_special_tokens=False)  # between two attempts
        width = self.policy.config.hidden_size
        names = [name for name in VERIFIERS if verify and (self.folder / name).exists()]
        self.verifiers = {name: Verifier.load(self.folder / name, width) for name in names}
        drafter = None
        if speculate and (self.folder / "drafter").exists():
            drafter = Drafter(self.policy)
            drafter.load(self.folder / "drafter")
        proposers = {"eagle": EagleProposer(drafter)} if drafter else {}
        self.strategy = Goodput(plans_for(["eagle"])) if drafter else None  # how far to draft in whole attempts
        self.engine = Engine(self.policy, self.stops, slots, keep_hidden=True, proposers=proposers, frozen=True)
        head = self.policy.get_output_embeddings().weight  # (V, D)
        embedding = self.policy.get_input_embeddings().weight  # only looked up, unless it is the head as well
        body = weights_of(self.policy) - head.numel() - (0 if embedding is head else embedding.numel())
        draft_head = 0
        if drafter:
            draft_head = head.numel() if drafter.draft_vocab is None else len(drafter.draft_vocab) * head.shape[1]
        verifier = weights_of(self.verifiers.get("process"))
        self.sizes = ModelSizes(body, head.numel(), weights_of(drafter), draft_head, verifier)

    def tokens_with(self, text: str) -> set[int]:
        """Return the ids of all tokens that contain a text: a line may end with "\\n", or with "\\n\\n". Raises
        UserError if there is none.
        """
        texts = self.tokenizer.batch_decode([[token] for token in range(len(self.tokenizer))])
        found = {token for token, written in enumerate(texts) if text in written}
        if not found:
            raise UserError(f"{self.folder}: the tokenizer has no token for {text!r}, which ends a step of this task")
        return found

    def encode(self, problem: Problem) -> list[int]:
        """Return the token ids of a problem's prompt."""
        return encode_prompt(problem, self.tokenizer)

    def grade(self, problem: Problem, tokens: list[int]) -> bool:
        """Return whether an attempt is right."""
        return self.task.grade(problem, self.tokenizer.decode(tokens)).strict

    def prepare(self, groups: list[Group], step: bool = False) -> None:
        """Make the engine ready for these groups. step: responses also end at the end of a step."""
        self.engine.set_stop_tokens(self.ends if step else self.stops)
        longest = max((len(group.prompt) - group.response_prefix_len for group in groups), default=0)
        self.engine.reserve(longest + self.max_new)

    def generate(self, groups: list[Group], title: str = "", step: bool = False, greedy: bool = False):
        """Return an iterator of Responses, in the order in which they are finished. title: of a progress bar, "" for
        none; step: only to the end of the next step. Groups with long prompts run first: all sequences of a round are
        padded to the longest, so those that run together should have similar lengths.
        """
        groups = sorted(groups, key=lambda group: -len(group.prompt))
        self.prepare(groups, step)
        sampling = Sampling(0.0 if greedy else 1.0, max_new=self.max_new)
        responses = self.engine.generate(groups, sampling, None if step else self.strategy)
        total = sum(len(group.seeds) for group in groups)
        return tqdm(responses, total=total, desc=title, disable=not title, mininterval=1)

    def solve(self, problems: list[Problem], search: SearchStrategy, *seed) -> list[Solution]:
        """Search all problems at once, all by one strategy; see `solve_each`."""
        return self.solve_each(problems, [search] * len(problems), *seed)

    def solve_each(
        self, problems: list[Problem], strategies: list[SearchStrategy], *seed, title: str = ""
    ) -> list[Solution]:
        """Search all problems at once, each by its own strategy -> for each its attempts and its ledger.

        strategies: of strategies.py, their settings bound, e.g. partial(parallel, n=8). seed: numbers and strings; with
        the prompt and k they make the seed of attempt k, so a question does not depend on the others. title: of a
        progress bar for each rollout, "" for none.
        """
        started = time.time()
        prompts = [self.encode(problem) for problem in problems]
        searches = []
        for prompt, strategy in zip(prompts, strategies):
            searches.append(strategy(partial(sequence_seed, *seed, tuple(prompt))))
        ledgers = [Ledger() for _ in problems]
        finished: dict[int, list[Attempt]] = {}  # index of the problem -> its attempts
        results: dict[int, list | None] = dict.fromkeys(range(len(problems)))  # what each search is sent next
        while results:
            requests = {}
            for i, result in results.items():
                try:
                    requests[i] = searches[i].send(result)
                except StopIteration as end:
                    finished[i] = end.value
            results = self.run_requests(requests, prompts, ledgers, title)
        seconds = (time.time() - started) / len(problems)
        for ledger in ledgers:
            ledger.seconds = seconds
        return [Solution(finished[i], ledger) for i, ledger in enumerate(ledgers)]

    def run_requests(
        self, requests: dict[int, list[Request]], prompts: list[list[int]], ledgers: list[Ledger], title: str
    ) -> dict[int, list]:
        """Run the requests of each problem, those of a kind in one rollout, and charge their costs -> {problem: for
        each of its requests the list of continued attempts}.
        """
        results: dict[int, list[list[Attempt]]] = {i: [] for i in requests}
        by_kind: dict[tuple[bool, bool], list[Group]] = defaultdict(list)
        for i, own in requests.items():
            for k, request in enumerate(own):
                results[i].append(list(request.attempts))
                first = request.attempts[0]
                prompt = prompts[i] + shown_in_prompt(first.earlier, self.separator) + list(first.tokens)
                ledgers[i].prefill += len(prompt) - 1  # once for all attempts of the request
                seeds = [attempt.seed for attempt in request.attempts]
                by_kind[request.step, request.greedy].append(Group((i, k), prompt, seeds, len(first.tokens)))
        for (step, greedy), groups in sorted(by_kind.items()):
            responses = list(self.generate(groups, title, step, greedy))
            read_by_drafter = {r.group: len(r.prompt) for r in responses if r.draft_tokens}
            for (i, _), tokens in read_by_drafter.items():
                ledgers[i].drafter += tokens
            before = [results[r.group[0]][r.group[1]][r.sample] for r in responses]
            for r, old, new in zip(responses, before, self.extended(before, responses)):
                i, k = r.group
                results[i][k][r.sample] = new
                ledgers[i].charge(r, steps=len(new.scores) - len(old.scores))
        return results

    def extended(self, attempts: list[Attempt], responses: list[Response]) -> Iterator[Attempt]:
        """Yield the attempts with what was generated for them, scored by the verifiers that there are."""
        scores: dict[str, list[list[float]]] = {name: [[]] * len(responses) for name in VERIFIERS}
        if self.verifiers and responses:
            starts = [len(r.prompt) - len(attempt.tokens) for r, attempt in zip(responses, attempts)]
            features, counts = step_features(self.policy, responses, starts, self.ends)
            for name, verifier in self.verifiers.items():
                scores[name] = [part.tolist() for part in verifier(features, counts).split(counts)]
        for r, attempt, process, outcome in zip(responses, attempts, scores["process"], scores["outcome"]):
            tokens = attempt.tokens + tuple(r.tokens)
            done = tokens[-1] in self.stops or len(tokens) >= self.max_new
            new_scores = list(attempt.scores)
            for number, value in enumerate(process[len(attempt.scores) :], len(attempt.scores)):
                inverted = self.noise and sequence_seed("noise", attempt.seed, number) < self.noise * 2**63
                new_scores.append(1 - value if inverted else value)
            yield replace(
                attempt,
                tokens=tokens,
                scores=tuple(new_scores),
                outcome=outcome[-1] if outcome else 0.0,
                done=done,
                answer=self.task.final(self.tokenizer.decode(list(tokens))) if done else None,
            )
