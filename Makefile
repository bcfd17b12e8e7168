# Everything needed is set up by the targets themselves; only Python 3.11+, venv and make are assumed.
#   make demo      a tiny model through every stage, with the core dependencies alone
#   make test      format, lint, types and all tests (what CI runs)
#   make bench     the throughput and memory table
#   make golden    manifests of tests/golden rebuilt from GOLDENS (holds mlm, mcore, nemo and vlm: the official tools' outputs)
#   make goldens   every output in GOLDENS converted and compared, as tables

PYTHON  ?= $(shell for p in python3.11 python3.12 python3.13 python3; do \
	$$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
VENV    ?= .venv
CORE    ?= .venv-core
WORKERS ?= 2
GOLDENS ?= $(error say where the official outputs are: make $@ GOLDENS=FOLDER)
BIN     := $(VENV)/bin
PIP     := -m pip install -qq --disable-pip-version-check --constraint constraints.txt
BUILD   := --build-constraint constraints.txt  # pip of the pinned version knows it, that of a new environment need not

.PHONY: demo test check format lint types unit bench golden goldens clean

demo: $(CORE)/.stamp
	$(CORE)/bin/ckptconv demo

test: format-check lint types unit

check: test

format: $(VENV)/.stamp
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

.PHONY: format-check
format-check: $(VENV)/.stamp
	$(BIN)/ruff format --check .

lint: $(VENV)/.stamp
	$(BIN)/ruff check .

types: $(VENV)/.stamp
	$(BIN)/mypy

# At most WORKERS at once; tests that start several ranks share one worker (--dist loadgroup).
unit: $(VENV)/.stamp
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $(WORKERS) --dist loadgroup --durations 15

bench: $(VENV)/.stamp
	$(BIN)/python benchmarks/bench.py

golden: $(VENV)/.stamp
	$(BIN)/python tools/make_manifests.py $(GOLDENS)/mlm
	$(BIN)/python tools/make_vlm_manifests.py $(GOLDENS)/vlm

goldens: $(VENV)/.stamp
	@status=0; \
	$(BIN)/python tools/run_goldens.py $(GOLDENS)/mlm || status=1; \
	$(BIN)/python tools/run_goldens.py $(GOLDENS)/mcore || status=1; \
	$(BIN)/python tools/golden_nemo.py $(GOLDENS)/nemo || status=1; \
	$(BIN)/python tools/golden_vlm.py $(GOLDENS)/vlm || status=1; \
	$(BIN)/python tools/golden_optim.py $(GOLDENS) || status=1; \
	exit $$status

clean:
	rm -rf $(VENV) $(CORE) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis

$(VENV)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python $(PIP) pip
	$(BIN)/python $(PIP) $(BUILD) --editable '.[test]'
	touch $@

$(CORE)/.stamp: pyproject.toml constraints.txt
	$(PYTHON) -m venv $(CORE)
	$(CORE)/bin/python $(PIP) pip
	$(CORE)/bin/python $(PIP) $(BUILD) --editable .
	touch $@
