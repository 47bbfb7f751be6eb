# `make demo` shows the method on real text; `make test` runs the linters, the type checker and the tests.
# PyTorch is installed first: as a dependency of another package it would be the build with gigabytes of CUDA.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTHON ?= python3
TEST_WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/installed
# Neighbouring tests share fixtures, so each worker starts with a block of them; a worker without work takes over others.
PYTEST := $(RUN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.PHONY: install test test-only test-all lint types demo clean

install: $(STAMP)

# __init__.py holds the version.
$(STAMP): pyproject.toml setup.py megatron_slm/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "$(PYTHON) is not Python 3.11 to 3.13. Name one that is, as in make demo PYTHON=python3.12." >&2; exit 2; }
	@echo "Installing into $(VENV): PyTorch first, then the rest. This takes some minutes."
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(RUN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .

types: $(STAMP)
	$(RUN)/mypy

test-only: $(STAMP)
	$(PYTEST) -m "not slow"

test: lint types test-only

test-all: lint types
	$(RUN)/python -m pip install --quiet --editable ".[dev,slow]"
	$(PYTEST) -rs

demo: $(STAMP)
	$(RUN)/megatron-slm demo --output demo

clean:
	rm -rf $(VENV) build dist *.egg-info
