# Everything people type, and nothing else. Each target sets up what it needs.
SHELL := /bin/bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

PYTHON ?= python3
VENV ?= .venv
CONSTRAINTS ?= constraints.txt
# the newest Triton that `make test-all` also tries
NEWEST := 3.9
# of `make gpu`, and of `make fuzz`
MINUTES ?= 9
OUT ?= gpu-output
# of `make bench`
BASE ?= HEAD~1

BIN := $(VENV)/bin
STAMP := $(VENV)/installed
FAST := not slow and not gpu
TESTS := tests
PYTEST := $(BIN)/python -m pytest -n 2

.PHONY: help install test lint test-fast test-all versions fuzz demo check compile-matrix profile gpu bench clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1|\2/p' $(firstword $(MAKEFILE_LIST)) | while IFS='|' read -r name text; do \
		printf '  make %-16s %s\n' "$$name" "$$text"; done

$(STAMP): setup.py $(CONSTRAINTS)
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q -c $(CONSTRAINTS) -e '.[test,examples,triton,cli]'
	@touch $@

install: $(STAMP)  ## a virtual environment with the package and its tools

test:  ## install, lint, and the fast tests; needs no GPU
	@trap 'echo "make test: $$SECONDS s"' EXIT; $(MAKE) --no-print-directory lint test-fast

lint: $(STAMP)  ## ruff, mypy and the import contracts
	$(BIN)/ruff check
	$(BIN)/mypy
	$(BIN)/lint-imports --no-cache --no-logo

test-fast: $(STAMP)
	$(PYTEST) -m "$(FAST)" $(TESTS)

test-all: $(STAMP)  ## every test that needs no GPU, by file into docs/test-all.json, and `make versions` on the newest Triton
	$(BIN)/python -m tests.whole
	$(MAKE) --no-print-directory versions VENV=.venv-triton-$(NEWEST) CONSTRAINTS=constraints-triton-$(NEWEST).txt

versions: $(STAMP)  ## what compiles and passes on the versions in VENV, kept in fused_attn/versions.json
	$(BIN)/python -m tests.versions

fuzz: $(STAMP)  ## calls drawn at random against fp64 for MINUTES=9, counted in docs/fuzz.json
	$(BIN)/python -m tests.fuzz --minutes $(MINUTES) --record

demo: $(STAMP)  ## a demonstration in demo-output/
	$(BIN)/fused-attn demo --out demo-output

check: $(STAMP)  ## is the answer right on this machine?
	$(BIN)/fused-attn check

compile-matrix: $(STAMP)  ## compile every kernel for every target, without a GPU, into docs/compile-matrix.json
	$(BIN)/python -m fused_attn compile --matrix --out docs/compile-matrix.json

profile: $(STAMP)  ## the static profile of the default kernels, without a GPU, into docs/profile.json and .md
	$(BIN)/python -m fused_attn compile --profile --matrix --out docs/profile.json

gpu:  ## on a machine with a GPU, installing nothing: tests and timings in OUT=gpu-output, within MINUTES=9
	python3 -m benchmarks.gpu --minutes $(MINUTES) --out $(OUT) $(if $(COMMIT),--commit $(COMMIT))

bench:  ## the working tree's speed beside that of revision BASE=HEAD~1, measured in turns, into OUT/compare.json
	$(if $(wildcard $(BIN)/python),$(BIN)/python,python3) -m benchmarks.compare $(BASE) --out $(OUT)/compare.json

clean:  ## remove virtual environments, caches and what was built; gpu-output/ stays
	rm -rf .venv .venv-* build dist *.egg-info demo-output .pytest_cache .hypothesis .mypy_cache .ruff_cache .benchmarks
	find . -name __pycache__ -prune -exec rm -rf {} +
