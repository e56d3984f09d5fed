# `make` lists the targets. Only `setup` and its parts (which the others call when needed) use the network.
.DEFAULT_GOAL := help
SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DELETE_ON_ERROR:
MAKEFLAGS += --no-builtin-rules

# Tests start hundreds of processes; each would compile every module again.
unexport PYTHONDONTWRITEBYTECODE

VENV ?= .venv
PYTHON ?=
DEMO_SECONDS ?= 20
DEMO_DIRECTORY ?= demo-data
TEST_WORKERS ?= 2
CI ?=

RUN := $(VENV)/bin/python
PIP := $(RUN) -m pip --disable-pip-version-check install --quiet --constraint constraints.txt
PYTEST := PATH="$(abspath $(VENV))/bin:$$PATH" $(RUN) -m pytest --numprocesses $(TEST_WORKERS) --dist loadgroup
BENCH_DIRECTORY := build/bench
BENCHMARKS := $(filter-out benchmarks/render.py benchmarks/_%,$(wildcard benchmarks/*.py))

.PHONY: help setup services demo test lint bench dist test-faults test-all clean

help: ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-12s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(VENV)/.tools services ## create .venv with everything that the other targets need

demo: $(VENV)/.package ## 20 s of the simulated network into demo-data/ (DEMO_SECONDS=60 for longer)
	@$(RUN) -m blueflow.testing.demo --seconds $(DEMO_SECONDS) --directory $(DEMO_DIRECTORY)

test: $(VENV)/.tools services $(if $(CI),$(VENV)/bin/promtool) ## run the tests, at most 5 min; with CI=1 all parts, none left out
ifeq ($(CI),)
	@$(PYTEST) -m "not slow"
	@echo "not run: tests marked slow (packaging among them; need the package index): make test-all"
else
	@$(PYTEST)
endif

lint: $(VENV)/.tools ## format check, ruff, mypy --strict, import contracts
	@$(RUN) -m ruff format --check .
	@$(RUN) -m ruff check .
	@$(RUN) -m mypy
	@$(VENV)/bin/lint-imports

bench: $(VENV)/.tools ## run every benchmark beside its peer, write benchmarks/RESULTS.md
	@mkdir -p $(BENCH_DIRECTORY)
	@for script in $(BENCHMARKS); do \
	    echo "$$script"; \
	    $(RUN) "$$script" --json "$(BENCH_DIRECTORY)/$$(basename "$$script" .py).json"; \
	done
	@$(RUN) benchmarks/render.py $(BENCH_DIRECTORY) benchmarks/RESULTS.md

dist: $(VENV)/.tools ## build the sdist and the wheel into dist/
	@rm -rf dist
	@$(RUN) -m build --no-isolation --outdir dist .

test-faults: $(VENV)/.tools services ## run all fault campaigns in full
	@BLUEFLOW_TEST_FULL=1 $(PYTEST) -m faults

test-all: $(VENV)/.tools services ## run every test in full: slow ones, fault campaigns, packaging
	@HYPOTHESIS_PROFILE=ci BLUEFLOW_TEST_FULL=1 $(PYTEST)

clean: ## remove what the targets made, .venv and demo-data/ too
	@rm -rf $(VENV) dist build $(DEMO_DIRECTORY) .coverage .coverage.* \
	    .hypothesis .import_linter_cache .mypy_cache .pytest_cache .ruff_cache
	@find src tests benchmarks -name __pycache__ -prune -exec rm -rf {} +

# A candidate counts only when it runs: version managers leave names behind that do not.
$(VENV)/bin/python:
	@for candidate in $(or $(PYTHON),python3.13 python3.12 python3.11 python3.14 python3 python); do \
	    if "$$candidate" -c 'import ensurepip, sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' \
	        >/dev/null 2>&1; then \
	        echo "creating $(VENV) with $$("$$candidate" --version)"; \
	        exec "$$candidate" -m venv --clear $(VENV); \
	    fi; \
	done; \
	echo "blueflow needs Python 3.11 to 3.14 with venv: install it (apt-get install python3 python3-venv," \
	    "brew install python@3.13) or name one: make PYTHON=/path/to/python" >&2; \
	exit 1

# Two steps, so that the demo does not wait for the tools of the tests.
$(VENV)/.package: pyproject.toml constraints.txt | $(VENV)/bin/python
	@echo "installing blueflow into $(VENV)"
	@$(PIP) pip hatchling
	@$(PIP) --no-build-isolation --editable .
	@touch $@

$(VENV)/.tools: $(VENV)/.package
	@echo "installing the tools of the tests into $(VENV)"
	@$(PIP) --group dev --no-build-isolation --editable '.[identity,kafka,lake]'
	@touch $@

# The files of real servers, once per machine. Where they cannot be had, their tests name the reason.
services: $(VENV)/.tools ## get the files of real servers into ~/.cache/blueflow, where Java and Maven are
ifneq ($(CI),)
	@if ! command -v java >/dev/null || ! command -v mvn >/dev/null; then bash .ci/apt default-jre-headless maven; fi
	@if ! command -v kcat >/dev/null; then bash .ci/apt kcat; fi
	@if ! command -v strace >/dev/null; then bash .ci/apt strace; fi
	@$(RUN) -m blueflow.testing.services install kafka s3
else
	@if command -v java >/dev/null && command -v mvn >/dev/null; then \
	    $(RUN) -m blueflow.testing.services install kafka || true; \
	fi
endif

# promtool out of Debian's package, without installing and starting a Prometheus.
$(VENV)/bin/promtool: | $(VENV)/bin/python
	@if command -v promtool >/dev/null; then ln -sf "$$(command -v promtool)" $@; else bash .ci/promtool $@; fi
