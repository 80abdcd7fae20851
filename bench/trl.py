"""The TRL party of step.py: its GRPOTrainer on the same prompts, in this process, with all cores.

The same batch, group, loss, learning rate and limits; its own generation, of the whole batch at once. TRL is needed for
this comparison only, and imported where it is used.
"""

import os
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from parts.cli import check_package
from parts.devices import pick_device
from parts.files import find_folder
from tasks import Countdown


class StepTimes(TrainerCallback):
    """Measures the seconds of each step."""

    def __init__(self):
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


def reward(completions: list[str], index: list[int], **kwargs) -> list[float]:
    """Return the rewards of our training. index: of each completion's problem."""
    task = Countdown()
    grades = [task.grade(task.problem("train", i), text) for i, text in zip(index, completions)]
    return [float(grade.strict) for grade in grades]


def settings(config, seed: int, out: str) -> dict:
    """Return the settings of trl.GRPOConfig. config: step.Config."""
    on_gpu = pick_device(config.device) == "cuda"
    passes = config.prompts * config.samples // config.trl_batch  # forward-backwards of a step
    return {
        "output_dir": out,
        "seed": seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "learning_rate": 1e-4,
        "lr_scheduler_type": "constant",
        "beta": 0.0,
        "temperature": 1.0,
        "loss_type": "grpo",
        "num_generations": config.samples,
        "max_completion_length": config.max_new,
        "per_device_train_batch_size": config.trl_batch,
        "steps_per_generation": passes,
        "gradient_accumulation_steps": passes,
        "max_steps": config.steps,
        "shuffle_dataset": False,
        "report_to": [],
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
    }


def check_installed() -> None:
    """Raises UserError if TRL is not installed."""
    for package in ("trl", "datasets"):
        check_package(package, "--trl")


def step_seconds(config, seed: int) -> list[float]:
    """Return the seconds of each of config.steps steps. config: step.Config."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    task = Countdown()
    problems = range(config.prompts * config.steps)
    folder = find_folder(config.model)
    times = StepTimes()
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=reward,
            args=GRPOConfig(**settings(config, seed, out)),
            train_dataset=Dataset.from_list([{"prompt": task.problem("train", i).trace, "index": i} for i in problems]),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            callbacks=[times],
        )
        trainer.train()
    return times.seconds
