# What a person types. `make run` starts the broker, `make cluster` three of them on Redis; `make test` proves it.
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
PIP    := $(BIN)/python -m pip --disable-pip-version-check
LOCKS  := config/requirements
ROUNDS ?= 20
SEED   ?= 1

.PHONY: run cluster test redis faults install lint types format bench lock clean
.DEFAULT_GOAL := run

run: $(VENV)/.runtime  ## start the broker, open for development
	$(BIN)/broker serve --config config/dev.toml

cluster: redis $(VENV)/.runtime  ## three nodes and a Redis of their own, open for development; Ctrl-C ends all
	$(BIN)/python config/cluster.py

test: redis lint types  ## all that must pass before a change lands
	$(BIN)/python -m pytest --cov --cov-report=term tests

redis:  ## programs that the tests run; installed where that is allowed
	@.ci/system-packages

faults: redis $(VENV)/.everything  ## break a cluster in ROUNDS ways, drawn from SEED; the ledger must hold
	$(BIN)/python -m tests.faults --rounds $(ROUNDS) --seed $(SEED) --json .cache/faults.json

install: $(VENV)/.everything  ## everything into .venv

lint: $(VENV)/.everything
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(VENV)/.everything
	$(BIN)/mypy

format: $(VENV)/.everything
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(VENV)/.everything  ## every scenario, short; see python -m bench --help
	$(BIN)/python -m bench all

lock: $(VENV)/.everything  ## make the lock files anew from pyproject.toml
	$(PIP) install -q uv
	$(BIN)/uv pip compile -q pyproject.toml --extra build --extra dev --extra bench --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header --upgrade -o $(LOCKS)/all.txt
	$(BIN)/uv pip compile -q pyproject.toml --extra build --universal --python-version 3.11 \
		--generate-hashes --no-emit-index-url --no-header -c $(LOCKS)/all.txt -o $(LOCKS)/runtime.txt

clean:
	rm -rf $(VENV) build dist *.egg-info .cache .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' \
		|| { echo "Python 3.11, 3.12 or 3.13 is needed; name one: make PYTHON=python3.13" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)

$(VENV)/.runtime: $(LOCKS)/runtime.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --require-hashes -r $(LOCKS)/runtime.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@

$(VENV)/.everything: $(LOCKS)/all.txt pyproject.toml | $(VENV)/bin/python
	$(PIP) install -q --require-hashes -r $(LOCKS)/all.txt
	$(PIP) install -q --no-deps --no-build-isolation -e .
	@touch $@ $(VENV)/.runtime
