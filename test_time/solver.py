"""The engine behind the searches: a policy with its verifiers and its drafter, and the bookkeeping.

    solve(problems, search)                 all problems at once:
        each Dialogue yields Wants          what its search wishes to have written
        all Wants of a kind                 are one rollout: a Want is a Group, since its attempts share a prefix
        judge                               scores what was written, and adds it to the attempts
        each Dialogue is sent its replies   until its search returns

Two kinds of rollout: whole attempts end at a stop token; steps end at a step's end, too. Steps are decoded plainly:
they are shorter than what the drafter would have to read before its first guess (0.6 times the speed with it).

--verifier-noise: a share of the verifier's scores is inverted, s -> 1 - s. Which ones depends on the attempt's seed and
the step's number only.
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
from test_time.attempts import Attempt, Ledger, Search, SearchStrategy, SeedOf, Sizes, Want
from test_time.verifier import Verifier, step_features

# ---------------------------------------------------------------- a search and the engine, in dialogue


@dataclass
class Order:
    """A Want, whose it is, and what has been written for it so far."""

    dialogue: "Dialogue"
    want: Want
    reply: list[Attempt | None]


@dataclass
class Dialogue:
    """What passes between one question's search and the engine."""

    prompt: list[int]
    search: Search
    ledger: Ledger = field(default_factory=Ledger)
    orders: list[Order] = field(default_factory=list)
    attempts: list[Attempt] | None = None  # once the search has returned

    def begin(self) -> None:
        """Note what the search wants first."""
        self.send(None)

    def reply(self) -> None:
        """Send the search what it wanted, and note what it wants next."""
        self.send([order.reply for order in self.orders])

    def send(self, replies: list[list[Attempt]] | None) -> None:
        """One turn of the search."""
        try:
            wants = self.search.send(replies)
        except StopIteration as end:
            self.attempts = end.value
            return
        self.orders = [Order(self, want, [None] * len(want.attempts)) for want in wants]


class Solution(NamedTuple):
    """What a search has come to."""

    attempts: list[Attempt]
    ledger: Ledger


# ---------------------------------------------------------------- the solver


def weights_of(module: torch.nn.Module | None) -> int:
    """How many weights a module has."""
    return sum(p.numel() for p in module.parameters()) if module is not None else 0


def matrix_weights(policy) -> int:
    """Weights of a policy that a token is multiplied with: not the embedding, which is looked up, unless it is the
    head, too.
    """
    embedding = policy.get_input_embeddings().weight
    tied = embedding is policy.get_output_embeddings().weight
    return weights_of(policy) - (0 if tied else embedding.numel())


