"""Labelled steps, to train a verifier on and to measure it with.

    label    of the step that ends at token j: the share of right answers among c samples that go on from there
             (Monte-Carlo)
    outcome  was the attempt right in the end: the label of all its steps for the outcome verifier

After the last step nothing is left to chance, so its label is the outcome, 0 or 1.
"""

from typing import NamedTuple

import torch

from parts.engine.interfaces import Group, Response
from parts.engine.sampling import sequence_seed
from test_time.attempts import Question
from test_time.solver import Solver
from test_time.verifier import step_features


class LabelledSteps(NamedTuple):
    """Steps of attempts, one attempt after the other. S steps in all."""

    features: torch.Tensor  # (S, 2 D + 2), see verifier.step_features
    counts: list[int]  # steps of each attempt
    labels: torch.Tensor  # (S,)
    outcomes: torch.Tensor  # (S,)
    place: torch.Tensor  # (S, 2): number of the question, number of the step in its attempt


def labelled_steps(solver: Solver, questions: list[Question], attempts: int, continuations: int, seed) -> LabelledSteps:
    """So many attempts at each question, and from the end of each step so many continuations. seed: number or tuple."""
    groups = []
    for i, question in enumerate(questions):
        seeds = [sequence_seed(seed, "attempt", i, k) for k in range(attempts)]
        groups.append(Group(i, question.prompt, seeds))
    responses = sorted(solver.generate(groups, "attempts"), key=lambda r: (r.group, r.sample))
    starts = [len(r.prompt) for r in responses]
    features, counts = step_features(solver.policy, responses, starts, solver.ends)
    rights = [float(solver.grade(questions[r.group].problem, r.tokens)) for r in responses]
    ends = [[j + 1 for j, token in enumerate(r.tokens) if token in solver.ends] for r in responses]
    label_of = continue_from(solver, questions, responses, ends, continuations, seed)
    labels = []
    outcomes = []
    place = []
    for n, r in enumerate(responses):
        for number, j in enumerate(ends[n]):
            labels.append(rights[n] if j == len(r.tokens) else label_of[n, j])
            outcomes.append(rights[n])
            place.append((r.group, number))
    return LabelledSteps(features, counts, torch.tensor(labels), torch.tensor(outcomes), torch.tensor(place))


def continue_from(
    solver: Solver,
    questions: list[Question],
    responses: list[Response],
    ends: list[list[int]],
    continuations: int,
    seed,
) -> dict[tuple[int, int], float]:
    """Share of right answers among continuations: (number of the response, tokens kept) -> 0 to 1.

    ends: for each response, after how many tokens its steps end.
    """
    groups = []
    for n, r in enumerate(responses):
        for j in ends[n]:
            if j < len(r.tokens):
                name = (seed, "onward", r.group, r.sample, j)
                seeds = [sequence_seed(*name, k) for k in range(continuations)]
                groups.append(Group((n, j), r.prompt + r.tokens[:j], seeds, response_prefix_len=j))
    label_of = {group.key: 0.0 for group in groups}
    for r in solver.generate(groups, "continuations"):
        n, j = r.group
        whole = responses[n].tokens[:j] + r.tokens
        right = solver.grade(questions[responses[n].group].problem, whole)
        label_of[n, j] += right / continuations
    return label_of
