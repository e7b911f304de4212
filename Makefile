# make demo    three simulated nodes and a router on loopback; no Ollama needed
# make test    the whole test suite, warnings as errors
# make test-live   what Ollama promises, asked of real nodes: OLLAMA_HOSTS=http://a:11434,http://b:11434
# make check   lint, types, layers, tests and coverage: what CI runs
# make run     the router with router.yaml
# make chaos   failing nodes under a steady load: the figures of docs/reliability.md
# make soak    everything fails at random: SECONDS=60 SEED=
# make storm   the same without sockets, in virtual time
# make bench-relay   what a relay costs, beside nginx, HAProxy and aiohttp
# make bench-routing   what a router's choices cost, in virtual time; ARGS=--sockets: through HTTP
# make bench-routing-report   all of its tables in docs/; TRACES=folder, ARGS='--router ollamux'
# make bench-routing-plots    its plots, of what that has kept; installs matplotlib

PYTHON ?= python3
CONFIG ?= router.yaml
ROUNDS ?= 5
ARGS ?=
TRACES ?=
SECONDS ?= 60
SEED ?=
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
JAVASCRIPT := tests/clients/node_modules/.package-lock.json

.PHONY: demo test test-live chaos soak storm check lint types layers cover run bench-relay bench-routing bench-routing-report bench-routing-plots clean

demo: $(READY)
	@$(BIN)/ollamux demo

# The processes that tests start are measured too (tool.coverage.run in pyproject.toml).
test: $(READY) $(JAVASCRIPT)
	@rm -f .coverage .coverage.*
	$(BIN)/coverage run -m pytest

# OLLAMA_HOSTS and OLLAMA_TEST_MODEL, of the command line or the environment: docs/testing.md.
test-live: $(READY)
	$(BIN)/pytest -m live -q -rfExX tests/live

chaos: $(READY)
	$(BIN)/python -m tests.chaos.run --seed "$(SEED)" $(ARGS)

storm: $(READY)
	$(BIN)/python -m tests.core.storm $(SECONDS) $(SEED)

soak: $(READY)
	$(BIN)/python -m tests.chaos.soak --seconds $(SECONDS) --seed "$(SEED)" $(ARGS)

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

bench-routing: $(READY)
	$(BIN)/python -m bench.routing $(ARGS)

REPORT = $(BIN)/python -m bench.routing.full $(if $(TRACES),--traces $(TRACES)) $(ARGS)

bench-routing-report: $(READY)
	$(REPORT)

bench-routing-plots: $(READY)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --group plots
	$(REPORT) --draw

# The JavaScript clients, for the tests that run them under Node.js.
$(JAVASCRIPT): tests/clients/package-lock.json
	@if command -v npm >/dev/null; then \
		npm ci --prefix tests/clients --silent --no-audit --no-fund && touch $@ || \
			echo "npm cannot fetch the JavaScript clients: their tests will be skipped"; \
	else \
		echo "npm is missing: the tests of the JavaScript clients will be skipped"; \
	fi

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
	rm -rf $(VENV) tests/clients/node_modules .coverage* .hypothesis .mypy_cache .pytest_cache .ruff_cache .import_linter_cache
