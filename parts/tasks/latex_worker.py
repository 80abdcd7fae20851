"""Whether two answers in LaTeX are equal, by math-verify and sympy: the child process of grading.LatexChecker.

    stdin    a question on each line, a JSON list: ["equal", gold, answer] or ["found", gold, text]
    stdout   "ready", then "yes" or "no" for each question

"equal" compares two answers. "found" first lets math-verify search the text for one: after "the answer is", in
\\boxed{}, between dollars.

The text is a policy's, and anything may be in it: `9^{9^{9^9}}`, a sum to 10^{10}. So before each question a timer of
this process's own CPU time is set: a busy machine does not change a grade. When it runs out the kernel ends the
process, whatever it is doing, and the parent reads the end of the output as "no". math-verify's own timeout is off: it
waits for C code to return, and an `except` may catch it.

Python's evaluator gets no text but single numbers and names. math-verify's patterns for plain numbers are off, since
they would hand it more; and sympy, which calls it for the numbers in LaTeX, is given `only_a_word`.

No project file is imported: this process has to be small, and torch is not.
"""

import functools
import json
import logging
import os
import re
import resource
import signal
import sys

SECONDS = 2.0  # of CPU time for a question; of 7,500 pairs of MATH's answers the slowest took 0.14
MEMORY = 2 << 30  # bytes of address space


def only_a_word(evaluate):
    """Return sympy's `evaluate`, through which every string goes that sympy executes, restricted to a single number or
    name; anything else raises ValueError.
    """
    word = re.compile(r"(Integer|Float|Symbol) \('?[\w.]+'? ?\)\s*|\w+\s*")

    def guarded(code, *names):
        if not word.fullmatch(code):
            raise ValueError(f"more than a number or a name: {code}")
        return evaluate(code, *names)

    return guarded


def make_answers():
    """Return a function from a question to a bool. Imports math-verify, which takes a second."""
    import math_verify
    import sympy.parsing.sympy_parser as parser
    import sympy.physics.units  # noqa: F401  else it is imported on the first use of a unit

    logging.disable(logging.CRITICAL)
    parser.eval_expr = only_a_word(parser.eval_expr)
    boxed = [math_verify.LatexExtractionConfig(boxed_match_priority=0)]
    anywhere = [math_verify.LatexExtractionConfig()]

    def parse(text: str, how):
        return math_verify.parse(text, how, parsing_timeout=None)

    @functools.lru_cache(maxsize=4096)
    def parse_gold(gold: str):
        return parse(f"\\boxed{{{gold}}}", boxed)

    def answer(kind: str, gold: str, text: str) -> bool:
        given = parse(f"\\boxed{{{text}}}", boxed) if kind == "equal" else parse(text, anywhere)
        return math_verify.verify(parse_gold(gold), given, timeout_seconds=None)

    return answer


def main() -> None:
    """Answer questions from stdin until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the parent; this process ends with its stdin
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a library prints is no reply
    try:
        answer = make_answers()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    except Exception as error:  # a package is missing, or does not fit another one
        print(" ".join(str(error).split()) or type(error).__name__, file=out)
        return
    print("ready", file=out, flush=True)
    for line in sys.stdin:
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            reply = answer(*json.loads(line))
        except Exception:  # a text may break the parser in any way
            reply = False
        signal.setitimer(signal.ITIMER_PROF, 0)
        print("yes" if reply else "no", file=out, flush=True)


if __name__ == "__main__":
    main()
