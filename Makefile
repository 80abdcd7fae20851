# make            this help
PYTHON ?= python3
RUN := .venv/bin/python
STEPS ?=
OUT ?= runs/demo

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: .venv/installed  ## train a policy with GRPO and show what it learned (about 8 minutes on 2 cores); longer: make demo STEPS=300
	$(RUN) tlt.py --demo --out $(OUT) $(if $(STEPS),--steps $(STEPS))

test: .venv/installed  ## all tests (about 3 minutes on 2 cores)
	$(RUN) -m pytest -q tests

bench: .venv/installed  ## the speeds in the README, side by side
	$(RUN) bench.py engine --json runs/bench-engine.json

base: .venv/installed  ## make base/ again: the tiny policy from scratch (about 40 minutes on 2 cores)
	$(RUN) pretrain.py --out base

clean:  ## remove runs and the virtual environment
	rm -rf runs .venv .pytest_cache .hypothesis __pycache__ tests/__pycache__

.PHONY: help demo test bench base clean
