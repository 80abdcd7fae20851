"""What `python tlt.py --demo` (`make demo`) runs on this machine."""

import torch

GPU_MODEL = "Qwen/Qwen2.5-0.5B"
ON_A_GPU = (
    f"--model {GPU_MODEL} --task countdown-hard --lr 1e-6 --max-new 1024 --slots 256 --prompts 32 --steps 100 "
    "--micro-tokens 16384"
)
ON_A_CPU = "--model base --device cpu --workers 2 --max-new 960 --prompts 8 --samples 8 --steps 60"


def demo_flags() -> list[str]:
    """The settings, and a line that says which and why: a language model if there is a GPU and the hub answers, else
    the tiny policy in base/.
    """
    if not torch.cuda.is_available():
        why = "torch sees no GPU"
    else:
        try:
            from huggingface_hub import model_info

            model_info(GPU_MODEL, timeout=10)
            print(f"demo: {GPU_MODEL} on countdown-hard, one worker per GPU")
            return ON_A_GPU.split()
        except Exception as error:  # many kinds of network failure, one consequence
            why = f"the hub does not answer ({type(error).__name__})"
    print(f"demo: the tiny policy in base/ on countdown, two CPU workers, because {why}")
    return ON_A_CPU.split()
