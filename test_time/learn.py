"""`python -m test_time learn`: all that a search needs, learned from the policy in --model and written into its folder.

    process/, outcome/   verifiers: how likely is a step to lead to the right answer; was the attempt right in the end
    drafter/             the drafter that speeds up whole attempts, trained on the same attempts as the verifiers
    revise/              a policy that was tuned to make another attempt with earlier ones in the prompt. Its own
                         verifiers and drafter are trained as they are used: with its own earlier attempts in the prompt
    refit/               the control: tuned on the same right attempts, in as many steps, without earlier attempts in
                         the prompt

Labelled steps, to train a verifier on and to measure it with:

    label     of the step that ends at token j: the share of right answers among c samples that continue from there
              (Monte-Carlo). After the last step nothing is random any more, so its label is the outcome, 0 or 1
    outcome   whether the attempt was right in the end: the label of all its steps for the outcome verifier

Attempts of a language model have dozens of steps, and samples are long. There it is better to continue from a few steps
of many attempts (--labelled, --attempts) than from all steps of a few. The label of a step from which nothing continues
is the outcome: the attempt itself is one sample that continues from there, c = 1. Verifiers are measured on steps with
c samples only.

The revision policy is tuned on prompts with a question and 0 to 4 attempts at it, with a right attempt as the target.
The attempts in the prompt are wrong ones, as in the paper; in some prompts any number of them are right ones. A policy
that has seen only wrong ones learns that whatever it is shown is wrong, and its second attempt is right less often than
its first (0.66 after 0.91).
"""

import difflib
import json
import math
import random
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from base import pretrain, searcher
from drafter import Drafter, learn_from
from parts.cli import UserError, check_package
from parts.devices import has_bfloat16_arithmetic, pick_device
from parts.engine.interfaces import Group, Response
from parts.engine.model_loading import load_model
from parts.engine.sampling import sequence_seed
from parts.files import check_writable, write_atomically
from parts.running import checkpoints
from parts.training import lora
from parts.training.drafter_data import FeatureBuffer, TokenCounts
from test_time.attempts import shown_in_prompt
from test_time.config import Config, writable_folder
from test_time.results import CHOICE_FILE
from test_time.solver import VERIFIERS, Solver
from test_time.strategies import EARLIER_ATTEMPTS, revise
from test_time.verifier import auc, fit_verifier, step_features

MILLION = 10**6  # the parts of `learn` use different questions: each begins at another million
PARTS = 4  # or, in a data set, at another quarter
TRIES = 8  # attempts at each question, from which examples of revising are made; also to measure verifiers
DONE = "learned.json"  # for --resume: the parts that are finished -> their settings
RIGHT_SHARE = 0.6  # of the revision policy's prompts: any number of the attempts in them are right ones


class Example(NamedTuple):
    """An example of revising, in token ids."""

    prompt: list[int]  # the question and attempts at it
    target: list[int]  # a right attempt
    question: list[int]  # the prompt without attempts


def learn(config: Config) -> None:
    """Train and write everything. Raises UserError."""
    task = config.make_task()
    folder = writable_folder(config.model)
    solver = Solver(folder, task, speculate=False, verify=False, slots=config.slots, dtype=config.dtype)
    check_at_the_start(solver, config)
    done = parts_done(folder, config) if config.resume else {}
    if "revisions" not in done:
        for name in ("revise", "refit"):
            shutil.rmtree(folder / name, ignore_errors=True)  # they were tuned from another policy, or otherwise
    write_atomically(folder / DONE, json.dumps(done))

    def finished(part: str) -> None:
        done[part] = settings_of(part, config)
        write_atomically(folder / DONE, json.dumps(done))

    if "helpers" not in done:
        (folder / CHOICE_FILE).unlink(missing_ok=True)  # it goes by the scores of the verifiers that are replaced
        training = questions_of(solver, "train", 0, config.questions)
        held_out = questions_of(solver, "test", MILLION, config.held_out)
        train_helpers(solver, training, held_out, config, config.drafter_from)
        finished("helpers")
    if config.epochs:
        drafting = Solver(folder, task, verify=False, slots=config.slots, dtype=config.dtype)  # with its new drafter
        if "revisions" not in done:
            tune_revisions(drafting, config)
            finished("revisions")
        if "helpers of revisions" not in done:
            train_helpers_of_revisions(drafting, config)
            finished("helpers of revisions")


