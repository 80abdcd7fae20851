"""The engine behind the searches: a policy with its verifiers and its drafter, all problems searched at once.

    solve(problems, search)     all problems at once:
        RunningSearch           one problem's search; it yields Requests
        run_requests            all Requests of a kind are one rollout; a Request is a Group, since its attempts share a
                                prefix
        extended                adds what was generated to the attempts, with scores
        RunningSearch.send      sends the search its results, until it returns

Two kinds of rollout: whole attempts end at a stop token, steps also end at the token that ends a step. Steps are
decoded plainly: they are shorter than what the drafter would have to read before its first draft token (0.6 times the
speed with it).

--verifier-noise inverts a share of the verifier's scores, s -> 1 - s. Which ones depends only on the attempt's seed and
the step's number.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from tqdm import tqdm

from drafter import Drafter, EagleProposer
from parts.cli import UserError
from parts.devices import pick_device
from parts.engine.interfaces import Group, Response
from parts.engine.model_loading import load_model, stop_tokens
from parts.engine.sampling import Sampling, sequence_seed
from parts.files import find_folder
from rollout import Engine
from strategy import Goodput, plans_for
from tasks import Problem, Task, encode_prompt
from test_time.attempts import (
    Attempt,
    Ledger,
    ModelSizes,
    Request,
    Search,
    SearchStrategy,
    SeedFunction,
    shown_in_prompt,
)
from test_time.verifier import Verifier, step_features

VERIFIERS = ("process", "outcome")


@dataclass
class RunningSearch:
    """One problem's search, with its open requests."""

    prompt: list[int]
    search: Search
    ledger: Ledger = field(default_factory=Ledger)
    requests: list[Request] = field(default_factory=list)
    results: list[list[Attempt | None]] | None = None  # one list per request; None: the search has not begun
    attempts: list[Attempt] | None = None  # once the search has returned

    def send(self) -> None:
        """Send the search its results, and store its next requests or the attempts that it returns."""
        try:
            self.requests = self.search.send(self.results)
        except StopIteration as end:
            self.attempts = end.value
            return
        self.results = [[None] * len(request.attempts) for request in self.requests]


class Solution(NamedTuple):
    """What a search has returned, and what it has cost."""

    attempts: list[Attempt]
    ledger: Ledger


