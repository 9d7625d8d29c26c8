# `make` alone lists the targets: the text behind each `##`.

.DELETE_ON_ERROR:
.DEFAULT_GOAL := help
.PHONY: help demo test test-all lint format benchmark gpu resources clean

# The first interpreter that is new enough; `make PYTHON=/path/to/python test` chooses another.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(p))) python3)

VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
METADATA := setup.py pyproject.toml constraints.txt
WORKERS ?= 2

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{ printf "%-20s %s\n", $$1, $$2 }'

demo: $(VENV)/.training ## create the environment, find nuclei, train on the embedded picture, predict: results in demo/
	$(BIN)/uctrans demo --output demo

test: $(VENV)/.dev ## create the environment, run the tests but the slow ones
	$(BIN)/python -m pytest -p no:benchmark -n $(WORKERS) -m "not slow"

test-all: $(VENV)/.dev ## run all tests
	$(BIN)/python -m pytest -p no:benchmark -n $(WORKERS)

lint: $(VENV)/.dev ## check style and format
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev ## apply what ruff can correct
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.dev ## time the operators against the published operations on this CPU
	$(BIN)/python -m pytest benchmarks -k "cpu and batch_4 and both and reference" --benchmark-only

gpu: ## run the first call of the plan for a CUDA GPU, seven minutes: make gpu PYTHON=python
	$(PYTHON) -m benchmarks.gpu $(ARGUMENTS)

# What the compiler makes of every kernel, for GPUs that need not be there; a few minutes.
resources: $(VENV)/.dev ## compile the kernels offline: docs/kernel-resources.md
	$(BIN)/python -m uctrans.kernels.compilation --published docs/kernel-resources.md

clean: ## remove what was built and the demo; runs/, records of benchmarks and the environment stay
	rm -rf build dist demo .pytest_cache .ruff_cache .hypothesis *.egg-info
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# One stamp a set of packages: an environment is made once, and brought up to date when the metadata changes.
$(VENV)/pyvenv.cfg:
	@$(PYTHON) -c '$(NEW_ENOUGH)' || { \
	  echo "uctrans needs Python 3.11 or newer, and '$(PYTHON)' is not: make PYTHON=/path/to/python3.11 ..." >&2; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.training: $(METADATA) | $(VENV)/pyvenv.cfg
	@echo "Installing uctrans and what training needs into $(VENV) (a minute or two) ..."
	$(INSTALL) '.[training]'
	@touch $@

$(VENV)/.dev: $(METADATA) | $(VENV)/pyvenv.cfg
	@echo "Installing uctrans and what development needs into $(VENV) (a minute or two) ..."
	$(INSTALL) '.[dev]'
	@touch $@ $(VENV)/.training
