"""The TRL party of step.py: its GRPOTrainer on the same prompts, in this process, with all cores.

The same prompts, batch, group, loss, learning rate, limits and adapters; its own generation, of the whole batch at
once. Its update is in bfloat16 where the CPU has arithmetic for it, as ours may be. TRL is needed for this comparison
only, and imported where it is used.
"""

import os
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from parts.cli import check_package
from parts.devices import has_bfloat16_arithmetic, pick_device
from parts.files import find_folder
from tasks import Task, encode_prompt, make_task


class StepTimes(TrainerCallback):
    """Measures the seconds of each step."""

    def __init__(self):
        self.started = 0.0
        self.seconds: list[float] = []

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


class Reward:
    """The rewards of our training."""

    __name__ = "reward"  # TRL logs it

    def __init__(self, task: Task):
        self.task = task

    def __call__(self, completions: list[str], index: list[int], **kwargs) -> list[float]:
        """index: of each completion's problem."""
        grades = [self.task.grade(self.task.problem("train", i), text) for i, text in zip(index, completions)]
        return [float(grade.strict) for grade in grades]


def settings(config, seed: int, out: str) -> dict:
    """Return the settings of trl.GRPOConfig. config: step.Config."""
    on_gpu = pick_device(config.device) == "cuda"
    passes = config.prompts * config.samples // config.trl_batch  # forward-backwards of a step
    return {
        "output_dir": out,
        "seed": seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu or (has_bfloat16_arithmetic() and config.bf16),
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


def adapters(config) -> dict:
    """Return the setting of GRPOTrainer that adds the adapters which --lora-rank adds to ours."""
    if not config.lora_rank:
        return {}
    from peft import LoraConfig

    rank = config.lora_rank
    return {"peft_config": LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")}


def step_seconds(config, seed: int) -> list[float]:
    """Return the seconds of each of config.steps steps. config: step.Config."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(os.cpu_count() or 1)
    task = make_task(config.task, "")
    folder = find_folder(config.model)
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    prompts = []
    for i in range(config.prompts * config.steps):
        ids = encode_prompt(task.problem("train", i), tokenizer)
        prompts.append({"prompt": tokenizer.decode(ids), "index": i})
    times = StepTimes()
    with tempfile.TemporaryDirectory() as out:
        trainer = GRPOTrainer(
            model=AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
            reward_funcs=Reward(task),
            args=GRPOConfig(**settings(config, seed, out)),
            train_dataset=Dataset.from_list(prompts),
            processing_class=tokenizer,
            callbacks=[times],
            **adapters(config),
        )
        trainer.train()
    return times.seconds
