# ongrid: `make demo` sets everything up and runs the quickstart; `make help` lists the rest.

# On a machine with a GPU: make setup LOCK=requirements/cuda-py312.txt
LOCK   ?= requirements/cpu-py311.txt
# The lock's file name ends in the Python that it is for: py311 is 3.11.
PY     := $(subst py3,3.,$(lastword $(subst -, ,$(basename $(LOCK)))))
PYTHON ?= python$(PY)
VENV   ?= .venv
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
LOCKED := $(VENV)/.locked
ARGS   ?=
# Processes that share the tests, file by file; each computes with one thread.
JOBS   ?= 2
PYTEST  = $(OFFLINE) OMP_NUM_THREADS=1 $(BIN)/pytest -n $(JOBS)
# In the order of collection: the long files are in e2e/ and come first.
SHARED  = --dist loadfile --no-loadscope-reorder

# Waiting OpenMP threads spin by default, which costs more than it gains on a few cores.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
export PIP_DISABLE_PIP_VERSION_CHECK ?= 1

# In a place of its own: an installed triton changes what trl and torchao import.
TRITON  := $(VENV)/triton

OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 WANDB_MODE=offline

.DEFAULT_GOAL := help
.PHONY: help setup demo docs check format test test-long test-kernels test-all lock-check lock clean
.DELETE_ON_ERROR:

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' $(firstword $(MAKEFILE_LIST))

setup: $(READY) ## make .venv with the exact packages of a lock (LOCK=requirements/cuda-py312.txt on a GPU)

demo: setup ## fine-tune SmolLM2-135M on this machine (about 9 minutes, 4 GiB of memory) and ship it in int8-int4; ARGS="--train.max-steps=20" passes options on
	$(BIN)/train --config quickstart.yaml --qat int8-int4 $(ARGS)

docs: setup ## the documentation's site, in build/site: open build/site/index.html
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

check: setup ## lint, format and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: setup ## let ruff rewrite what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

test: setup ## the tests, without the long ones and those that need a GPU; ARGS="-k name" passes options on
	$(PYTEST) $(SHARED) -m "not slow and not gpu" $(ARGS)

test-long: setup ## only the long tests, which `make test` leaves out: documented commands, all shipped configs, ...
	$(PYTEST) $(SHARED) -m "slow and not gpu" $(ARGS)

test-kernels: setup $(TRITON)/.ready ## the GPU kernels, bit for bit, in Triton's interpreter: needs no GPU
	PYTHONPATH=$(TRITON) TRITON_INTERPRET=1 $(PYTEST) tests/kernels $(ARGS)

test-all: setup ## all tests but those that need a GPU
	$(PYTEST) $(SHARED) -m "not gpu" $(ARGS)

lock-check: setup ## are the locks complete, and do they fit pyproject.toml?
	$(BIN)/python requirements/check.py

lock: setup ## write requirements/cpu-py311.txt from what .venv holds (see CONTRIBUTING.md)
	$(BIN)/python requirements/check.py --write

clean: ## remove .venv, caches and build outputs; runs/ stays
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .pytest_cache .ruff_cache unsloth_compiled_cache
	find . -name __pycache__ -type d -not -path './.git/*' -prune -exec rm -rf {} +

# --no-deps: the lock is complete, and unsloth's own list would pull torchvision and xformers, which need CUDA.
$(LOCKED): $(LOCK)
	@$(PYTHON) -c 'import sys; sys.exit("%d.%d" % sys.version_info[:2] != "$(PY)")' || { \
	  echo "error: $(LOCK) is for Python $(PY), which '$(PYTHON)' is not; name one: make setup PYTHON=path/to/python$(PY)" >&2; \
	  exit 1; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --no-deps -r $(LOCK)
	@$(BIN)/python -c 'import torch' 2>$(VENV)/torch-import.log || { \
	  tail -n 1 $(VENV)/torch-import.log >&2; \
	  echo "error: torch is installed but cannot be imported: most likely pip took a CUDA build without its libraries." >&2; \
	  echo "Point pip at PyTorch's index of CPU builds (the CPU choice on PyTorch's install page names it) and repeat:" >&2; \
	  echo "  $(BIN)/python -m pip uninstall -y torch && PIP_EXTRA_INDEX_URL=<that index> make setup" >&2; \
	  exit 1; }
	touch $@

$(TRITON)/.ready: $(LOCKED)
	$(BIN)/python -m pip install --no-deps --upgrade --target $(TRITON) "$$(grep '^triton==' requirements/cuda-py312.txt)"
	touch $@

$(READY): $(LOCKED) pyproject.toml
	$(BIN)/python -m pip install --no-deps --no-build-isolation --editable .
	touch $@
