"""Generate from the command line, token by token; with a drafter the same tokens, faster.

    python generate.py --model base --prompt "3,7,8=29<think>"
    python generate.py --model base --prompt "3,7,8=29<think>" --drafter base/drafter
    python generate.py --model base --prompt "3,7,8=29<think>" --drafter base/drafter --show

--show prints the response as it was made, round by round. In a terminal with colours:

    green           draft tokens that the policy accepted
    bold            the token that the policy sampled itself, which ends the round
    red, struck     draft tokens that were rejected

Without colours the same is written [accepted]own{rejected}. A table at the end says how often a round gave how many
tokens.
"""

import os
import sys
from collections import Counter
from dataclasses import dataclass

from drafter import Drafter, EagleProposer
from parts.cli import UserError, check_at_least, flag, parse_flags, run
from parts.devices import pick_device
from parts.engine.interfaces import MAX_DRAFT_LEN, DraftPlan, Group, RoundTrace, Strategy, describe_stats
from parts.engine.model_loading import ACTOR_DTYPES, load_actor, stop_tokens
from parts.engine.sampling import Sampling, sequence_seed
from rollout import Engine
from tasks import encode


@dataclass(frozen=True)
class Command(Sampling):
    """Settings, each a command-line flag."""

    model: str = flag("base", "a folder or a hub name")
    prompt: str = flag("", "the text as it is, with the tokenizer's first special tokens; no chat template is added")
    samples: int = flag(1, "responses to it; the first is shown while it is made")
    seed: int = flag(0, "of the noise: the same seed, the same responses")
    dtype: str = flag("auto", "of the weights: auto is bfloat16 on a GPU, float32 on a CPU", ACTOR_DTYPES)
    drafter: str = flag("", "folder of a drafter: decode speculatively, the same tokens faster")
    k: int = flag(6, "draft length with --drafter")
    show: bool = flag(False, "mark which tokens were drafted, accepted and rejected, round by round (with --drafter)")

    def __post_init__(self):
        """Raises UserError."""
        super().__post_init__()
        check_at_least(self, 1, "samples", "k")
        if self.k > MAX_DRAFT_LEN:
            raise UserError(f"--k {self.k}: at most {MAX_DRAFT_LEN} draft tokens fit a round")
        if not self.prompt:
            raise UserError('--prompt: a text is wanted, e.g. --prompt "3,7,8=29<think>"')
        if self.show and not self.drafter:
            raise UserError("--show marks draft tokens, so it needs a --drafter, e.g. --drafter base/drafter")


class TextStream:
    """Prints the text of sample 0 as it grows. All its tokens are decoded again each time, since some tokens are parts
    of a character.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.shown = 0  # characters

    def __call__(self, trace: RoundTrace) -> None:
        if trace.sequence.sample:
            return
        text = self.tokenizer.decode(trace.sequence.tokens, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            print(text[self.shown :], end="", flush=True)
            self.shown = len(text)


# (before, after) accepted draft tokens, the policy's own token, rejected draft tokens
COLOURS = {"accepted": ("\x1b[32m", "\x1b[0m"), "own": ("\x1b[1m", "\x1b[0m"), "rejected": ("\x1b[9;31m", "\x1b[0m")}
PLAIN_MARKS = {"accepted": ("[", "]"), "own": ("", ""), "rejected": ("{", "}")}


class RoundMarks:
    """Prints the rounds of sample 0, with marks for accepted, own and rejected tokens."""

    def __init__(self, tokenizer, colours: bool):
        self.tokenizer = tokenizer
        self.marks = COLOURS if colours else PLAIN_MARKS
        self.emitted: Counter[int] = Counter()  # tokens in a round -> rounds

    def __call__(self, trace: RoundTrace) -> None:
        if trace.sequence.sample:
            return
        n = 0  # accepted draft tokens
        while n < min(len(trace.drafts), len(trace.emitted)) and trace.drafts[n] == trace.emitted[n]:
            n += 1
        own = trace.emitted[n:]  # none where the response ends inside the accepted run
        rejected = trace.drafts[n:] if own else []
        tokens = trace.sequence.tokens
        before = tokens[: len(tokens) - len(trace.emitted)]
        line = self.marked("accepted", before, trace.emitted[:n])
        line += self.marked("own", before + trace.emitted[:n], own)
        line += self.marked("rejected", tokens, rejected)
        print(line, end="", flush=True)
        self.emitted[len(trace.emitted)] += 1

    def marked(self, kind: str, before: list[int], tokens: list[int]) -> str:
        """Return the text of tokens between the marks of their kind. before: the tokens of the response in front of
        them; all are decoded together, since some tokenizers join or drop spaces at the begin of a text.
        """
        if not tokens:
            return ""
        front = self.tokenizer.decode(before)
        opening, closing = self.marks[kind]
        return opening + self.tokenizer.decode(before + tokens)[len(front) :] + closing

    def table(self) -> str:
        """Return how many rounds gave how many tokens."""
        lines = ["tokens in a round   rounds"]
        most = max(self.emitted.values(), default=1)
        for tokens in range(1, max(self.emitted, default=0) + 1):
            rounds = self.emitted[tokens]
            lines.append(f"{tokens:17d} {rounds:8d}  {'#' * round(40 * rounds / most)}")
        rounds = sum(self.emitted.values())
        total = sum(tokens * count for tokens, count in self.emitted.items())
        lines.append(f"{total} tokens in {rounds} rounds: {total / max(1, rounds):.2f} tokens per round")
        return "\n".join(lines)


def has_colours() -> bool:
    """Return whether the output is a terminal that shows colours."""
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ and os.environ.get("TERM") != "dumb"


def main() -> None:
    """Generate responses to one prompt."""
    command = parse_flags(Command, __doc__)
    device = pick_device()
    model, tokenizer = load_actor(command.model, device, command.dtype)
    proposers = {}
    strategy = Strategy()
    if command.drafter:
        drafter = Drafter(model)
        drafter.load(command.drafter)
        proposers = {"eagle": EagleProposer(drafter)}
        strategy = Strategy(DraftPlan("eagle", command.k))
    ids = encode(command.prompt, tokenizer, special=True)
    context = len(ids) + command.max_new
    engine = Engine(model, stop_tokens(model, tokenizer), slots=command.samples, context=context, proposers=proposers)
    group = Group(0, ids, [sequence_seed(command.seed, 0, 0, k) for k in range(command.samples)])
    stream = RoundMarks(tokenizer, has_colours()) if command.show else TextStream(tokenizer)
    print(command.prompt, end="", flush=True)
    responses = list(engine.generate([group], command, strategy, stream))
    print()
    for r in sorted(responses, key=lambda r: r.sample)[1:]:
        print(command.prompt + tokenizer.decode(r.tokens, skip_special_tokens=True))
    if command.show:
        print(stream.table())
    print(f"[{describe_stats(engine.stats)}]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
