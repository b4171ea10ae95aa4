# Everything from a bare clone: `make train`, `make test`. The first call builds a virtual environment, later ones do not.
#
#   make train ARGS="trainer.max_epochs=3 optimizer=sgd"     the main job, or any other: the words of `nnx-fit`
#   make test ARGS="tests/cli -k sweep"                      the tests, or some of them
#   make test WORKERS=0                                      in one process, for a debugger
#   make test PYTHON=python3.12                              with another Python, in an environment of its own

SHELL := /bin/bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
ARGS ?=
WORKERS ?= 2

USABLE = import sys; sys.exit(not ((3, 11) <= sys.version_info))
ifeq ($(origin PYTHON),undefined)
PYTHON := $(shell for name in python3.13 python3.12 python3.11 python3; do \
	if $$name -c '$(USABLE)' >/dev/null 2>&1; then echo $$name; break; fi; done)
VENV ?= .venv
else
VENV ?= .venv-$(shell $(PYTHON) -c 'import sys; print("%d.%d" % sys.version_info[:2])')
endif
BIN := $(VENV)/bin

.PHONY: help train test nightly lint bench docs smoke clean

help:
	@sed -n '/^#/!q; s/^# \{0,1\}//p' Makefile
	@echo "  make lint | nightly | bench | docs | smoke | clean"

train: $(VENV)/.with-demo
	$(BIN)/nnx-fit $(ARGS)

test: $(VENV)/.with-test
	$(BIN)/python -m pytest --numprocesses $(WORKERS) --dist loadfile $(ARGS)

# Thirty kills at random instead of a few, damage at each place, and runs in parts that nobody has drawn before; writes the
# table of faults in docs/checkpoints.md.
nightly: $(VENV)/.with-test
	export NNX_FIT_KILLS=30 NNX_FIT_FAULTS_TABLE=write NNX_FIT_EXAMPLES=200
	$(BIN)/python -m pytest tests/e2e/test_faults*.py tests/e2e/test_resume_anywhere.py $(ARGS)

lint: $(VENV)/.with-lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright --pythonpath $(BIN)/python

# Also benchmarks/features.py, checkpoint.py, monitor.py and import_time.py, by hand.
bench: $(VENV)/.with-demo
	$(BIN)/python benchmarks/dispatch.py $(ARGS)

# The examples in the docstrings are run, and their output compared.
docs: $(VENV)/.with-test
	$(BIN)/python -m pytest --doctest-modules nnx_fit $(ARGS)

# The wheel, installed where nothing else is, runs from an empty folder.
smoke: $(VENV)/.with-test
	folder=$$(mktemp -d); trap 'rm -rf "$$folder"' EXIT
	$(BIN)/python -m pip wheel --quiet --no-deps --wheel-dir "$$folder/dist" .
	$(BIN)/python -m venv "$$folder/venv"
	"$$folder/venv/bin/pip" install --quiet "$$(echo "$$folder"/dist/nnx_fit-*.whl)[demo]"
	mkdir "$$folder/empty"
	cd "$$folder/empty"
	"$$folder/venv/bin/nnx-fit" --help >/dev/null
	"$$folder/venv/bin/nnx-fit" name=smoke trainer.max_epochs=1 trainer.enable_progress_bar=false
	ls outputs/smoke/events.out.tfevents.* outputs/smoke/.hydra/config.yaml
	test -n "$$(ls outputs/smoke/checkpoints)"
	echo "The wheel works."

clean:
	rm -rf .venv .venv-* build dist *.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

.ONESHELL:

# One stamp for each set of extras: newer than pyproject.toml means installed.
$(VENV)/.with-%: pyproject.toml
	@if [ -z "$(PYTHON)" ]; then
	  echo "No Python 3.11 or newer was found. Install one, or name it: make PYTHON=/path/to/python3" >&2; exit 1
	fi
	$(PYTHON) -c '$(USABLE)' || { echo "$(PYTHON) is older than Python 3.11." >&2; exit 1; }
	if ! $(BIN)/python -m pip --version >/dev/null 2>&1; then
	  echo "Building $(VENV) with $(PYTHON) ..."
	  $(PYTHON) -m venv --clear $(VENV)
	fi
	echo "Installing nnx-fit with the extras for $* (once) ..."
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --editable ".[$*]"
	touch $@