def settings_of(part: str, config: Config) -> dict:
    """Return the settings that a part depends on."""
    names = ["task", "data", "max_new", "seed", "questions", "attempts", "continuations", "labelled", "held_out"]
    names += ["lora_rank", "drafter_from", "drafter_seconds"]
    if part != "helpers":
        names.append("epochs")
    return {name: value for name, value in asdict(config).items() if name in names}


def parts_done(folder: Path, config: Config) -> dict[str, dict]:
    """Return the parts that an interrupted `learn` has finished. Raises UserError if it had other settings."""
    if not (folder / DONE).exists():
        return {}
    done = json.loads((folder / DONE).read_text())
    for part, before in done.items():
        if part == "helpers" or config.epochs:
            for name, now in settings_of(part, config).items():
                if before.get(name) != now:
                    flag_name = f"--{name.replace('_', '-')}"
                    raise UserError(
                        f"--resume: the {part} in {folder} were made with {flag_name} {before.get(name)}, not {now}; "
                        "without --resume all is made anew"
                    )
    return done


def check_at_the_start(solver: Solver, config: Config) -> None:
    """Raise UserError for what would otherwise fail after an hour."""
    check_writable(solver.folder)
    if config.lora_rank:
        check_package("peft", "--lora-rank")
    if start := start_of_drafter(solver.folder, config.drafter_from):
        Drafter(solver.policy).load(start)
    if solver.engine.slots < TRIES:
        raise UserError(f"--slots {config.slots}: must be at least {TRIES}")
    count = solver.task.count("train")
    if count is not None and config.questions > count // PARTS:
        raise UserError(f"--questions {config.questions}: at most {count // PARTS}, a quarter of the data set")


def tune_revisions(solver: Solver, config: Config) -> None:
    """Tune the revision policy and its control. Raises UserError."""
    rng = random.Random(config.seed)
    questions = questions_of(solver, "train", 2 * MILLION, config.questions)
    examples = revision_examples(solver, questions, config.seed, rng)
    if not examples:
        raise UserError(
            f"--questions {config.questions}: there is none with a right and a wrong one among {TRIES} attempts, so "
            "revising cannot be learned; --epochs 0 leaves it out"
        )
    plan: list[list[Example]] = []
    for _ in range(config.epochs):
        plan += pretrain.batches(examples, 2048, rng)
    tune(solver.folder, "revise", [[(e.prompt, e.target) for e in batch] for batch in plan], config)
    tune(solver.folder, "refit", [[(e.question, e.target) for e in batch] for batch in plan], config)


def train_helpers_of_revisions(solver: Solver, config: Config) -> None:
    """Train verifiers and a drafter for the revision policy of this policy, whose drafter it starts from. Raises
    UserError.
    """
    folder = solver.folder / "revise"
    start = solver.folder / "drafter"
    if start.exists():
        shutil.copytree(start, folder / "drafter", dirs_exist_ok=True)
    reviser = Solver(folder, solver.task, verify=False, slots=config.slots, dtype=config.dtype)
    training = with_attempts(reviser, questions_of(reviser, "train", 3 * MILLION, config.questions), config.seed)
    held_out = with_attempts(reviser, questions_of(reviser, "test", 2 * MILLION, config.held_out), config.seed)
    train_helpers(reviser, training, held_out, config)


# ---------------------------------------------------------------- questions: Groups that have no seeds yet


def questions_of(solver: Solver, split: str, first: int, count: int) -> list[Group]:
    """Return `count` questions of a split, beginning at an index. Their keys are 0, 1, 2 ... In a data set each quarter
    stands for a million.
    """
    size = solver.task.count(split)
    if size is not None:
        first = first // MILLION * (size // PARTS)
    problems = [solver.task.problem(split, first + i) for i in range(count)]
    return [Group(i, solver.encode(problem), [], problem=problem) for i, problem in enumerate(problems)]


def with_attempts(solver: Solver, questions: list[Group], seed: int) -> list[Group]:
    """Return the questions with the first 0 to 4 of the policy's own attempts in their prompts."""
    rng = random.Random(f"{seed} attempts shown")
    counts = [rng.randint(0, EARLIER_ATTEMPTS) for _ in questions]
    chains = [partial(revise, n=count, length=count) for count in counts]
    problems = [question.problem for question in questions]
    longer = []
    for question, solution in zip(questions, solver.solve_each(problems, chains, seed, "chains", title="revisions")):
        earlier = [attempt.tokens for attempt in solution.attempts]
        longer.append(replace(question, prompt=question.prompt + shown_in_prompt(earlier, solver.separator)))
    return longer


