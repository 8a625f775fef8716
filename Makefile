# One target per habit. Everything runs in .venv, which tools/setup_env.py makes; a second call finds it ready.
PYTHON ?= python3
PORT ?= 8188
RUN := .venv/bin/python
# comfy-cli keeps its settings under HOME and asks about tracking there; it gets a home of its own.
COMFY := HOME=$(CURDIR)/.venv PATH=$(CURDIR)/.venv/bin:$$PATH .venv/bin/comfy --skip-prompt

.DEFAULT_GOAL := help
.PHONY: help env demo test comfyui lint format bench bench-gpu test-core

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

env: ## make .venv, with a real ComfyUI in it (a few minutes once)
	@$(PYTHON) tools/setup_env.py

demo: env ## compare plain and step-wise sampling: output/demo/comparison.png
	@$(RUN) -m tools.demo

# Two processes with one thread each: small networks gain nothing from threads.
test: env ## run the tests (ARGS="-k name" goes to pytest)
	@OMP_NUM_THREADS=1 $(RUN) -m pytest -n 2 --dist worksteal $(ARGS)

CORE := sde flow branching presets choice budget stepwise recorded_runs grpo forward_rl preference
test-core: ## drm's maths alone: torch, numpy and pytest are enough (RUN=python for your own)
	@$(RUN) -m pytest -q -p no:cacheprovider $(CORE:%=tests/drm/test_%.py) $(ARGS)

comfyui: env ## start ComfyUI with this pack, PORT=8188 (ARGS="--gpu"); models and pictures in .comfyui/
	@$(RUN) -m tools.comfy_server --port $(PORT) $(ARGS)

lint: env ## what CI checks: ruff, its formatter, the registry's rules
	@$(RUN) -m ruff check --output-format concise .
	@$(RUN) -m ruff format --check .
	@$(COMFY) tracking disable > /dev/null && $(COMFY) node validate

format: env ## let ruff mend what it can
	@$(RUN) -m ruff check --fix .
	@$(RUN) -m ruff format .

bench: env ## the table of the README, about 25 minutes (ARGS="--prompts 50 --ways balanced")
	@$(RUN) -m benchmarks.stepwise $(ARGS)

bench-gpu: ## one card in four minutes: GPU tests, SD3.5-Medium's size, memory, a trainer's iteration
	@$(RUN) -m benchmarks.gpu $(ARGS)
