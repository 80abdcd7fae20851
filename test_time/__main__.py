"""The command line: `python -m test_time [answer|learn|sweep|speed|report]`."""

import test_time
from parts.cli import parse_flags, run
from test_time.answer import answer
from test_time.config import Config
from test_time.learn import learn
from test_time.report import report
from test_time.sweep import speed, sweep


def main() -> None:
    """Run one command."""
    config = parse_flags(Config, test_time.__doc__)
    commands = {"answer": answer, "learn": learn, "sweep": sweep, "speed": speed, "report": report}
    commands[config.command](config)


if __name__ == "__main__":
    run(main)
