# make demo    three simulated nodes and a router on loopback; no Ollama needed
# make test    the whole test suite, warnings as errors
# make check   lint, types, layers, tests and coverage: what CI runs
# make run     the router with router.yaml
# make bench-relay   what a relay costs, beside nginx, HAProxy and aiohttp

PYTHON ?= python3
CONFIG ?= router.yaml
ROUNDS ?= 5
ARGS ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.PHONY: demo test check lint types layers cover run bench-relay clean

demo: $(READY)
	@$(BIN)/ollamux demo

# The processes that tests start are measured too (tool.coverage.run in pyproject.toml).
test: $(READY)
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest

check: lint types layers cover

lint: $(READY)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types: $(READY)
	$(BIN)/mypy

layers: $(READY)
	$(BIN)/lint-imports

cover: test
	$(BIN)/coverage combine --quiet
	$(BIN)/coverage report --include='router/core/*' --fail-under=100
	$(BIN)/coverage report --omit='router/core/*' --fail-under=95

bench-relay: $(READY)
	$(BIN)/python -m bench.relay --rounds $(ROUNDS) $(ARGS)

run: $(READY)
	$(BIN)/ollamux serve --config $(CONFIG)

$(READY): pyproject.toml router/__init__.py
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "ollamux needs Python 3.11 or newer: make PYTHON=/path/to/python3 ..."; exit 1; }
	@$(PYTHON) -c 'import ensurepip, venv' 2>/dev/null || \
		{ echo "python3-venv is missing: apt-get install python3-venv"; exit 1; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --upgrade 'pip>=25.1'
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group dev --editable .
	@touch $(READY)

clean:
	rm -rf $(VENV) .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