def with_seeds(questions: list[Group], samples: int, *seed) -> list[Group]:
    """Return the questions with seeds for so many samples."""
    groups = []
    for question in questions:
        groups.append(replace(question, seeds=[sequence_seed(*seed, question.key, k) for k in range(samples)]))
    return groups


# ---------------------------------------------------------------- labelled steps


class LabelledSteps(NamedTuple):
    """The steps of attempts, one attempt after the other. S steps in all."""

    features: torch.Tensor  # (S, 2 D + 2), see verifier.step_features
    counts: list[int]  # steps of each attempt
    labels: torch.Tensor  # (S,); nan: of a step from which nothing continues
    outcomes: torch.Tensor  # (S,)
    place: torch.Tensor  # (S, 2): index of the question, number of the step in its attempt
    responses: list[Response]  # the attempts, with their hidden states


def labelled_steps(
    solver: Solver, questions: list[Group], attempts: int, continuations: int, seed, labelled: int = 0
) -> LabelledSteps:
    """Make `attempts` attempts at each question, and `continuations` of each from the end of each step -> their steps.
    seed: a number or a tuple; labelled: how many steps of an attempt are labelled, beside the last; 0: all.
    """
    rng = random.Random(f"{seed} labelled")
    groups = with_seeds(questions, attempts, seed, "attempt")
    responses = sorted(solver.generate(groups, "attempts"), key=lambda r: (r.group, r.sample))
    features, counts = step_features(solver.policy, responses, [len(r.prompt) for r in responses], solver.ends)
    steps = []  # (index of the response, number of the step, tokens up to its end)
    label_of = {}  # (index of the response, tokens up to the step's end) -> label
    groups = []
    for n, r in enumerate(responses):
        label_of[n, len(r.tokens)] = float(solver.grade(r.problem, r.tokens))
        ends = [j + 1 for j, token in enumerate(r.tokens) if token in solver.ends]
        inner = [j for j in ends if j < len(r.tokens)]
        chosen = set(rng.sample(inner, labelled) if 0 < labelled < len(inner) else inner)
        for number, j in enumerate(ends):
            steps.append((n, number, j))
            if j in chosen:
                label_of[n, j] = 0.0
                seeds = [sequence_seed(seed, "onward", r.group, r.sample, j, k) for k in range(continuations)]
                prompt = r.prompt + r.tokens[:j]
                groups.append(Group((n, j), prompt, seeds, response_prefix_len=j, problem=r.problem))
    for r in solver.generate(groups, "continuations"):
        n, j = r.group
        label_of[n, j] += solver.grade(r.problem, responses[n].tokens[:j] + r.tokens) / continuations
    labels = torch.tensor([label_of.get((n, j), math.nan) for n, _, j in steps])
    outcomes = torch.tensor([label_of[n, len(responses[n].tokens)] for n, _, _ in steps])
    place = torch.tensor([(responses[n].group, number) for n, number, _ in steps])
    return LabelledSteps(features, counts, labels, outcomes, place, responses)


# ---------------------------------------------------------------- verifiers and drafter


def train_helpers(
    solver: Solver, training: list[Group], held_out: list[Group], config: Config, drafter_from: str = ""
) -> None:
    """Train the drafter and both verifiers on a policy's own attempts, write them into its folder, and print how well
    the verifiers tell good steps from bad ones. drafter_from: see `start_of_drafter`.
    """
    steps = labelled_steps(solver, training, config.attempts, config.continuations, config.seed, config.labelled)
    train_drafter(solver, steps.responses, config, drafter_from)
    labels = torch.where(steps.labels.isnan(), steps.outcomes, steps.labels)
    without_logp = steps.features.clone()
    without_logp[:, -2:] = 0
    verifiers = {
        "process": fit_verifier(steps.features, steps.counts, labels),
        "outcome": fit_verifier(steps.features, steps.counts, steps.outcomes),
        "hidden states only": fit_verifier(without_logp, steps.counts, labels),
    }
    for name in VERIFIERS:
        verifiers[name].save(solver.folder / name)
    seed = (config.seed, "held out")
    measured = labelled_steps(solver, held_out, TRIES, 8, seed, config.labelled)
    features, counts, labels, place = measured.features, measured.counts, measured.labels, measured.place
    known = len(labels) - int(labels.isnan().sum())
    print(f"{solver.folder}: {known} labelled steps of {len(held_out)} held-out questions")
    print(f"{'AUC':>50} {'pooled':>9} {'within question and step':>25}")
    scores = {name: verifier(features, counts) for name, verifier in verifiers.items()}
    logp = features[:, -2]
    scores["lowest log p so far"] = torch.cat([part.cummin(0).values for part in logp.split(counts)])
    scores["lowest log p of the step"] = logp
    for name, s in scores.items():
        print(f"{name:>50} {auc(s, labels):9.3f} {auc(s, labels, place):25.3f}")


