"""`python -m test_time learn`: all that a search needs, learnt from the policy in --model, and written into its folder.

    process/, outcome/   verifiers: how likely is a step to lead to the right answer; was the attempt right in the end
    drafter/             the drafter that speeds up whole attempts
    revise/              a policy that was tuned to make another attempt with earlier ones in view. Its own verifiers
                         and drafter learn where they will be used: with its own earlier attempts in view
    refit/               the control: tuned on the same right answers, without earlier attempts in view

What the revision policy is tuned on: a question, 0 to 4 attempts at it, and a right attempt as the goal. The attempts
in view are wrong ones, as in the paper, and in some prompts any number of them right ones. Whoever has seen wrong ones
only learns that what it sees is wrong, and its second attempt is right less often than its first (0.66 after 0.91).
"""

import difflib
import random
from functools import partial
from pathlib import Path

import torch

from base import pretrain
from drafter import Drafter, warm_start
from parts.engine.interfaces import Group
from parts.engine.model_loading import load_model
from parts.engine.sampling import Sampling, sequence_seed
from tasks import Problem, Task, make_task
from test_time.attempts import Question, in_view
from test_time.config import Config, writable_folder
from test_time.labels import LabelledSteps, labelled_steps
from test_time.solver import Solver
from test_time.strategies import revise
from test_time.verifier import Verifier, auc, fit_verifier

MILLION = 10**6  # the parts below use other questions, so they begin at other millions
VIEW = 4  # attempts in view, at most

# (prompt ids, ids of a right attempt): a row to tune on
Example = tuple[list[int], list[int]]


def learn(config: Config) -> None:
    """The whole of it."""
    task = make_task(config.task, config.data)
    folder = writable_folder(config.model)
    solver = Solver(folder, task, speculate=False, verify=False)
    training = plain_questions(solver, problems_of(task, "train", 0, config.questions))
    held_out = plain_questions(solver, problems_of(task, "test", MILLION, 200))
    teach(solver, folder, training, held_out, config)

    rng = random.Random(config.seed)
    for_tuning = plain_questions(solver, problems_of(task, "train", 2 * MILLION, config.questions))
    for name, rows in revision_rows(solver, for_tuning, rng).items():
        tune(folder, name, rows, config.epochs, rng)

    reviser = Solver(folder / "revise", task, speculate=False, verify=False)
    training = questions_in_chains(reviser, problems_of(task, "train", 3 * MILLION, config.questions), config.seed, rng)
    held_out = questions_in_chains(reviser, problems_of(task, "test", 2 * MILLION, 200), config.seed, rng)
    teach(reviser, folder / "revise", training, held_out, config)


# ---------------------------------------------------------------- questions


def problems_of(task: Task, split: str, first: int, count: int) -> list[Problem]:
    """So many problems of a split, from that index on."""
    return [task.problem(split, i) for i in range(first, first + count)]


def plain_questions(solver: Solver, problems: list[Problem]) -> list[Question]:
    """With nothing but the question in the prompt."""
    return [Question(problem, solver.encode(problem)) for problem in problems]


def questions_in_chains(solver: Solver, problems: list[Problem], seed: int, rng: random.Random) -> list[Question]:
    """With the first 0 to 4 of the policy's own attempts in the prompt."""
    chain = partial(revise, n=VIEW, length=VIEW, again=solver.again)
    solutions = solver.solve(problems, chain, seed, "chains")
    questions = []
    for problem, solution in zip(problems, solutions):
        attempts = solution.attempts[: rng.randint(0, VIEW)]
        shown = in_view([attempt.tokens for attempt in attempts], solver.again)
        questions.append(Question(problem, solver.encode(problem) + list(shown)))
    return questions


# ---------------------------------------------------------------- the revision policy


