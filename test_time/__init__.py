"""Test-time compute: how should an inference budget be spent on a question?

After *Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters* (Snell, Lee, Xu,
Kumar 2024, arXiv 2408.03314). Training has left a policy and a fast drafter; this package puts them to use.

    parallel(N)          N attempts, independent of each other
    beam(N, M)           step by step: of N beginnings keep the N / M that the verifier likes best, continue each in M
                         ways
    beam(N, M, look=k)   judge a beginning by the verifier's score k greedy steps further on (lookahead); those steps
                         are thrown away, and paid for
    beam(N, M, diverse)  N / M separate trees; in each keep the best one (DVTS)
    revise(N, L)         N / L chains of L attempts; each is made with the last four attempts of its chain in view, by a
                         policy that was tuned for it

"Width" has three meanings in the literature: N (beginnings held), N / M (kept) and M (ways to continue). Here it is
always said which one is meant.

An attempt's score is the verifier's score after its last step (or the lowest, or the product: --aggregate). The answer
is picked from all attempts by

    max        the answer of the best attempt
    weighted   the answer with the largest sum of scores
    majority   the answer that most attempts give: needs no verifier
    chains     (revise) the weighted answer within each chain, then the one with the largest sum over chains
    outcome    as max, with the score of a verifier that was trained on whole attempts

Ledger. A question pays for policy tokens (prefilled, once for all attempts that share a prefix; emitted; spent on
drafts that were wrong), drafter tokens, steps that the verifier read, FLOPs (2 x weights x tokens; attention is left
out) and seconds. Speculation adds FLOPs and saves seconds.

Compute-optimal. For each difficulty (a fifth of the questions) and each budget: the strategy that was best on one half
of the questions, reported on the other half. Difficulty is either predicted or known:

    predicted   the score of one attempt that is made for this purpose alone, and paid for (four attempts tell more,
                but cost more than they win)
    known       a bound: pass@1 over sixteen other attempts

Budgets hold on average: hard questions may get more than easy ones.

A search strategy is a generator: it yields what it wants written, gets it, and returns its attempts. So its code reads
as if for one question, while all questions that are asked at once share the engine's batches.

    python -m test_time --prompt "7:cfa="       answers one question and shows what was tried
    python -m test_time learn                   verifiers, revision policy and drafters for a policy
    python -m test_time sweep                   every strategy on held-out questions: rows
    python -m test_time speed                   seconds for a question, with and without the drafter
    python -m test_time report                  tables and figures from the rows (`make test-time` does all three)

Where to read, in this order:

    attempts.py    an attempt, a wish for more of it, the ledger
    strategies.py  the strategies
    picking.py     from attempts to an answer
    verifier.py    the process reward model: what it reads, how it is trained
    solver.py      the engine behind the strategies
    labels.py      labelled steps to train a verifier on
    learn.py       everything that a search needs, learnt from the policy
    trials.py      what is compared; sweep.py runs it, speed.py times it
    optimal.py     the statistics of "compute-optimal"; results.py holds the rows, choices.py the choices
    tables.py      what is printed; figures.py what is drawn
    answer.py      one question

Left out: prefix sharing between requests (a beginning is prefilled again at each of its steps, and charged for),
Monte-Carlo tree search, ReST-EM for revisions.
"""
