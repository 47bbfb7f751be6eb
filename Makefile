# Two commands: `make demo` shows the method on real text, `make test` passes the tests.
# PyTorch comes first: anything that depends on it would otherwise pull a build with gigabytes of CUDA.
TORCH ?= torch==2.13.0
TORCH_INDEX ?=
PYTHON ?= python3
DATA ?= $(SLM_DATA)
TEST_WORKERS ?= 2

VENV := .venv
RUN := $(VENV)/bin
STAMP := $(VENV)/installed
# Each worker begins with neighbouring tests, which share what is made for them, and then takes over from the other.
PYTEST := $(RUN)/python -m pytest -n $(TEST_WORKERS) --dist worksteal

.PHONY: install test test-all lint demo clean

install: $(STAMP)

$(STAMP): setup.py
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' || { \
		echo "$(PYTHON) is not Python 3.11 to 3.13: name one that is, as in make demo PYTHON=python3.12" >&2; exit 2; }
	@echo "installing into $(VENV): PyTorch first, then the rest; some minutes"
	$(PYTHON) -m venv $(VENV)
	$(RUN)/python -m pip install --quiet $(if $(TORCH_INDEX),--index-url $(TORCH_INDEX)) "$(TORCH)"
	$(RUN)/python -m pip install --quiet --editable ".[dev]"
	touch $(STAMP)

lint: $(STAMP)
	$(RUN)/ruff check .
	$(RUN)/ruff format --check .
	$(RUN)/mypy

test: lint
	$(PYTEST) -m "not slow"

test-all: lint
	$(RUN)/python -m pip install --quiet --editable ".[dev,slow]"
	$(PYTEST)

demo: $(STAMP)
	$(RUN)/megatron-slm demo --output demo

clean:
	rm -rf $(VENV) build dist *.egg-info
