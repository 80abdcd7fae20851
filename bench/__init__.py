"""Every speed in the README, measured side by side in one run: `python -m bench engine --json out.json`.

Parties take turns (A B A B ...) on the same cores, so that whatever else the machine does affects all of them. Each
figure is the median over the rounds, each comparison a ratio of medians. Some tables are made in another way, which
they describe: `step` takes means of training steps, `paired`, `drafter` and `seeds` read finished training runs,
`scale` predicts.

    engine        the plain engine against Hugging Face generate, continuous batching, prompt lookup
    identity      speculative against plain decoding, token by token
    speculation   ways to draft against plain rollout of the same engine
    spot          how much drafter training on one core slows a rollout on another
    scale         rollout time with 1 to 64 workers, predicted from measured round times
    step          training steps, plain and with TLT (and TRL's)
    paired        a training run against the same steps without speculation
    drafter       a drafter that is trained during the run against a static one     (aging.py)
    seeds         learning curves of the same run with several seeds
    real          a real language model in the engine, part by part
    gpu           what is claimed of the GPU path, with verdicts
    losses        the same short training run with each loss
    server        the drafter in a real server, vLLM, and our engine beside it

Tables that generate take --device (a GPU if there is one) and --actor-dtype, as train_grpo.py. Each table is a module:

    Config                       its settings, each a command-line flag
    measure(config) -> Result    the headline ratio, the rows, remarks
    COLUMNS                      which keys of the rows are printed, and how (harness.text_table)

With --json FILE the result is also written: table, settings, ratio, machine, rows.
"""
