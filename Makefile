# Every target can start from a fresh clone: Python 3.11 and the package registry are all it needs.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CROPS ?=
DEVICE ?=
DEMO := demo
FAULTS ?= 20
SEED ?= 0

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo demo-clean test test-fast lint bench chaos clean

setup: $(READY)

$(READY): pyproject.toml constraints.txt
	@echo "== setting up $(VENV): about 6 GB of packages, 2-5 minutes =="
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt pip setuptools wheel
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-build-isolation --editable ".[dev]"
	@echo "== starting DeepSpeed once =="
	$(BIN)/python -m training warm
	@touch $(READY)

demo: setup
	$(BIN)/python -m cluster demo --out $(DEMO) $(if $(CROPS),--crops "$(CROPS)") $(if $(DEVICE),--device $(DEVICE))

demo-clean:
	rm -rf $(DEMO)

test: setup lint
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder

test-fast: setup
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder -m "not slow"

lint: setup
	$(BIN)/ruff check datapipe training cluster tests
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench

chaos: setup
	$(BIN)/python -m tests.faults.chaos --faults $(FAULTS) --seed $(SEED)

clean:
	rm -rf $(VENV) $(DEMO)
