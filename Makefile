# make demo    set up .venv and run the main jobs: a trained model answers under each hint, right or wrong; then a Llama
#              reads 16K tokens of real text, dense against sparse
# make test    set up .venv and run ruff, mypy and pytest; DEEP=1 for many more hypothesis examples
# make matrix  run the fast tests over the supported versions of torch and Python that can be had here, and print a
#              table; run it again to go on (ARGS="--only 2.14" for some, --pythons PATH ... for interpreters)
# make mutations    which of a hundred one-line mutations the tests notice (hours; goes on where it was)
# make sanitize     the C++ kernels under the address and undefined-behavior sanitizers, over random problems (minutes)
# make clean   remove .venv and the caches of the tools
#
# PYTHON=python3.12 picks the interpreter (3.11 or newer), VENV=path the environment,
# WORKERS=4 the test processes, ARGS=... goes to examples/demo.py or pytest.

USABLE = import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 11))
PYTHON ?= $(shell for p in python3.11 python3.12 python3.13 python3; do $$p -c '$(USABLE)' >/dev/null 2>&1 && echo $$p && break; done)
VENV ?= .venv
WORKERS ?= 2
BIN := $(VENV)/bin
# Without --no-compile every module of torch and transformers is compiled, most for nothing: 45 s. What is imported is
# compiled then, and must be kept: dozens of processes import it.
export PYTHONDONTWRITEBYTECODE :=
PIP := $(BIN)/python -m pip install --disable-pip-version-check --quiet --no-compile -c constraints.txt
ifeq ($(DEEP),1)
export HYPOTHESIS_PROFILE = deep
else
export HYPOTHESIS_PROFILE ?= ci
endif

.PHONY: demo test matrix checks lint types warm mutations sanitize clean
.DELETE_ON_ERROR:

demo: $(VENV)/.demo
	$(BIN)/python examples/answers.py
	$(BIN)/python examples/demo.py $(ARGS)

# One thread a process: the processes take the cores already. Where a test asks for two, the one that waits sleeps.
# Tests are dealt out a few at a time, the longest first, so that the processes end together.
test: checks
	OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive $(BIN)/python -m pytest -q -n $(WORKERS) --maxschedchunk=4 $(ARGS)

matrix:
	$(PYTHON) .ci/matrix.py --workers $(WORKERS) $(ARGS)

checks: $(VENV)/.test
	@$(MAKE) --no-print-directory -j2 lint types warm

lint: $(VENV)/.test
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.test
	$(BIN)/mypy

# What every test process needs, made once, while mypy keeps another core busy: bytecode and the C++ kernels.
warm: $(VENV)/.test
	@$(BIN)/python -c "import torch._inductor.compile_fx, triton.compiler, hypothesis, matplotlib.pyplot, transformers.models.llama.modeling_llama; \
	from sparsepass.kernels.runtime import build as cpu_build; cpu_build.library()"

mutations: $(VENV)/.test
	OMP_WAIT_POLICY=passive $(BIN)/python tests/mutations.py --jobs $(WORKERS) $(ARGS)

sanitize: $(VENV)/.test
	$(BIN)/python .ci/sanitize.py $(ARGS)

$(BIN)/python:
	@test -n "$(PYTHON)" || { echo "Python 3.11 or newer with venv is needed; name one: make PYTHON=/path/to/python3.12"; exit 1; }
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
