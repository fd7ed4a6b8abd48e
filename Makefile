# Every target sets up what it needs: a virtual environment in .venv with the tested versions (constraints.txt).
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Small tensors on few cores: one thread a process is faster than threads that wait for each other.
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2

.PHONY: help demo playground study test test-vllm check format clean

help:
	@echo "make demo       RIL beside Dr.GRPO on fourteen small skills, with ready-made models (runs/demo)"
	@echo "make playground students, teachers and judge of the fourteen skills, trained from nothing (runs/playground)"
	@echo "make study      RIL against what it is built from, with seeds and ablations: at most three hours (runs/study)"
	@echo "make test       the tests"
	@echo "make test-vllm  the tests against a real vLLM server (builds .venv-vllm first)"
	@echo "make check      lint and types"
	@echo "make clean      remove the virtual environments"

$(INSTALLED): pyproject.toml constraints.txt
	@echo "==> making $(VENV) and installing OpenRIL with the tested versions (about two minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	@echo "==> the demo: everything it makes goes to runs/demo; the same command continues an interrupted one"
	$(BIN)/python -m playground.demo --out runs/demo $(ARGS)

playground: $(INSTALLED)
	@echo "==> two students, two teachers and a judge, trained into runs/playground in half an hour to an hour; the same command goes on where it was stopped"
	$(BIN)/python -m playground.models --out runs/playground
	$(BIN)/python -m playground.judge --out runs/playground/judge
	$(BIN)/python -m playground.models --out runs/playground --report

study: $(INSTALLED)
	@echo "==> the study: everything it makes goes to runs/study; the same command goes on where it was stopped"
	$(BIN)/python -m playground.study --out runs/study $(ARGS)

test: $(INSTALLED)
	@echo "==> the tests, on $(WORKERS) workers"
	$(BIN)/python -m pytest -m "not vllm and not gpu" -n $(WORKERS) --dist loadfile $(ARGS)

test-vllm: $(INSTALLED)
	@echo "==> the tests against a real vLLM server on CPU; the first run builds .venv-vllm"
	$(BIN)/python -m pytest tests/vllm_server -m vllm -s $(ARGS)

check: $(INSTALLED)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-vllm .pytest_cache .mypy_cache .ruff_cache
