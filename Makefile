# Each command sets up what it needs: .venv, the dependencies and the compiled kernels.
# A second run does not reinstall; a change in csrc/ recompiles only what it touches.

PYTHON ?= python3
TORCH ?= torch>=2.10
VENV ?= .venv
ARGS ?=

PY := $(VENV)/bin/python
INSTALLED := $(VENV)/.installed
BINARY := d3net_kernels/_C.abi3.so
CSRC := $(shell find csrc -name '*.h' -o -name '*.cpp' -o -name '*.cuh' -o -name '*.cu')

# Here a missing compiler is an error to mend, not a reason to go on with the slow path.
export D3NET_KERNELS_REQUIRE_BINARY := 1

.PHONY: help demo test bench gpu-report lint clean FORCE

help:
	@echo "make demo    train a small separator on a real song, plain torch against fused (minutes)"
	@echo "make test    the tests, without those marked slow"
	@echo "make bench   time networks, D2 blocks and layers against every form of plain torch (half an hour)"
	@echo "make gpu-report   what the GPU kernels need and do, without a GPU, against their budget"
	@echo "make lint    ruff, mypy, clang-format"
	@echo "make clean   remove what was built; .venv stays"
	@echo
	@echo "PYTHON=python3.12         the interpreter .venv is made from (3.10 or newer)"
	@echo "TORCH='torch==2.13.0'     another torch"
	@echo "ARGS='--steps 50'         passed on to the command"

demo: $(BINARY)
	$(VENV)/bin/d3net demo $(ARGS)

test: $(BINARY)
	$(PY) -m pytest -m "not slow" $(ARGS)

bench: $(BINARY)
	$(PY) -m benchmarks.nets
	$(PY) -m benchmarks.threads
	$(PY) -m benchmarks.curves
	$(PY) -m benchmarks.blocks $(ARGS)
	$(PY) -m benchmarks.layers --limit 60 --dtype float32
	@echo "forward and backward under pytest-benchmark: $(PY) -m pytest benchmarks"

gpu-report: $(INSTALLED)
	$(PY) -m tests.gpu.report $(ARGS)

lint: $(INSTALLED)
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .
	$(PY) -m mypy
	$(VENV)/bin/clang-format --dry-run -Werror $(CSRC)

clean:
	rm -rf build dist *.egg-info $(BINARY) demo_output .pytest_cache .mypy_cache .ruff_cache .hypothesis .benchmarks
	find . -name __pycache__ -not -path './$(VENV)/*' -prune -exec rm -rf {} +

$(BINARY): $(CSRC) | $(INSTALLED)
	$(PY) setup.py --quiet build_ext --inplace

# setup.py builds against the torch of .venv, hence no build isolation.
$(INSTALLED): pyproject.toml setup.py $(VENV)/.torch
	$(PY) -m pip install "$(TORCH)" "setuptools>=77" ninja
	$(PY) -m pip install --no-build-isolation --editable ".[demo,bench,dev]"
	@touch $@

# Holds the torch that was asked for, so that asking for another one installs it.
$(VENV)/.torch: FORCE | $(PY)
	@echo "$(TORCH)" | cmp -s - $@ || echo "$(TORCH)" > $@

$(PY):
	@$(PYTHON) -c "import sys; sys.exit(sys.version_info < (3, 10))" || \
	  { echo "$(PYTHON) is missing or older than Python 3.10; name a newer one: make PYTHON=python3.12"; exit 1; }
	@$(PYTHON) -m venv $(VENV) || \
	  { rm -rf $(VENV); echo "$(PYTHON) cannot make a virtual environment; on Debian: apt install python3-venv"; exit 1; }
