# make demo    set up .venv and run the main jobs: a trained model answers under each hint, right or wrong; then a Llama
#              reads 16K tokens of real text, dense against sparse
# make test    set up .venv and run ruff, mypy and pytest; DEEP=1 for many more hypothesis examples
# make clean   remove .venv and the caches of the tools
#
# PYTHON=python3.12 picks the interpreter (3.11 or 3.12), VENV=path the environment,
# WORKERS=4 the test processes, ARGS=... goes to examples/demo.py or pytest.

USABLE = import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 12))
PYTHON ?= $(shell for p in python3.11 python3.12 python3; do $$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet -c constraints.txt
ifeq ($(DEEP),1)
export HYPOTHESIS_PROFILE = deep
else
export HYPOTHESIS_PROFILE ?= ci
endif

.PHONY: demo test lint types clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python examples/answers.py
	$(BIN)/python examples/demo.py $(ARGS)

test: lint types
	$(BIN)/python -m pytest -q -n $(WORKERS) $(ARGS)

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or 3.12 with venv is needed; name one: make PYTHON=/path/to/python3.12"; exit 1; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.demo: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing sparsepass and what the demo needs into $(VENV) ..."
	$(PIP) -e ".[demo,triton]"
	@touch $@

$(VENV)/.test: $(BIN)/python pyproject.toml constraints.txt
	@echo "Installing sparsepass and what the tests need into $(VENV) ..."
	$(PIP) -e ".[test]"
	@touch $@ $(VENV)/.demo

clean:
	rm -rf $(VENV) .hypothesis .mypy_cache .pytest_cache .ruff_cache build *.egg-info
