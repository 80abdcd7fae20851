# make            this help
PYTHON ?= python3
RUN := .venv/bin/python
STEPS ?=
OUT ?= runs/demo
MODEL ?= base
START ?=
DRAFTER ?= runs/drafter
K ?= 4

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: .venv/installed  ## train a policy with GRPO and show what it learned (about 8 minutes on 2 cores); longer: make demo STEPS=60
	$(RUN) tlt.py --demo --out $(OUT) $(if $(STEPS),--steps $(STEPS))

test: .venv/installed  ## all tests (about 3 minutes on 2 cores)
	$(RUN) -m pytest -q tests

bench: .venv/installed  ## the speeds in the README, side by side (about 10 minutes on 2 cores)
	mkdir -p runs
	$(RUN) bench.py engine --json runs/bench-engine.json
	$(RUN) bench.py identity --json runs/bench-identity.json
	$(RUN) bench.py speculation --threads 1 --json runs/bench-speculation.json

drafter: .venv/installed  ## warm-start a drafter, 60 s on one core, and show its acceptance; also MODEL=, START=, DRAFTER=, K=
	$(RUN) drafter.py --threads 1 --model $(MODEL) --out $(DRAFTER) --k $(K) $(if $(START),--start $(START))

base: .venv/installed  ## make base/ again: the tiny policy from scratch (about 40 minutes on 2 cores)
	$(RUN) pretrain.py --out base

clean:  ## remove runs and the virtual environment
	rm -rf runs .venv .pytest_cache .hypothesis __pycache__ tests/__pycache__

.PHONY: help demo test bench drafter base clean
