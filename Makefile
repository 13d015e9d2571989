# Everything a newcomer and CI run. `make demo` and `make test` set up what they need.
PYTHON ?= python3
WORKERS ?= 4
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
INSTALL := $(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt
# On all cores, which pip does on one. What packages carry for other versions of Python does not compile; what
# is seldom imported is compiled when it is.
SELDOM := /(tests?|models|validators|rllib|kubernetes|moto|databricks|azure|sphinx|pygments|pip)/
COMPILE := $(BIN)/python -W ignore -m compileall -qq -j 0 -x '$(SELDOM)' $(VENV)/lib || true

.PHONY: setup packages demo test lint docs bench soak clean help

help:
	@echo "make demo    set up, then pretrain, fine-tune and test a small language model (5 to 10 minutes)"
	@echo "make test    set up, then run the tests, WORKERS=4 at a time"
	@echo "make lint    ruff and mypy"
	@echo "make docs    the documentation as pages, build/docs/index.html"
	@echo "make bench   measure against peers, in the same run (two to three hours)"
	@echo "make soak    the long form of the tests that run small, or not at all, in 'make test'"
	@echo "make clean   remove $(VENV) and caches; runs stay"

setup: $(INSTALLED)

$(INSTALLED): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		(echo "stoker needs Python 3.11 or newer; name one with: make PYTHON=python3.12 ..." >&2; exit 1)
	$(PYTHON) -m venv $(VENV)
	$(INSTALL) torch==2.13.0
	$(INSTALL) -e '.[dev]'
	@$(COMPILE)
	@touch $@

demo: setup
	@$(BIN)/python examples/demo.py

packages:
	@scripts/debian-packages

test: setup packages
	$(BIN)/python -m pytest -n $(WORKERS) --dist worksteal

bench: setup
	$(INSTALL) -e '.[bench]'
	@$(COMPILE)
	$(BIN)/python bench/tracking.py
	$(BIN)/python bench/engine.py
	$(BIN)/python bench/checkpoint.py
	$(BIN)/python bench/llm.py
	$(BIN)/python bench/sweep.py
	$(BIN)/python bench/regret.py
	$(BIN)/python bench/reproduce.py

lint: setup
	$(BIN)/ruff check --no-cache .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: setup
	$(BIN)/python -m sphinx -W --keep-going -q docs build/docs

soak: setup packages
	STOKER_SOAK=1 $(BIN)/python -m pytest -n $(WORKERS) --dist worksteal -m soak --timeout 3600

clean:
	rm -rf $(VENV) build dist .pytest_cache .mypy_cache .ruff_cache src/*.egg-info
