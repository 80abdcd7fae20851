"""vLLM's side of server.py: it runs in vLLM's own environment, so it imports nothing of this project.

    python bench/vllm_side.py MODEL CONTEXT [DRAFTER K]

It loads the model into vLLM, in this process, in float32 on the CPU. Then it reads a request from stdin, one line of
JSON, and answers with a line of JSON on stdout, until stdin ends.

    {"prompts": [[ids]], "tokens": n, "temperature": t, "stop": [ids], "seed": s}
    -> {"tokens": [[ids]], "seconds": x, "rounds": sequences times rounds with drafts, "accepted": [by depth]}
    {"mend": true} -> {}            replaces the function whose CPU version is broken, see mend
"""

import json
import os
import sys
import time

replies = os.fdopen(os.dup(1), "w")  # vLLM prints, too; all of that goes to stderr
os.dup2(2, 1)

os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GB
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # the engine in this process: no messages between two
    VLLM_LOGGING_LEVEL="ERROR",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)

import torch  # noqa: E402
from vllm import LLM, SamplingParams  # noqa: E402
from vllm.v1.sample import rejection_sampler  # noqa: E402

ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos"
ROUNDS = "vllm:spec_decode_num_drafts"


def repeated(x, ends, count: int, replace_from=0, replace_to=0):
    """Return x (B,) with each number as often as its sequence has draft tokens: ends (B,) are the running sums."""
    times = torch.diff(ends, prepend=torch.zeros_like(ends[:1]))
    return torch.where(x == replace_from, replace_to, x).repeat_interleave(times, output_size=count)


def mend() -> None:
    """Replace vLLM's expand_batch_to_tokens. Its CPU version (0.32.0, utils/cpu_triton_utils._expand_kernel_impl)
    writes into an int64 copy of the float32 result, so the temperatures of verified tokens are uninitialised memory.
    """
    rejection_sampler.expand_batch_to_tokens = repeated


def counters(llm: LLM) -> tuple[int, list[int]]:
    """Return how many rounds with drafts there were so far, over all sequences, and accepted draft tokens by depth."""
    rounds, accepted = 0, []
    for metric in llm.get_metrics():
        if metric.name == ROUNDS:
            rounds = metric.value
        if metric.name == ACCEPTED:
            accepted = list(metric.values)
    return rounds, accepted


def answer(llm: LLM, request: dict) -> dict:
    """Generate what the request asks for."""
    settings = SamplingParams(
        temperature=request["temperature"],
        max_tokens=request["tokens"],
        stop_token_ids=request["stop"],
        ignore_eos=True,  # stop_token_ids has all that count
        seed=request["seed"],
        detokenize=False,
    )
    rounds, accepted = counters(llm)
    started = time.perf_counter()
    outputs = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], settings, use_tqdm=False)
    seconds = time.perf_counter() - started
    rounds_now, accepted_now = counters(llm)
    before = accepted or [0] * len(accepted_now)
    return {
        "tokens": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": seconds,
        "rounds": rounds_now - rounds,
        "accepted": [now - then for now, then in zip(accepted_now, before)],
    }


def main() -> None:
    """Load, then answer requests."""
    model, context, *drafter = sys.argv[1:]
    speculative = {}
    if drafter:
        speculative = {"method": "eagle", "model": drafter[0], "num_speculative_tokens": int(drafter[1])}
    llm = LLM(
        model,
        dtype="float32",
        max_model_len=int(context),
        enforce_eager=True,
        disable_log_stats=False,  # the counters
        speculative_config=speculative or None,
    )
    print("{}", file=replies, flush=True)  # ready
    for line in sys.stdin:
        request = json.loads(line)
        if request.get("mend"):
            mend()
        reply = {} if request.get("mend") else answer(llm, request)
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
