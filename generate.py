"""Generate from the command line, token by token; with a drafter the same tokens, faster.

python generate.py --model base --prompt "3,7,8=29<think>"
python generate.py --model base --prompt "3,7,8=29<think>" --drafter base/drafter
"""

import sys
from collections.abc import Hashable
from dataclasses import dataclass

from drafter import Drafter, LearnedDrafts
from parts.cli import UserError, check_at_least, flag, parse_flags, run
from parts.devices import pick_device
from parts.engine.interfaces import MAX_DRAFTS, Draft, Group, Strategy, describe_stats
from parts.engine.model_loading import load_model, stop_tokens
from parts.engine.sampling import Sampling, sequence_seed
from rollout import Engine
from tasks import encode


@dataclass(frozen=True)
class Command(Sampling):
    """Settings, each a command-line flag."""

    model: str = flag("base", "a folder or a hub name")
    prompt: str = flag("", "the text as it is; no chat template is added")
    samples: int = flag(1, "responses to it; the first is shown as it is made")
    seed: int = flag(0, "of the noise: the same seed, the same responses")
    drafter: str = flag("", "folder of a drafter: decode speculatively, the same tokens faster")
    k: int = flag(6, "draft length with --drafter")

    def __post_init__(self):
        """Raises UserError."""
        super().__post_init__()
        check_at_least(self, 1, "samples", "k")
        if self.k > MAX_DRAFTS:
            raise UserError(f"--k {self.k}: at most {MAX_DRAFTS} drafts fit a round")
        if not self.prompt:
            raise UserError('--prompt: a text is wanted, e.g. --prompt "3,7,8=29<think>"')


class Streamer:
    """Prints the text of sample 0 as it grows. It is decoded again at each token: some tokens are parts of a
    character.
    """

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids: list[int] = []
        self.shown = 0  # characters

    def __call__(self, key: Hashable, sample: int, token: int) -> None:
        if sample:
            return
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):
            print(text[self.shown :], end="", flush=True)
            self.shown = len(text)


def main() -> None:
    """See above."""
    command = parse_flags(Command, __doc__)
    model, tokenizer = load_model(command.model, pick_device())
    drafters = {}
    strategy = Strategy()
    if command.drafter:
        drafter = Drafter(model)
        drafter.load(command.drafter)
        drafters = {"learned": LearnedDrafts(drafter)}
        strategy = Strategy(Draft("learned", command.k))
    ids = encode(command.prompt, tokenizer)
    context = len(ids) + command.max_new
    engine = Engine(model, stop_tokens(model, tokenizer), slots=command.samples, context=context, drafters=drafters)
    group = Group(0, ids, [sequence_seed(command.seed, 0, 0, k) for k in range(command.samples)])
    print(command.prompt, end="", flush=True)
    responses = list(engine.generate([group], command, strategy, Streamer(tokenizer)))
    print()
    for r in sorted(responses, key=lambda r: r.sample)[1:]:
        print(command.prompt + tokenizer.decode(r.tokens, skip_special_tokens=True))
    print(f"[{describe_stats(engine.stats)}]", file=sys.stderr)


if __name__ == "__main__":
    run(main)
