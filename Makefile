# make            this help
PYTHON ?= python3
RUN := .venv/bin/python
STEPS ?=
ARGS ?=
OUT ?= runs/demo
MODEL ?= base
START ?=
DRAFTER ?= runs/drafter
K ?= 4
SECONDS ?= 60

help:  ## what can be made
	@grep -E '^[a-z-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: .venv/installed  ## train a policy with TLT, then the last steps once more without, side by side (about 13 minutes on 2 cores); longer: STEPS=60; to go on after Ctrl-C: ARGS=--resume
	$(RUN) tlt.py --demo --out $(OUT) $(if $(STEPS),--steps $(STEPS)) $(ARGS)
	$(RUN) bench.py paired --run $(OUT) --json $(OUT)/paired.json

test: .venv/installed  ## all tests (5 to 6 minutes on 2 cores)
	$(RUN) -m pytest -q tests

soak: .venv/installed  ## kill -9 a run 50 times at random moments and resume it: its metrics and policy must come out equal (about 10 minutes)
	$(RUN) tests/soak.py --kills 50

fuzz: .venv/installed  ## the random tests with over 100,000 cases: verifiers, files, command lines, drafts, engine (about 6 minutes)
	FUZZ=100 $(RUN) -m pytest -q tests -k "any_text or stack_machine or any_file or any_command_line or byte_that or by_hand_finds or random_shapes"

bench-quick: .venv/installed  ## a first look at the speeds of this machine (about 3 minutes on 2 cores)
	mkdir -p runs
	$(RUN) bench.py engine --batches 32 --rounds 1 --max-new 256 --json runs/quick-engine.json
	$(RUN) bench.py speculation --threads 1 --rounds 1 --workloads one mixed --json runs/quick-speculation.json

bench: .venv/installed  ## the speeds in the README, side by side (30 to 40 minutes on 2 cores; whole steps are made with runs/demo's policy if it is there)
	mkdir -p runs
	$(RUN) bench.py engine --json runs/bench-engine.json
	$(RUN) bench.py identity --json runs/bench-identity.json
	$(RUN) bench.py speculation --threads 1 --rounds 5 --json runs/bench-speculation.json
	$(RUN) bench.py spot --json runs/bench-spot.json
	$(RUN) bench.py scale --threads 1 --json runs/bench-scale.json
	$(RUN) bench.py step $(if $(wildcard runs/demo/policy),--model runs/demo/policy) --rounds 2 --json runs/bench-step.json

figures: .venv/installed  ## the README's training figures: 60 steps plain, static and adaptive (about 50 minutes on 2 cores)
	$(RUN) tlt.py --demo --steps 60 --out runs/adaptive
	$(RUN) tlt.py --demo --steps 60 --out runs/static --drafter static
	$(RUN) tlt.py --demo --steps 60 --out runs/plain --drafter off --strategy off
	$(RUN) bench.py paired --run runs/adaptive --plain runs/plain --json runs/paired.json
	$(RUN) bench.py paired --run runs/static --plain runs/plain --json runs/paired-static.json
	$(RUN) bench.py drafter --adaptive runs/adaptive --static runs/static --json runs/drafter.json

drafter: .venv/installed  ## train a drafter for a policy on its own rollouts, SECONDS=60 on one core; also MODEL=, START=, DRAFTER=, K=
	$(RUN) drafter.py --threads 1 --model $(MODEL) --out $(DRAFTER) --k $(K) --seconds $(SECONDS) $(if $(START),--start $(START))

test-time: .venv/installed  ## search at test time: 1,000 held-out questions, every strategy, tables and figures
	$(RUN) test_time.py sweep --seeds 3 $(if $(wildcard runs/chain-large/config.json),--large runs/chain-large)
	$(RUN) test_time.py speed --count 24
	$(RUN) test_time.py report

chain: .venv/installed  ## make base/chain/ again: policy, verifiers, revision policies, drafters
	$(RUN) pretrain.py --task chain --layers 4 --width 64 --noisy 190000 --tokens 2048 --threads 1 --out base/chain
	$(RUN) test_time.py learn

large: .venv/installed  ## the larger policy that `make test-time` compares with, by the same recipe (about 40 minutes on one core)
	$(RUN) pretrain.py --task chain --layers 6 --width 192 --noisy 190000 --tokens 2048 --threads 1 --out runs/chain-large

base: .venv/installed  ## make base/ again: the tiny policy from scratch, and its drafter (about an hour on 2 cores)
	$(RUN) pretrain.py --out base
	$(RUN) drafter.py --threads 1 --model base --out base/drafter --prompts 256 --seconds 600

clean:  ## remove runs and the virtual environment
	rm -rf runs .venv .pytest_cache .hypothesis __pycache__ tests/__pycache__

.PHONY: help demo test soak fuzz bench-quick bench figures drafter test-time chain large base clean
