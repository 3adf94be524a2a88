# Every target can start from a fresh clone: Python 3.11 and the package registry are all it needs.
# bench-gpu needs no registry either, but a GPU, and a Python that has torch, timm and pydantic.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
CROPS ?=
DEVICE ?=
DEMO := demo
FAULTS ?= 20
RECIPE ?=
ROUNDS ?= 100
SEED ?= 0
FLAGS ?=
# PYTHON where it was given, else that of .venv, else python3: for what sets nothing up
AT_HAND = $(if $(filter command environment,$(firstword $(origin PYTHON))),$(PYTHON),$(or $(wildcard $(BIN)/python),python3))

export PATH := $(CURDIR)/$(BIN):$(PATH)

.PHONY: setup demo demo-clean test test-fast soak lint bench bench-gpu test-null-gpu test-ray-versions chaos fuzz clean

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
	$(BIN)/python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations=20 -m "not soak"

test-fast: setup
	$(BIN)/python -m pytest -n 3 --dist loadfile --no-loadscope-reorder -m "not slow and not soak"

# what takes longer: whole runs on clusters that grow, and on GPUs that stand still
soak: setup
	$(BIN)/python -m pytest -m soak tests

lint: setup
	$(BIN)/ruff check datapipe training cluster tests
	$(BIN)/ruff format --check --quiet datapipe training cluster tests
	$(BIN)/mypy

bench: setup
	$(BIN)/python -m tests.bench

# such as RECIPE="pass_vits mine.toml" CROPS=market1501 FLAGS="--minutes 5 --kinds speed --out found.json"
bench-gpu:
	$(AT_HAND) -m tests.bench.gpu $(if $(RECIPE),--recipes $(RECIPE)) $(if $(CROPS),--crops "$(CROPS)") $(FLAGS)

test-null-gpu: setup
	NULL_GPU_CASES=all $(BIN)/python -m pytest tests/null_gpu tests/bench/test_gpu.py

# every night: the tests of the cluster on each Ray from 2.59 to 2.61 that is published, in folders of their own
test-ray-versions: setup
	$(BIN)/python -m tests.ray_versions $(FLAGS)

chaos: setup
	$(BIN)/python -m tests.chaos.chaos --faults $(FAULTS) --seed $(SEED)

# damaged and hostile files for every reader, such as ROUNDS=1000 SEED=7 FLAGS="--readers zip tar --kept faulty"
fuzz: setup
	$(BIN)/python -m tests.fuzz --rounds $(ROUNDS) --seed $(SEED) $(FLAGS)

clean:
	rm -rf $(VENV) $(DEMO)
