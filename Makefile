# `make demo` and `make test` set themselves up: all they need is Python 3.11+ and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
DEMO_OPTIONS := $(if $(TEXT),--text $(TEXT)) $(if $(GLOB),--glob '$(GLOB)')

.PHONY: help setup demo test lint clean

help:
	@echo "make demo    train, sweep and sample a tiny elastic model on real text (TEXT=path for your own)"
	@echo "make test    all tests"
	@echo "make lint    ruff, mypy --strict, import contracts"
	@echo "make setup   the virtual environment in $(VENV) only"

setup: $(VENV)/.installed

$(VENV)/.installed: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	DS_BUILD_OPS=0 $(BIN)/pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

demo: setup
	$(BIN)/python tools/demo.py $(DEMO_OPTIONS)

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not ranks' --numprocesses 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ranks --numprocesses 2 --dist loadgroup

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

clean:
	rm -rf $(VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
