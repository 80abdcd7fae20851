"""Test-time compute: how should an inference budget be spent on a question?

After *Scaling LLM Test-Time Compute Optimally can be More Effective than Scaling Model Parameters* (Snell, Lee, Xu,
Kumar 2024, arXiv 2408.03314). Training has left a policy and a fast drafter; this package searches with them.

    parallel(N)                  N independent attempts (best-of-N)
    beam(N, M)                   step by step: of N partial attempts keep the N / M with the best verifier scores, and
                                 continue each of them in M ways
    beam(N, M, lookahead=k)      judge a partial attempt by the verifier's score k greedy steps further on; those steps
                                 are thrown away, but paid for
    beam(N, M, diverse)          N / M separate trees, in each of which the best partial attempt is kept (DVTS)
    revise(N, L)                 N / L chains of L attempts; each attempt is made with the last four of its chain in the
                                 prompt, by a policy that was tuned for it

The literature calls N (held), N / M (kept) and M (continuations of each) "width"; here N and M are always named.

An attempt's score is the verifier's score of its last step (or the lowest, or the product: --aggregate). The answer is
picked from all attempts by

    max        the answer of the attempt with the highest score
    weighted   the answer with the largest sum of scores
    majority   the answer that most attempts give: needs no verifier
    chains     (revise) the weighted answer within each chain, then the one with the largest sum over the chains
    outcome    as max, with the score of a verifier that was trained on whole attempts

Costs. A question pays for policy tokens (prefilled, once for all attempts that share a prefix; emitted; spent on
rejected draft tokens), drafter tokens, steps that the verifier scored, FLOPs (2 x weights x tokens, without attention)
and seconds. Speculation adds FLOPs and saves seconds.

Compute-optimal. For each fifth of difficulty and each budget: the strategy that was best on one half of the questions,
reported on the other half. A budget is a mean: hard questions may get more than easy ones. Difficulty is predicted from
the score of one attempt that is made only for this, and paid for (four attempts predict it better, but cost more than
they gain); or known, an upper bound: pass@1 over sixteen other attempts.

    python -m test_time --prompt "7:cfa="       answer one question and show the attempts           answer.py
    python -m test_time learn                   train verifiers, revision policy and drafters       learn.py
    python -m test_time sweep                   run every strategy on held-out questions            sweep.py
    python -m test_time speed                   seconds per question, with and without the drafter  sweep.py
    python -m test_time report                  tables and pictures (`make test-time`: all three)   report.py

The other files, to be read before these: attempts.py (an attempt, picking the answer, costs), strategies.py (the
searches), verifier.py (the process reward model), solver.py (runs searches on the rollout engine); before report.py:
optimal.py (the statistics of "compute-optimal"), results.py (the rows as arrays; choice.json, the best strategy by
difficulty and budget). config.py has the settings.

Left out: prefix sharing between requests (a partial attempt is prefilled again at each of its steps, and charged for),
Monte-Carlo tree search, ReST-EM for revisions.
"""