def start_of_drafter(folder: Path, drafter_from: str) -> Path | None:
    """Return the folder of the drafter to start from: drafter_from, or if that is empty the one that the policy in
    `folder` has. None: random weights.
    """
    own = folder / "drafter"
    if drafter_from:
        return Path(drafter_from)
    return own if own.exists() else None


def train_drafter(solver: Solver, responses: list[Response], config: Config, drafter_from: str) -> None:
    """Write a drafter into the policy's folder, trained on the responses for --drafter-seconds. drafter_from: see
    `start_of_drafter`. Raises UserError.
    """
    torch.manual_seed(config.seed)
    start = start_of_drafter(solver.folder, drafter_from)
    drafter = Drafter(solver.policy)
    if start:
        drafter.load(start)
    if config.drafter_seconds:
        buffer = FeatureBuffer(limit=4 << 30)
        counts = TokenCounts(solver.policy.config.vocab_size, solver.stops)
        for response in responses:
            buffer.add(response)
            counts.add(response.tokens)
        learn_from(buffer, counts, drafter, solver.policy, config.drafter_seconds, config.seed)
    if start or config.drafter_seconds:
        drafter.save(solver.folder / "drafter")


# ---------------------------------------------------------------- the revision policy


def revision_examples(solver: Solver, questions: list[Group], seed: int, rng: random.Random) -> list[Example]:
    """Return the examples to tune on, up to two for each question, with 0 to 4 attempts in their prompts."""
    wrong: list[list[list[int]]] = [[] for _ in questions]
    right: list[list[list[int]]] = [[] for _ in questions]
    for r in solver.generate(with_seeds(questions, TRIES, seed, "tries"), "attempts"):
        side = right if solver.grade(r.problem, r.tokens) else wrong
        side[r.group].append(r.tokens)
    examples = []
    for i, question in enumerate(questions):
        if not wrong[i]:
            continue
        for target in rng.sample(right[i], min(2, len(right[i]))):
            shown = shown_in_prompt(choose_attempts(wrong[i], target, rng), solver.separator)
            examples.append(Example(question.prompt + shown, target, question.prompt))
    return examples


def choose_attempts(wrong: list[list[int]], target: list[int], rng: random.Random) -> list[list[int]]:
    """Return the attempts that the prompt shows before the target, oldest first."""
    count = rng.randint(0, EARLIER_ATTEMPTS)
    right_count = rng.randint(0, count) if rng.random() < RIGHT_SHARE else 0
    shown = rng.sample(wrong, min(count - right_count, len(wrong)))
    # the most similar last: what is right in it can be kept
    shown.sort(key=lambda attempt: difflib.SequenceMatcher(None, attempt, target).ratio())
    shown += [target] * right_count
    if right_count and rng.random() < 0.5:
        rng.shuffle(shown)
    return shown


def tune(folder: Path, name: str, plan: list[list[tuple]], config: Config) -> None:
    """Tune the policy in the folder on batches of (prompt ids, ids of the response), and write it to folder/name. With
    --lora-rank adapters are tuned, and merged into the weights. Raises UserError.
    """
    model, tokenizer = load_model(str(folder), pick_device())
    if config.lora_rank:
        lora.add(model, config.lora_rank, config.seed)
        batches = [[searcher.to_imitate(*example) for example in batch] for batch in plan]
        searcher.train(model, batches, 5e-4, has_bfloat16_arithmetic(), name)
    else:
        pretrain.learn(model.train(), plan, 1.5e-3, name)
    weights = checkpoints.whole_weights(model)
    checkpoints.save_folder(folder / name, lambda part: checkpoints.save_policy(part, model, tokenizer, weights))
