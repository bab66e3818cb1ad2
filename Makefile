# Two commands: `make demo` and `make test`. Both create .venv and install once; nothing is installed twice.

PYTHON ?= python3
BIN := .venv/bin
# llama.cpp without its image and audio part, which is not used here
export CMAKE_ARGS ?= -DLLAVA_BUILD=OFF
# GCC 12 drops the stores that AMX's tile configuration is loaded from, unless it drops none (docs/log.md, 2026-11-26)
export CXXFLAGS += -fno-tree-dse -fno-dse
PIP := $(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt

.PHONY: demo test test-all check docs gpu gpu-bundle clean

demo: .venv/installed
	$(BIN)/pi-gguf demo --out out/demo

test: .venv/installed-dev
	$(BIN)/pytest -q -n auto --dist loadfile -m "not slow"

test-all: .venv/installed-dev
	$(BIN)/pytest -q -n auto --dist loadfile --durations=25

check: .venv/installed-dev
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy
	@$(MAKE) --no-print-directory docs

# The pages, to read without a network; a dead link or a public name without a docstring ends it
docs: .venv/installed-dev
	@$(BIN)/mkdocs build

# On a machine with a card: what is installed there if nothing was installed here. PARTS, OUT and MINUTES narrow it.
GPU_PYTHON ?= $(if $(wildcard .venv/installed-dev),$(BIN)/python,$(PYTHON))
DEVICE ?= cuda
SCALE ?= full
gpu:
	$(GPU_PYTHON) tools/gpu_campaign.py --device $(DEVICE) --scale $(SCALE) \
		$(if $(PARTS),--parts $(PARTS)) $(if $(OUT),--out $(OUT)) $(if $(MINUTES),--minutes $(MINUTES)) \
		$(if $(WHEELS),--wheels $(WHEELS))

gpu-bundle: .venv/installed-dev
	$(BIN)/python tools/gpu_bundle.py

.venv/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null \
		|| { echo "error: Python 3.11 or newer is needed (set PYTHON=python3.x)"; exit 1; }
	@$(PYTHON) -c 'import venv, ensurepip' 2>/dev/null \
		|| { echo "error: Python's venv module is missing: apt-get install python3-venv"; exit 1; }
	@$(PYTHON) -m venv .venv

.venv/installed: pyproject.toml constraints.txt | .venv/bin/python
	@command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null \
		|| { echo "error: a C++ compiler is needed to build llama.cpp: apt-get install g++"; exit 1; }
	@echo "installing into .venv: a minute for torch and transformers, then about 4 to compile llama.cpp"
	@$(PIP) -e .
	@$(BIN)/python -m pi_gguf.llamacpp.trial works || { echo "so llama.cpp is compiled anew, as pip had kept it from before"; \
		$(PIP) --force-reinstall --no-deps --no-cache-dir llama-cpp-python; }
	@touch $@

.venv/installed-dev: .venv/installed
	@$(PIP) -e .[dev,docs,outsiders]
	@touch $@

clean:
	rm -rf .venv out build *.egg-info
