# make demo   create the environment, train on the embedded picture, evaluate, predict: results in demo/
# make test   create the environment, run the tests

.DELETE_ON_ERROR:
.PHONY: demo test lint format benchmark resources clean

# The first interpreter that is new enough; `make PYTHON=/path/to/python test` chooses another.
CANDIDATES := python3 python3.14 python3.13 python3.12 python3.11
NEW_ENOUGH := import sys; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(firstword $(foreach p,$(CANDIDATES),$(shell $(p) -c '$(NEW_ENOUGH)' 2>/dev/null && echo $(p))) python3)

VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := $(BIN)/python -m pip install --quiet --constraint constraints.txt --editable
METADATA := setup.py pyproject.toml constraints.txt
WORKERS ?= 2

demo: $(VENV)/.training
	$(BIN)/uctrans demo --output demo

test: $(VENV)/.dev
	$(BIN)/python -m pytest -p no:benchmark -n $(WORKERS)

lint: $(VENV)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

format: $(VENV)/.dev
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

benchmark: $(VENV)/.dev
	$(BIN)/python -m pytest benchmarks -m "not gpu" --benchmark-only

# On a machine with a CUDA GPU, with the Python that has torch for it; again with MISSING=--missing for what is left.
MINUTES ?= 8
RECORD ?= .benchmarks/gpu.jsonl
benchmark-gpu:
	$(PYTHON) -m pytest benchmarks -m gpu --benchmark-only --minutes $(MINUTES) --record $(RECORD) $(MISSING)
	$(PYTHON) -m benchmarks.report $(RECORD)

# What the compiler makes of every kernel, for GPUs that need not be there; a few minutes.
resources: $(VENV)/.dev
	$(BIN)/python -m uctrans.kernels.resources --output docs/kernel-resources.md

clean:
	rm -rf build dist demo runs .pytest_cache .ruff_cache .benchmarks .hypothesis *.egg-info
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
