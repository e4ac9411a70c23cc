# Two commands do everything on a fresh machine: `make train` and `make test`. See README.md.
#   TORCH=torch==2.13.0   the PyTorch to install (default: the one that python3 has, if >= 2.6, else the newest)
#   DATA=DIR EPOCHS=N     passed on to the training
PYTHON ?= python3
VENV ?= .venv
TORCH ?=
DATA ?=
EPOCHS ?=
OUT ?= runs/mnist
# CUDA is compiled where a GPU is; CNN_EXT_CUDA=on|off|auto decides otherwise.
export CNN_EXT_CUDA ?= $(if $(wildcard /dev/nvidia0),auto,off)

BIN := $(VENV)/bin
# A process for each core, a module of tests at a time, for its fixtures are shared.
PYTEST := $(BIN)/python -m pytest -q -n auto --maxprocesses=8 --dist loadscope
SOURCES := $(shell find csrc cmake -type f) CMakeLists.txt setup.py pyproject.toml $(wildcard benchmarks/results/rows_cuda.json)
COMPUTE_SANITIZER := $(firstword $(shell command -v compute-sanitizer) $(wildcard /usr/local/cuda/bin/compute-sanitizer))

.PHONY: help train test test-all test-cuda install bench report lint kernel-check cuda-resources sizes clean

help:  ## this list
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/\1\t\2/p' $(MAKEFILE_LIST) | expand -t 16

train: $(VENV)/.installed  ## train the lecture's CNN; results in $(OUT)
	$(BIN)/cnn-ext train --out $(OUT) $(if $(DATA),--data-dir $(DATA)) $(if $(EPOCHS),--epochs $(EPOCHS))

test: $(VENV)/.installed  ## the test suite
	$(if $(DATA),CNN_EXT_DATA=$(DATA)) $(PYTEST)

test-all: $(VENV)/.installed  ## also what takes minutes: every CUDA kernel on every case without a GPU, and builds with sanitizers
	$(if $(DATA),CNN_EXT_DATA=$(DATA)) $(PYTEST) --everything

test-cuda: $(VENV)/.installed  ## on a machine with a GPU: the test suite, then every kernel under compute-sanitizer where it exists
	$(BIN)/python -c 'import sys, torch; sys.exit(0 if torch.cuda.is_available() else "test-cuda: torch sees no GPU on this machine")'
	$(if $(DATA),CNN_EXT_DATA=$(DATA)) $(PYTEST)
	$(foreach tool,$(if $(COMPUTE_SANITIZER),memcheck racecheck initcheck synccheck),PYTORCH_NO_CUDA_MEMORY_CACHING=1 $(COMPUTE_SANITIZER) --tool $(tool) \
	  --target-processes all --error-exitcode 9 $(BIN)/python -m pytest -q tests/test_kernels.py -k _sm &&) \
	echo "compute-sanitizer: $(or $(COMPUTE_SANITIZER),not found)"

install: $(VENV)/.installed  ## the virtual environment with the package in it

bench: $(VENV)/.installed  ## every benchmark, against torch; results in benchmarks/results
	$(BIN)/python -m benchmarks all

report: $(VENV)/.installed  ## write the results in benchmarks/results into the README
	$(BIN)/python -m benchmarks report

kernel-check:  ## every CPU kernel against the naive one, without Python or torch
	cmake -S . -B build/kernel-check -G Ninja -DCNN_EXT_PYTHON=OFF -DCNN_EXT_CUDA=off -DCNN_EXT_KERNEL_CHECK=ON
	cmake --build build/kernel-check
	build/kernel-check/kernel_check tests/cases/conv2d.csv tests/cases/pool2d.csv

cuda-resources:  ## registers, shared memory and spills of every CUDA kernel, as the compiler reports them
	cmake -S . -B build/cuda -G Ninja -DCNN_EXT_PYTHON=OFF -DCNN_EXT_CUDA=on
	cmake --build build/cuda --target cuda_resources

lint: $(VENV)/.installed  ## formatters and linters, as pre-commit runs them
	$(BIN)/pip install -q -e '.[dev]'
	$(BIN)/pre-commit run --all-files

sizes:  ## lines of every source file, the longest last
	@git ls-files '*.py' '*.cpp' '*.h' '*.inl' '*.cu' '*.cuh' | xargs wc -l | sort -n

clean:  ## remove everything that was built
	rm -rf $(VENV) build *.egg-info compile_commands.json
	find cnn_ext -name '*.so' -delete

# The environment sees the packages of $(PYTHON), by a .pth file, where those include a PyTorch that serves: a .pth also works when $(PYTHON)
# itself belongs to a virtual environment, where --system-site-packages would look past it.
$(BIN)/python:
	$(PYTHON) -m venv $(VENV)
	@if [ -z "$(TORCH)" ] && $(PYTHON) -c 'import torch; assert tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)' 2>/dev/null; then \
	  echo "using the PyTorch of $(PYTHON)"; \
	  $(PYTHON) -c 'import os, torch; print(os.path.dirname(os.path.dirname(torch.__file__)))' \
	    > "$$($(BIN)/python -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/outer-packages.pth"; \
	else \
	  echo "installing $(or $(TORCH),the newest PyTorch)"; \
	  $(BIN)/pip install $(foreach package,$(or $(TORCH),torch>=2.6),'$(package)'); \
	fi || { rm -rf $(VENV); exit 1; }

$(VENV)/.installed: $(BIN)/python $(SOURCES)
	$(BIN)/pip install -e '.[test]'
	@cat cnn_ext/_build_summary.txt
	$(BIN)/python -m cnn_ext.info
	@touch $@
