# Every target brings its own environment up first: a plain venv with the pinned versions.
PYTHON ?= python3
# Two workers are what a small machine carries; the tests use one torch thread each.
WORKERS ?= 2
PYTEST_ARGS ?=
BENCH_ARGS ?=

VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Headless machines have no display for matplotlib to open.
export MPLBACKEND ?= Agg

.DEFAULT_GOAL := help
.PHONY: help install demo test check format bench clean

help:
	@echo "make demo    train-free tour: load the shipped policies, explain them, write figures"
	@echo "make test    the test suite and the doctests (PYTEST_ARGS='-k lrp', WORKERS=4)"
	@echo "make check   ruff (lint and format) and pyright"
	@echo "make format  let ruff rewrite what it can"
	@echo "make bench   speed as ratios to the floor (BENCH_ARGS='--only mlp --quick')"
	@echo "make clean   remove the environment and every build output"

$(INSTALLED): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt -e '.[test]'
	@touch $@

install: $(INSTALLED)

demo: $(INSTALLED)
	$(BIN)/python -m tdhook_like demo

test: $(INSTALLED)
	$(BIN)/python -m pytest -n $(WORKERS) $(PYTEST_ARGS)

check: $(INSTALLED)
	$(BIN)/python -m ruff check .
	$(BIN)/python -m ruff format --check .
	$(BIN)/python -m pyright

format: $(INSTALLED)
	$(BIN)/python -m ruff check --fix .
	$(BIN)/python -m ruff format .

bench: $(INSTALLED)
	$(BIN)/python benchmarks/run.py $(BENCH_ARGS)

clean:
	rm -rf $(VENV) build dist demo_out bench_out .pytest_cache .ruff_cache .hypothesis