def revision_rows(
    solver: Solver, questions: list[Question], rng: random.Random, right_in_view: float = 0.6
) -> dict[str, list[Example]]:
    """What to tune on, by name: "refit" has only the question in its prompts, "revise" also 0 to 4 attempts at it.

    right_in_view: chance that any number of the attempts in view are right ones, see above.
    """
    groups = []
    for i, question in enumerate(questions):
        groups.append(Group(i, question.prompt, [sequence_seed("tries", i, k) for k in range(8)]))
    wrong: list[list[list[int]]] = [[] for _ in questions]
    right: list[list[list[int]]] = [[] for _ in questions]
    for r in solver.generate(groups, "attempts"):
        is_right = solver.grade(questions[r.group].problem, r.tokens)
        (right if is_right else wrong)[r.group].append(r.tokens)
    rows: dict[str, list[Example]] = {"revise": [], "refit": []}
    for i, question in enumerate(questions):
        if not wrong[i]:
            continue
        for goal in rng.sample(right[i], min(2, len(right[i]))):
            attempts = choose_view(wrong[i], goal, rng, right_in_view)
            shown = in_view(attempts, solver.again)
            rows["revise"].append((question.prompt + list(shown), goal))
            rows["refit"].append((question.prompt, goal))
    return rows


def choose_view(
    wrong: Sequence[list[int]], goal: list[int], rng: random.Random, right_in_view: float
) -> list[list[int]]:
    """The attempts that stand before the goal, oldest first."""

    def likeness(attempt: list[int]) -> float:
        return difflib.SequenceMatcher(None, attempt, goal).ratio()

    count = rng.randint(0, VIEW)
    good = rng.randint(0, count) if rng.random() < right_in_view else 0
    shown = rng.sample(wrong, min(count - good, len(wrong)))
    shown.sort(key=likeness)  # the nearest last: what is right in it can be kept
    shown += [goal] * good
    if good and rng.random() < 0.5:
        rng.shuffle(shown)
    return shown


def tune(folder: Path, name: str, rows: list[Example], epochs: int, rng: random.Random) -> None:
    """Tune the policy in the folder on the rows, and write it to folder/name."""
    model, tokenizer = load_model(str(folder))
    plan = []
    for _ in range(epochs):
        plan += pretrain.batches(rows, 2048, rng)
    pretrain.learn(model.train(), plan, 1.5e-3, name)
    model.save_pretrained(folder / name)
    tokenizer.save_pretrained(folder / name)


# ---------------------------------------------------------------- verifiers and drafter


def teach(solver: Solver, folder: Path, training: list[Question], held_out: list[Question], config: Config) -> None:
    """Train both verifiers and the drafter on a policy's own attempts, and say how well the verifiers tell good steps
    from bad.
    """
    steps = labelled_steps(solver, training, 1, config.continuations, config.seed)
    without_logp = steps.features.clone()
    without_logp[:, -2:] = 0
    verifiers = {
        "process": fit_verifier(steps.features, steps.counts, steps.labels),
        "outcome": fit_verifier(steps.features, steps.counts, steps.outcomes),
        "hidden state only": fit_verifier(without_logp, steps.counts, steps.labels),
    }
    for name in ("process", "outcome"):
        verifiers[name].save(folder / name)
    held_out_steps = labelled_steps(solver, held_out, 8, 8, (config.seed, "held out"))
    print(f"{folder}: AUC of steps of {len(held_out)} held-out questions   pooled   within question and step")
    print_auc(verifiers, held_out_steps)

    torch.manual_seed(config.seed)
    drafter = Drafter(solver.policy)
    groups = []
    for i, question in enumerate(training[:2000]):
        seeds = [sequence_seed(config.seed, "drafter", i, k) for k in range(4)]
        groups.append(Group(i, question.prompt, seeds))
    solver.engine.set_stop_tokens(solver.stops)
    solver.engine.reserve(max(len(group.prompt) for group in groups) + solver.max_new)
    sampling = Sampling(max_new=solver.max_new)
    warm_start(drafter, solver.engine, groups, sampling, config.drafter_seconds, config.seed)
    drafter.save(folder / "drafter")


def print_auc(verifiers: dict[str, Verifier], steps: LabelledSteps) -> None:
    """A line for each verifier, and for the log-probabilities alone."""
    scores = {name: verifier(steps.features, steps.counts) for name, verifier in verifiers.items()}
    logp = steps.features[:, -2]
    scores["lowest log p so far"] = torch.cat([part.cummin(0).values for part in logp.split(steps.counts)])
    scores["lowest log p of the step"] = logp
    for name, s in scores.items():
        print(f"{name:>50} {auc(s, steps.labels):9.3f} {auc(s, steps.labels, steps.place):9.3f}")
