# make demo | test | stress | fuzz | check | bench | setup. Each sets up .venv by itself; nothing is installed outside it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.ready
SECONDS ?= 60

.PHONY: setup demo test stress fuzz check bench clean

setup: $(STAMP)

# torch first: once it is there, no other requirement can choose another build of it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "Python 3.11 or newer is needed: make PYTHON=python3.11 ...")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[dev]'
	touch $(STAMP)

demo: setup
	$(BIN)/ahl demo

# The bases are fetched first: the tests themselves never reach the network. A process a core, to four of them.
test: setup
	$(BIN)/ahl base pull smollm2-135m-instruct
	$(BIN)/ahl base pull minilm-l6
	$(BIN)/python -m pytest --numprocesses logical --maxprocesses 4 --dist loadfile

# Every crash point, fault, power cut, flipped byte and interleaving of the store, of which `make test` tries a sample.
# What needs strace, a C compiler or a mount is skipped where there is none, with the reason.
stress: setup
	$(BIN)/python -m tests.stress -rs

# Each parser for SECONDS, one after the other: with atheris, which follows coverage, where it can be installed.
fuzz: setup
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt --editable '.[fuzz]' \
		|| echo "Without atheris: mutations of valid inputs alone."
	$(BIN)/python -m tests.fuzz --seconds $(SECONDS)

# mypy does not follow the mapping of cli/ to adapterhub_lite.cli, so it is given the tree as it is installed.
check: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	rm -rf build/types && mkdir -p build/types && cp -r adapterhub_lite build/types/ && cp -r cli build/types/adapterhub_lite/cli
	cd build/types && MYPYPATH=. ../../$(BIN)/mypy --config-file ../../pyproject.toml --package adapterhub_lite

bench: setup
	$(BIN)/python -m benchmarks

clean:
	rm -rf $(VENV) build *.egg-info