class Solver:
    """A policy, its verifiers (process, outcome) and its drafter, all from one folder, as far as they are there.

    speculate, verify: whether to use drafter and verifiers. slots: rows that run at once. noise: share of the
    verifier's scores that are inverted. Raises UserError.
    """

    def __init__(
        self, folder, task: Task, speculate: bool = True, verify: bool = True, slots: int = 256, noise: float = 0.0
    ):
        if not task.step_end:
            name = type(task).__name__.lower()
            raise UserError(
                f"--task {name}: search needs a task that tells steps and final answers (see tasks.py): chain or gsm8k"
            )
        self.task = task
        self.noise = noise
        self.max_new = task.longest
        self.folder = Path(find_folder(str(folder)))
        self.policy, self.tokenizer = load_model(str(self.folder), pick_device())
        self.stops = stop_tokens(self.policy, self.tokenizer)
        self.ends = self.stops | {self.step_end_token()}
        self.again = tuple(self.tokenizer.encode(task.again, add_special_tokens=False))
        self.verifiers = self.load_verifiers() if verify else {}
        drafter = self.load_drafter() if speculate else None
        drafters = {"eagle": EagleProposer(drafter)} if drafter else {}
        self.strategy = Goodput(plans_for(["eagle"])) if drafter else None  # how far to draft, in whole attempts
        self.engine = Engine(self.policy, self.stops, slots, keep_hidden=True, proposers=drafters, frozen=True)
        verifier = self.verifiers.get("process")
        self.sizes = Sizes(matrix_weights(self.policy), weights_of(drafter), weights_of(verifier))

    def step_end_token(self) -> int:
        """The token that ends a step. Raises UserError if the tokenizer needs several."""
        ids = self.tokenizer.encode(self.task.step_end, add_special_tokens=False)
        if len(ids) != 1:
            raise UserError(
                f"{self.folder}: its tokenizer has no single token for the end of a step, {self.task.step_end!r}"
            )
        return ids[0]

    def load_verifiers(self) -> dict[str, Verifier]:
        """Those that are in the folder, by name."""
        width = self.policy.config.hidden_size
        names = [name for name in ("process", "outcome") if (self.folder / name).exists()]
        return {name: Verifier.load(self.folder / name, width) for name in names}

    def load_drafter(self) -> Drafter | None:
        """The one in the folder, if there is one."""
        folder = self.folder / "drafter"
        if not folder.exists():
            return None
        drafter = Drafter(self.policy)
        drafter.load(folder)
        return drafter

    def encode(self, problem: Problem) -> list[int]:
        """The prompt's tokens."""
        return encode_prompt(problem, self.tokenizer)

    def grade(self, problem: Problem, tokens: list[int]) -> bool:
        """Whether an attempt is right."""
        return self.task.grade(problem, self.tokenizer.decode(tokens)).strict

    def generate(
        self, groups: list[Group], title: str = "", step: bool = False, greedy: bool = False
    ) -> Iterator[Response]:
        """Responses as they end. title: of the progress bar, "" for none; step: only to the next step's end."""
        self.engine.set_stop_tokens(self.ends if step else self.stops)
        self.engine.reserve(max(len(group.prompt) - group.response_prefix_len for group in groups) + self.max_new)
        sampling = Sampling(0.0 if greedy else 1.0, max_new=self.max_new)
        responses = self.engine.generate(groups, sampling, None if step else self.strategy)
        total = sum(len(group.seeds) for group in groups)
        return tqdm(responses, total=total, desc=title, disable=not title, mininterval=1)

    def solve(self, problems: list[Problem], search: SearchStrategy, *seed) -> list[Solution]:
        """Search all problems at once -> for each its attempts, and its ledger.

        search: one of strategies.py, its settings bound, e.g. partial(parallel, n=8). seed: numbers and strings.
        """
        started = time.time()
        dialogues = []
        for problem in problems:
            prompt = self.encode(problem)
            dialogues.append(Dialogue(prompt, search(seeds_for(seed, prompt))))
        for dialogue in dialogues:
            dialogue.begin()
        running = dialogues
        while running:
            self.write([order for dialogue in running for order in dialogue.orders])
            for dialogue in running:
                dialogue.reply()
            running = [dialogue for dialogue in running if dialogue.attempts is None]
        seconds = (time.time() - started) / len(problems)
        for dialogue in dialogues:
            dialogue.ledger.seconds = seconds
        return [Solution(dialogue.attempts, dialogue.ledger) for dialogue in dialogues]

    def write(self, orders: list[Order]) -> None:
        """Write what was ordered, and fill in the replies: all orders of a kind in one rollout."""
        kinds = {(order.want.step, order.want.greedy) for order in orders}
        for step, greedy in sorted(kinds):
            alike = [order for order in orders if (order.want.step, order.want.greedy) == (step, greedy)]
            groups = [self.enter_group(key, order) for key, order in enumerate(alike)]
            responses = list(self.generate(groups, step=step, greedy=greedy))
            attempts = [alike[r.group].want.attempts[r.sample] for r in responses]
            for r, old, new in zip(responses, attempts, self.judge(responses, attempts)):
                order = alike[r.group]
                order.reply[r.sample] = new
                order.dialogue.ledger.charge(r, steps=len(new.scores) - len(old.scores))

    def enter_group(self, key: int, order: Order) -> Group:
        """The engine's Group of an order. Its prefill is entered in the ledger: once for all its attempts."""
        first = order.want.attempts[0]
        prompt = order.dialogue.prompt + list(first.before + first.tokens)
        order.dialogue.ledger.prefill += len(prompt) - 1
        seeds = [attempt.seed for attempt in order.want.attempts]
        return Group(key, prompt, seeds, response_prefix_len=len(first.tokens))

    def judge(self, responses: list[Response], attempts: list[Attempt]) -> Iterator[Attempt]:
        """The attempts with what was written for them, scored."""
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
        """By each verifier (process, outcome): for each response the scores of its steps; none without the verifier.

        starts: where in prompt + tokens each attempt begins.
        """
        scores: dict[str, list[list[float]]] = {name: [[]] * len(responses) for name in ("process", "outcome")}
        if self.verifiers and responses:
            features, counts = step_features(self.policy, responses, starts, self.ends)
            for name, verifier in self.verifiers.items():
                scores[name] = [part.tolist() for part in verifier(features, counts).split(counts)]
        return scores

    def with_noise(self, attempt: Attempt, new_scores: list[float]) -> list[float]:
        """Scores of an attempt's new steps, a share of them inverted."""
        if not self.noise:
            return new_scores
        noisy = []
        for number, value in enumerate(new_scores, len(attempt.scores)):
            inverted = sequence_seed("noise", attempt.seed, number) < self.noise * 2**63
            noisy.append(1 - value if inverted else value)
        return noisy


def seeds_for(seed: tuple, prompt: list[int]) -> SeedOf:
    """The function k -> seed of attempt k at this question. It does not depend on the other questions."""
    name = tuple(prompt)

    def seed_of(k) -> int:
        return sequence_seed(*seed, name, k)

    return seed_of
