# Each target works on a fresh machine: it builds .venv first, once. `demo` needs the package alone, the others all extras.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# Of `make test`; empty: all.
TESTS ?=
# What depends on the versions of PyTorch, Triton and transformers, less what names model types of newer transformers.
FLOOR_TESTS := tests/vocab/test_ops.py tests/test_face_tensors.py tests/scoring tests/model/test_model.py tests/model/test_own_loop.py \
  tests/model/test_loading.py tests/text/test_chat.py tests/text/test_boundary.py
# Where there is a GPU: a Python that already has torch with CUDA, pytest and this package's dependencies. Nothing is fetched.
GPU_PYTHON ?= python3
OUT ?= bench/results/gpu
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --constraint $(CONSTRAINTS)

.DEFAULT_GOAL := help
.PHONY: help demo test floors families lint package bench sweep paper scale gpu gpu-sanitize kernel-report clean

help: ## this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(CORE): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed")'
	@echo 'Installing PyTorch, transformers and this package into $(VENV), once. PyTorch with CUDA is up to 2.7 GB to'
	@echo 'download, its CPU build 0.2 GB: README.md, Install, has the line for that.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(INSTALL) --editable .
	@touch $@

$(READY): $(CORE)
	@echo 'Installing what tests, lint and benchmarks need into $(VENV), once: up to 0.5 GB to download.'
	$(INSTALL) --editable '.[all]'
	@touch $@

demo: $(CORE) ## score real and corrupted text, rank right and wrong answers (no network)
	$(BIN)/endoreward demo

test: $(READY) ## every test but the families sweep, one process a core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(TESTS)

floors: ## tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TESTS='$(FLOOR_TESTS)'

families: $(READY) ## every causal model type of transformers (minutes); writes docs/families.md
	$(BIN)/python -m pytest -m families

lint: $(READY) ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: $(READY) ## build sdist and wheel, use both outside of the repository
	$(BIN)/python tools/check_package.py

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
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/docs docs site

clean: ## remove .venv and caches
	rm -rf $(VENV) .venv-oldest build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
