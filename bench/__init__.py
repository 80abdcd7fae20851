"""Every speed in the README, measured side by side in one run: `python -m bench engine --json out.json`.

Parties take turns (A B A B ...) on the same cores, so that whatever else the machine does hits them alike. Each figure
is the median over the rounds, each comparison a ratio of medians. Some tables are made otherwise, and say how: `step`
takes means of whole training steps, `paired`, `drafter` and `seeds` read finished training runs, `scale` predicts.

Tables that generate take --device (a GPU if there is one) and --actor-dtype, as train_grpo.py.

    engine        the plain engine against Hugging Face generate, continuous batching, prompt lookup
    identity      speculative against plain decoding, token by token
    speculation   ways to draft against plain rollout of the same engine
    spot          what drafter training on one core costs a rollout on another
    scale         rollout time with 1 to 64 workers, predicted from measured round times
    step          whole training steps, plain and with TLT (and TRL's)
    paired        a training run against the same steps without speculation
    drafter       a drafter that is trained along against one that stands still     (aging.py)
    seeds         learning curves of the same run with several seeds
    real          a real language model in the engine, part by part
    gpu           what is claimed of the GPU path, with verdicts
    losses        the same short training run with each loss

Each table is a module with three things, which __main__.py puts together:

    Config                       its settings, each a command-line flag
    measure(config) -> Result    the headline ratio, the rows, remarks that stand below the table
    table(rows) -> str           the rows as text

With --json FILE the result is also written as

    {"name": sub-command, "ratio": headline, "machine": {torch, device, threads, cores, cpu, gpu}, "rows": [...]}

with rows of

    engine        batch; tokens per second of engine, generate, continuous or prompt lookup and generate with drafter;
                  ratio
    identity      sampling, mode, responses, identical, largest_logprob_gap, tokens_per_round
    speculation   workload, mode, tokens_per_second, ratio, tokens_per_round, draft_share, rounds, tokens
    spot          party, tokens_per_second; training, steps_per_second; packing (tokens per second), saving (seconds)
    scale         workers; predicted seconds plain and speculative; ratio, idle
    step          party, workers, digests, seconds per step: rollout, drafter, idle, update, step
    paired        phase, plain, tlt, ratio; then the checks: steps, identical, parted, evaluations, equal, reclaimed,
                  preempted
    drafter       steps, adaptive, static
    seeds         step, length, pass@1, pass@k: mean, low, high; then seconds of the last steps
    gpu           part; name, value, unit, or rows, k, way, ms, tokens, or claim, verdict, measured, bound, at_least
    losses        variant; pass@1: mean, half of the 95 % interval; length, seconds and tokens per step
"""
