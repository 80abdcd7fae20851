"""`python -m bench TABLE [flags]`: measure one table, print it, and with --json write it to a file."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path

import bench
from bench import aging, engine, gpu, identity, losses, paired, real, scale, seeds, server, speculation, spot, step
from bench.harness import machine, text_table
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
    "server": server,
}


def main(argv: list[str] | None = None) -> None:
    """Measure a table. argv: without the program's name; None: the command line."""
    argv = sys.argv[1:] if argv is None else argv
    style = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(prog="python -m bench", description=bench.__doc__, formatter_class=style)
    parser.add_argument("table", choices=TABLES, help="what to measure; `python -m bench TABLE --help` shows its flags")
    name = parser.parse_args(argv[:1]).table
    module = TABLES[name]

    config = parse_flags(module.Config, module.__doc__, argv[1:])
    result = module.measure(config)
    print(f"\n{text_table(result.rows, module.COLUMNS)}")
    if result.remarks:
        print(result.remarks)
    seed = f"seed {config.seed}   " if hasattr(config, "seed") else ""
    print(f"ratio {result.ratio:.2f}   {seed}{machine(result.device)}")
    if config.json:
        content = {"name": name, "settings": asdict(config), "ratio": result.ratio, "machine": machine(result.device)}
        write_atomically(Path(config.json), json.dumps({**content, "rows": result.rows}, indent=1))


if __name__ == "__main__":
    run(main)
