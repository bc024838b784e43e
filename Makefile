# Each target works on a fresh machine: it builds .venv from constraints.txt first, once.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
GPU_PYTHON ?= python3
OUT ?= bench/results/gpu
SMALL := tests/test_functional.py tests/test_workspace.py -k "(fused or workspace) and not long"

.DEFAULT_GOAL := help
.PHONY: help demo test families lint bench gpu gpu-sanitize kernel-report clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(READY): setup.py pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt torch
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[all]'
	@touch $@

demo: $(READY) ## score real and corrupted text, rank right and wrong answers (no network)
	$(BIN)/endoreward demo

test: $(READY) ## every test but the families sweep, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile

families: $(READY) ## every causal model type of transformers (minutes); writes docs/families.md
	$(BIN)/python -m pytest -m families

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(READY) ## CPU benchmarks against every alternative, in one run; JSON to bench/results
	$(BIN)/python -m pytest bench/bench_linear.py bench/bench_logits.py
	$(BIN)/python -m bench.plot

gpu: ## every test on the device, then every GPU benchmark; JSON and PNG to OUT. Uses $(GPU_PYTHON)'s own torch
	@$(GPU_PYTHON) -c 'import sys, torch; sys.exit(None if torch.cuda.is_available() else 2)' || \
		{ echo "make gpu: $(GPU_PYTHON) sees no CUDA or ROCm device" >&2; exit 2; }
	$(GPU_PYTHON) -m pytest -q
	$(GPU_PYTHON) -m bench.gpu --output $(OUT)

gpu-sanitize: ## the small kernel tests under compute-sanitizer (minutes)
	@command -v compute-sanitizer > /dev/null || { echo "make gpu-sanitize: compute-sanitizer is not on PATH" >&2; exit 2; }
	compute-sanitizer --tool memcheck --error-exitcode 2 $(GPU_PYTHON) -m pytest -q $(SMALL)
	compute-sanitizer --tool racecheck --error-exitcode 2 $(GPU_PYTHON) -m pytest -q $(SMALL)

kernel-report: $(READY) ## registers, spills, shared memory of every kernel on every architecture
	$(BIN)/python -m bench.kernel_report

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
