# The same commands for people and for CI. `make help` lists them.
#
# Only Python 3.11 to 3.13 and make are needed beforehand (and Node 20 for test-interop).

VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
LOCK := requirements.lock
TIERS := $(wildcard tests/test_spec.py $(addprefix tests/,unit property conformance integration chaos))

# Tried in this order; the first that runs, is in range and can make environments is taken.
PYTHON ?= python3.13 python3.12 python3.11 python3 python
USABLE := import ensurepip, sys, venv; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))

export PYRIGHT_PYTHON_IGNORE_WARNINGS := 1

.DEFAULT_GOAL := help
.PHONY: help setup demo test check test-interop bench lock clean

help:  ## List the commands.
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-14s %s\n", $$1, $$2 }' Makefile

setup: $(STAMP)  ## Create the environment from the lock file; at once when nothing changed.

$(STAMP): $(LOCK) pyproject.toml
	@if ! $(BIN)/python -c '$(USABLE)' 2>/dev/null; then \
	    for python in $(PYTHON); do \
	        if $$python -c '$(USABLE)' 2>/dev/null; then found=$$python; break; fi; \
	    done; \
	    if [ -z "$$found" ]; then \
	        echo "No Python 3.11 to 3.13 with venv among: $(PYTHON). Try: make setup PYTHON=/path/to/python" >&2; \
	        exit 1; \
	    fi; \
	    echo "Creating $(VENV) with $$($$found --version)"; \
	    $$found -m venv --clear $(VENV); \
	fi
	$(BIN)/python -m pip install --quiet --require-hashes -r $(LOCK)
	$(BIN)/python -m pip install --quiet --no-deps --no-build-isolation --editable .
	@touch $@

demo: setup  ## Solve the shipped word problems with agents on Ray; again: continues or finds all done.
	$(BIN)/python -m examples.word_problems

test: setup  ## Run every test but those that need Node.
	$(BIN)/python -m pytest -m "not interop" $(TIERS)

check: setup  ## Lint, formatting and types.
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyright

test-interop: setup  ## Test the model adapters over HTTP against a mock provider; needs Node 20.
	cd tests/interop && npm ci --no-audit --no-fund
	$(BIN)/python -m pytest -m interop tests/interop

bench: setup  ## Measure everything; takes a while. One figure: .venv/bin/python -m benchmarks NAME
	$(BIN)/python -m benchmarks all

lock:  ## Resolve the dependencies again for Python 3.11 to 3.13 on all platforms.
	$(BIN)/uv pip compile --universal --all-extras --upgrade --generate-hashes --no-emit-index-url \
	    --custom-compile-command "make lock" --quiet --output-file $(LOCK) pyproject.toml

clean:  ## Remove the environment and caches; data directories stay.
	rm -rf $(VENV) .pytest_cache .ruff_cache .hypothesis build dist tests/interop/node_modules
