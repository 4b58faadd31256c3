# Everything sets itself up: `make demo` and `make test` work on a fresh clone with Python 3.11, a C++ compiler and a package index.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DOCS := .venv-docs

.PHONY: setup browser demo test quick thorough bench gpu docs lint types check

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install --quiet --upgrade -c constraints.txt pip setuptools
	$(BIN)/pip install --quiet -c constraints.txt torch
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev]'
	touch $@

demo: setup
	$(BIN)/vdcache demo

# The pages are looked at in Chromium, where it can be had; without it those tests are skipped.
browser:
	@command -v chromedriver >/dev/null || ! command -v apt-get >/dev/null || [ "$$(id -u)" != 0 ] || \
	  (apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium chromium-driver >/dev/null) || true

test: setup browser
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal

# Tests of graphs and policies alone, in less than a minute: those that compile whole models are left out.
COMPILING := passes/test_block_lists passes/test_emit_attention passes/test_filters passes/test_mark_lanes passes/test_mark_output \
  passes/test_probe passes/test_split_at_probe passes/test_tile_attention passes/test_watching patterns/test_match policies/test_simulate policies/test_thresholds
quick: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist worksteal tests/patterns tests/passes tests/ir tests/policies \
	  $(COMPILING:%=--ignore=tests/%.py)

# The full counts of what the tests sample, and the tests marked thorough: more than an hour on two cores.
thorough: setup browser
	OMP_NUM_THREADS=1 VDCACHE_THOROUGH=1 $(BIN)/python -m pytest -n auto --dist worksteal
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.thorough --json bench/results/thorough.json
	OMP_NUM_THREADS=1 VDCACHE_HISTORIES=1000 $(BIN)/python -m pytest -q tests/pipelines/test_histories.py

# Where there is a GPU: what vdcache does on it, and the tests that need one. It uses the Python that has CUDA's torch.
gpu:
	$(PYTHON) -m bench.gpu_session --out bench/results/gpu
	$(PYTHON) -m pytest -q tests/gpu

# Each script answers one question and writes its rows.
bench: setup
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev,bench]'
	for question in steps compile_time outlined calibrating passes analysis coverage demo moreg profilingdit solvers peers methods second tiles schedules export mutation; do \
	  $(BIN)/python -m bench.$$question --json bench/results/$$question.json || exit 1; done

# The documentation as a site in site/, which opens from the disk: site/index.html. vdcache is read, not imported, so this
# environment holds the extra `docs` alone: no torch, and not vdcache itself.
docs: $(DOCS)/.ready
	NO_MKDOCS_2_WARNING=1 PATH="$(CURDIR)/$(DOCS)/bin:$$PATH" $(DOCS)/bin/mkdocs build --quiet --strict

$(DOCS)/.ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(DOCS)
	$(DOCS)/bin/pip install --quiet -c constraints.txt \
	  $$($(PYTHON) -c 'import tomllib; print(*tomllib.load(open("pyproject.toml", "rb"))["project"]["optional-dependencies"]["docs"])')
	touch $@

lint: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m tests.support.words

types: setup
	$(BIN)/pip install --quiet -c constraints.txt --no-build-isolation -e '.[dev,types]'
	$(BIN)/mypy
	$(BIN)/basedpyright

check: lint types test
