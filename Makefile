# `make demo` and `make test` set themselves up: all they need is Python 3.11+ and a package index.
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
INSTALL := DS_BUILD_OPS=0 $(BIN)/python -m pip install --disable-pip-version-check --constraint constraints.txt

# a CUDA build of torch, apart: the other may be the CPU's
CUDA_VENV ?= .venv-cuda
CUDA_TORCH ?= torch==2.14.1

.PHONY: help setup demo test test-kernels test-nullcuda lint check-install clean

help:
	@echo "make demo           train, sweep and sample a tiny elastic model on real text"
	@echo "                    (TEXT='my notes/' GLOB='*.md' for your own)"
	@echo "make test           all tests"
	@echo "make test-kernels   all tests as three kinds of processor would run them"
	@echo "make test-nullcuda  the GPU path on a null CUDA device, whose folder MEGASSM_NULLCUDA names; needs no GPU"
	@echo "make lint           ruff, mypy --strict, import contracts, sizes of files and functions"
	@echo "make setup          the virtual environment in $(VENV) only, with all that development needs"
	@echo "make check-install  what a package index would install for each Python here; installs nothing"

# the environment grows in two steps: what training needs, and what development needs besides
$(VENV)/.base: pyproject.toml constraints.txt
	@echo "== installing MegaSSM in $(VENV), a few minutes: about 90 packages, a download of 2.9 GB where pip finds PyTorch"
	@echo "   with CUDA, of 0.3 GB (1.4 GB on disk) where it finds the CPU build; nothing outside $(VENV) changes"
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) --editable .
	@touch $@

$(VENV)/.dev: $(VENV)/.base
	@echo "== installing what the tests and linters need: about 60 packages more"
	$(INSTALL) --editable '.[dev]'
	@touch $@

setup: $(VENV)/.dev

# TEXT and GLOB reach the shell by the environment: a path may have spaces
demo: $(VENV)/.base
	@$(BIN)/python tools/demo.py $${TEXT:+--text "$$TEXT"} $${GLOB:+--glob "$$GLOB"}

test: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not ranks' --numprocesses 2
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ranks --numprocesses 2 --dist loadgroup

test-kernels: setup
	PYTHON=$(BIN)/python tools/test_kernels.sh

$(CUDA_VENV)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CUDA_VENV)
	grep -v '^torch==' constraints.txt > $(CUDA_VENV)/constraints.txt
	DS_BUILD_OPS=0 $(CUDA_VENV)/bin/python -m pip install --disable-pip-version-check \
		--constraint $(CUDA_VENV)/constraints.txt '$(CUDA_TORCH)' --editable '.[dev]'
	@touch $@

# MEGASSM_NULLCUDA_WRITE=1 writes docs/results/nullcuda.json anew
test-nullcuda: $(CUDA_VENV)/.ready
	@test -e "$${MEGASSM_NULLCUDA:?names no folder with libnull.so and lib/libcuda.so.1}/libnull.so"
	OMP_NUM_THREADS=1 $(CUDA_VENV)/bin/python -m pytest -m nullcuda

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python tools/check_sizes.py

check-install:
	tools/check_install.sh

clean:
	rm -rf $(VENV) $(CUDA_VENV) build *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis .import_linter_cache