def weights_of(module: torch.nn.Module | None) -> int:
    """Return the number of a module's weights."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def matrix_weights(policy) -> int:
    """Return the number of weights of a policy that a token is multiplied with: without the embedding, which is only
    looked up, unless it is also the head.
    """
    embedding = policy.get_input_embeddings().weight
    tied = embedding is policy.get_output_embeddings().weight
    return weights_of(policy) - (0 if tied else embedding.numel())


class Solver:
    """A policy, its verifiers and its drafter, as far as they are in its folder.

    speculate, verify: whether to use the drafter and the verifiers. slots: sequences that run at once. noise: share of
    the verifier's scores that are inverted. Raises UserError.
    """

    def __init__(
        self, folder, task: Task, speculate: bool = True, verify: bool = True, slots: int = 256, noise: float = 0.0
    ):
        if not task.step_end:
            name = type(task).__name__.lower()
            raise UserError(f"--task {name}: search needs a task with steps and final answers: chain or gsm8k")
        self.task = task
        self.noise = noise
        self.max_new = task.longest
        self.folder = Path(find_folder(str(folder)))
        self.policy, self.tokenizer = load_model(str(self.folder), pick_device())
        self.stops = stop_tokens(self.policy, self.tokenizer)
        step_end = self.tokenizer.encode(task.step_end, add_special_tokens=False)
        if len(step_end) != 1:
            raise UserError(f"{self.folder}: its tokenizer has no single token for {task.step_end!r}, the end of a step")
        self.ends = self.stops | set(step_end)
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
        self.sizes = ModelSizes(
            matrix_weights(self.policy), weights_of(drafter), weights_of(self.verifiers.get("process"))
        )

    def encode(self, problem: Problem) -> list[int]:
        """Return the token ids of a problem's prompt."""
        return encode_prompt(problem, self.tokenizer)

    def grade(self, problem: Problem, tokens: list[int]) -> bool:
        """Return whether an attempt is right."""
        return self.task.grade(problem, self.tokenizer.decode(tokens)).strict

    # ---------------------------------------------------------------- rollouts

    def prepare(self, groups: list[Group], step: bool = False) -> None:
        """Make the engine ready for these groups. step: responses also end at the end of a step."""
        self.engine.set_stop_tokens(self.ends if step else self.stops)
        self.engine.reserve(max(len(group.prompt) - group.response_prefix_len for group in groups) + self.max_new)

    def generate(
        self, groups: list[Group], title: str = "", step: bool = False, greedy: bool = False
    ) -> Iterator[Response]:
        """Return an iterator of responses, in the order in which they are finished. title: of a progress bar, "" for
        none; step: only to the end of the next step.
        """
        self.prepare(groups, step)
        sampling = Sampling(0.0 if greedy else 1.0, max_new=self.max_new)
        responses = self.engine.generate(groups, sampling, None if step else self.strategy)
        total = sum(len(group.seeds) for group in groups)
        return tqdm(responses, total=total, desc=title, disable=not title, mininterval=1)

    def solve(self, problems: list[Problem], search: SearchStrategy, *seed) -> list[Solution]:
        """Search all problems at once -> for each its attempts and its ledger.

        search: one of strategies.py, its settings bound, e.g. partial(parallel, n=8). seed: numbers and strings.
        """
        started = time.time()
        searches = []
        for problem in problems:
            prompt = self.encode(problem)
            searches.append(RunningSearch(prompt, search(seed_function(seed, prompt))))
        running = searches
        while running:
            for one in running:
                one.send()
            running = [one for one in running if one.attempts is None]
            self.run_requests(running)
        seconds = (time.time() - started) / len(problems)
        for one in searches:
            one.ledger.seconds = seconds
        return [Solution(one.attempts, one.ledger) for one in searches]

    def run_requests(self, searches: list[RunningSearch]) -> None:
        """Run all open requests, those of a kind in one rollout, and store their results and costs."""
        by_kind: dict[tuple[bool, bool], list[tuple[RunningSearch, int]]] = {}
        for search in searches:
            for i, request in enumerate(search.requests):
                by_kind.setdefault((request.step, request.greedy), []).append((search, i))
        for (step, greedy), members in sorted(by_kind.items(), key=lambda item: item[0]):
            groups = [self.group_of(key, search, search.requests[i]) for key, (search, i) in enumerate(members)]
            responses = list(self.generate(groups, step=step, greedy=greedy))
            attempts = []
            for r in responses:
                search, i = members[r.group]
                attempts.append(search.requests[i].attempts[r.sample])
            for r, old, new in zip(responses, attempts, self.extended(attempts, responses)):
                search, i = members[r.group]
                search.results[i][r.sample] = new
                search.ledger.charge(r, steps=len(new.scores) - len(old.scores))

    def group_of(self, key: int, search: RunningSearch, request: Request) -> Group:
        """Return the engine's Group of a request. Its prefill is charged once for all its attempts."""
        first = request.attempts[0]
        prompt = search.prompt + shown_in_prompt(first.earlier, self.separator) + list(first.tokens)
        search.ledger.prefill += len(prompt) - 1
        seeds = [attempt.seed for attempt in request.attempts]
        return Group(key, prompt, seeds, response_prefix_len=len(first.tokens))

    def extended(self, attempts: list[Attempt], responses: list[Response]) -> Iterator[Attempt]:
        """Yield the attempts with what was generated for them, scored."""
        starts = [len(r.prompt) - len(attempt.tokens) for r, attempt in zip(responses, attempts)]
        scores = self.step_scores(responses, starts)
        for r, attempt, process, outcome in zip(responses, attempts, scores["process"], scores["outcome"]):
            tokens = attempt.tokens + tuple(r.tokens)
            done = tokens[-1] in self.stops or len(tokens) >= self.max_new
            new_scores = self.with_noise(attempt, process[len(attempt.scores) :])
            yield replace(
                attempt,
                tokens=tokens,
                scores=(*attempt.scores, *new_scores),
                outcome=outcome[-1] if outcome else 0.0,
                done=done,
                answer=self.task.final(self.tokenizer.decode(list(tokens))) if done else None,
            )

    def step_scores(self, responses: list[Response], starts: list[int]) -> dict[str, list[list[float]]]:
        """Return, by verifier, the scores of each response's steps; no scores where the verifier is missing.

        starts: where in prompt + tokens each attempt begins.
        """
        scores: dict[str, list[list[float]]] = {name: [[]] * len(responses) for name in VERIFIERS}
        if self.verifiers and responses:
            features, counts = step_features(self.policy, responses, starts, self.ends)
            for name, verifier in self.verifiers.items():
                scores[name] = [part.tolist() for part in verifier(features, counts).split(counts)]
        return scores

    def with_noise(self, attempt: Attempt, new_scores: list[float]) -> list[float]:
        """Return the scores of an attempt's new steps, a share of them inverted."""
        noisy = []
        for number, value in enumerate(new_scores, len(attempt.scores)):
            inverted = self.noise and sequence_seed("noise", attempt.seed, number) < self.noise * 2**63
            noisy.append(1 - value if inverted else value)
        return noisy


def seed_function(seed: tuple, prompt: list[int]) -> SeedFunction:
    """Return the function k -> seed of attempt k at this question. It does not depend on the other questions."""
    return lambda k: sequence_seed(*seed, tuple(prompt), k)
