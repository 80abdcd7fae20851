"""The command line: `python -m test_time [answer|learn|sweep|report|speed]`."""

import test_time
from parts.cli import parse_flags, run
from test_time.answer import answer
from test_time.config import Config
from test_time.learn import learn
from test_time.speed import speed
from test_time.sweep import sweep
from test_time.tables import report


def main() -> None:
    """Run one command."""
    config = parse_flags(Config, test_time.__doc__)
    commands = {"answer": answer, "learn": learn, "sweep": sweep, "report": report, "speed": speed}
    commands[config.command](config)


if __name__ == "__main__":
    run(main)
