"""`python -m bench TABLE [flags]`: measure one table, print it, and with --json write it down."""

import argparse
import json
import sys
from pathlib import Path

import bench
from bench import aging, engine, gpu, identity, losses, paired, real, scale, seeds, speculation, spot, step
from bench.harness import machine
from parts.cli import parse_flags, run
from parts.files import write_atomically

TABLES = {
    "engine": engine,
    "identity": identity,
    "speculation": speculation,
    "spot": spot,
    "scale": scale,
    "step": step,
    "paired": paired,
    "drafter": aging,
    "seeds": seeds,
    "real": real,
    "gpu": gpu,
    "losses": losses,
}


def main(argv: list[str] | None = None) -> None:
    """argv: without the program's name; None: the command line."""
    argv = sys.argv[1:] if argv is None else argv
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__, formatter_class=style)
    parser.add_argument("table", choices=TABLES, help="what to measure; `python -m bench TABLE --help` shows its flags")
    name = parser.parse_args(argv[:1]).table
    module = TABLES[name]

    config = parse_flags(module.Config, module.__doc__, argv[1:])
    result = module.measure(config)
    print(f"\n{module.table(result.rows)}")
    if result.remarks:
        print(result.remarks)
    print(f"ratio {result.ratio:.2f}   {machine(result.device)}")
    if config.json:
        content = {"name": name, "ratio": result.ratio, "machine": machine(result.device), "rows": result.rows}
        write_atomically(Path(config.json), json.dumps(content, indent=1))


if __name__ == "__main__":
    run(main)
