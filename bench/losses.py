"""Losses side by side: the same short training run with each of them, several seeds.

Every run makes steps of the demo's size with one worker on one core, `--jobs` runs at a time. With two updates per
rollout: with one rho is 1, then grpo and gspo are the same, and so are dapo and cispo. Finished runs are not made
again, but read.

    grpo, dr_grpo, dapo, gspo, cispo    --loss, with the clip that its authors take (gspo: ten times theirs)
    dynamic                             grpo, and up to 8 further prompts in the place of zero-variance groups
    lora                                grpo, adapters of rank 16 instead of all weights, ten times the learning rate

Held-out pass@1 with its 95 % interval: over the seeds' means, by Student's t. Ratio: the best pass@1 over grpo's.
"""

import statistics
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from bench.harness import Output, Result, read_metrics, train
from parts.cli import UserError, flag

VARIANTS = {
    "grpo": (),
    "dr_grpo": ("--loss", "dr_grpo"),
    "dapo": ("--loss", "dapo", "--clip-high", "0.28"),
    "gspo": ("--loss", "gspo", "--clip-low", "0.003", "--clip-high", "0.004"),
    "cispo": ("--loss", "cispo", "--clip-low", "1", "--clip-high", "4"),
    "dynamic": ("--dynamic-sampling", "8"),
    "lora": ("--lora-rank", "16", "--lr", "1e-3"),
}
T_95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36}  # of Student's t, by number of seeds
COLUMNS = {"variant": "", "pass@1": ".3f", "length": ".0f", "seconds": ".2f", "tokens": ".0f"}


@dataclass(frozen=True)
class Config(Output):
    variants: tuple[str, ...] = flag(tuple(VARIANTS), "losses and settings, see above", tuple(VARIANTS))
    seeds: tuple[int, ...] = flag((0, 1, 2), "seeds of the runs")
    model: str = flag("base", "the policy: a folder or a hub name")
    steps: int = flag(24, "steps of a run")
    prompts: int = flag(5, "prompts per step")
    samples: int = flag(8, "samples per prompt")
    max_new: int = flag(960, "longest response in tokens")
    eval_problems: int = flag(128, "held-out problems, 4 samples each")
    jobs: int = flag(2, "runs at a time, each on one core")
    out: str = flag("runs/losses", "folder for the runs")

    def __post_init__(self):
        super().__post_init__()
        if not 2 <= len(self.seeds) <= max(T_95):
            raise UserError(f"--seeds: {len(self.seeds)} are given; 2 to {max(T_95)} make an interval")


def folder_of(config: Config, variant: str, seed: int) -> Path:
    """Return the folder of a run."""
    return Path(config.out) / f"{variant}-{seed}"


def run(config: Config, variant: str, seed: int) -> None:
    """Train, unless the run is finished. Raises UserError if it fails."""
    out = folder_of(config, variant, seed)
    if (out / "policy/config.json").exists():
        return
    flags = ["--model", config.model, "--device", "cpu", "--workers", 1, "--seed", seed, "--minibatches", 2]
    flags += ["--steps", config.steps, "--prompts", config.prompts, "--samples", config.samples, "--slots", 64]
    flags += ["--max-new", config.max_new, "--eval-every", max(1, config.steps // 2)]
    flags += ["--eval-problems", config.eval_problems]
    train([*flags, *VARIANTS[variant]], out, OMP_NUM_THREADS="1")


def interval(values: list[float]) -> dict:
    """Return the mean, and half the width of its 95 % interval."""
    half = T_95[len(values)] * statistics.stdev(values) / len(values) ** 0.5
    return {"mean": statistics.mean(values), "half": half}


def row_of(config: Config, variant: str) -> dict:
    """Return the means over the runs of a variant; seconds and tokens are those of a step."""
    runs = [read_metrics(folder_of(config, variant, seed)) for seed in config.seeds]
    last = [metrics.evaluations[max(metrics.evaluations)] for metrics in runs]
    steps = [step for metrics in runs for step in metrics.steps.values()]
    return {
        "variant": variant,
        "pass@1": interval([evaluation["eval"]["pass@1"] for evaluation in last]),
        "length": statistics.mean(evaluation["length"] for evaluation in last),
        "seconds": statistics.mean(step["seconds"]["step"] for step in steps),
        "tokens": statistics.mean(step["tokens"] for step in steps),
    }


def measure(config: Config) -> Result:
    """Return a row for each variant."""
    todo = [(variant, seed) for seed in config.seeds for variant in config.variants]
    with ThreadPoolExecutor(config.jobs) as pool:
        results = [pool.submit(run, config, *job) for job in todo]
        for result in tqdm(results, desc="losses", unit="run"):
            result.result()
    rows = [row_of(config, variant) for variant in config.variants]
    scores = {row["variant"]: row["pass@1"]["mean"] for row in rows}
    best = max(scores.values())
    remarks = "held-out pass@1 with its 95 % interval; seconds and tokens of a step"
    return Result(best / max(1e-9, scores.get("grpo", best)), rows, "cpu", remarks)
