# One vocabulary for people, hooks and CI. `make help` lists it.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
CONSTRAINTS ?= requirements/tested.txt
PIP := $(BIN)/python -m pip install --disable-pip-version-check -q $(if $(CONSTRAINTS),-c $(CONSTRAINTS))
INPUTS := setup.cfg pyproject.toml $(CONSTRAINTS)
BENCH ?=
CHAOS ?=

.DEFAULT_GOAL := help
.PHONY: help setup demo test lint types test-all test-slurm beside bench chaos docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

$(BIN)/python:
	@$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), f"Python 3.11 or newer is needed, this is {sys.version}; make PYTHON=python3.12 ..."'
	$(PYTHON) -m venv $(VENV)

$(VENV)/.installed-demo: $(BIN)/python $(INPUTS)
	$(PIP) -e '.[vlm,report]'
	@touch $@

$(VENV)/.installed-dev: $(BIN)/python $(INPUTS)
	$(PIP) -e '.[vlm,report,onnx,openclip,dev]'
	@touch $@ $(VENV)/.installed-demo

$(VENV)/.installed-bench: $(VENV)/.installed-dev
	$(PIP) -e '.[vlm,report,onnx,openclip,dev,bench]'
	@touch $@

setup: $(VENV)/.installed-dev  ## everything for working on sslvit, in .venv

demo: $(VENV)/.installed-demo  ## the whole story on built-in scenes, into runs/demo
	$(BIN)/sslvit demo --output-dir runs/demo

test: $(VENV)/.installed-dev  ## the tests
	$(BIN)/python -m pytest -m 'not slow and not gpu'

test-all: $(VENV)/.installed-dev beside  ## the tests with the long ones, at the oldest libraries too
	$(BIN)/python -m pytest --timeout 3600

test-slurm: $(VENV)/.installed-dev  ## eight interruptions on a real Slurm of two nodes, brought up here (root; Debian)
	$(BIN)/python tests/slurm_lab.py install
	$(BIN)/python -m pytest tests/test_slurm.py -m slow --timeout 1200

# Environments that see .venv's packages, with some of their own in front. Without a package index their tests skip.
beside: $(VENV)-oldest/.installed $(VENV)-downstream/.installed

$(VENV)-%/.installed: requirements/%.txt $(VENV)/.installed-dev
	$(BIN)/python -m venv $(VENV)-$*
	@where='import sysconfig; print(sysconfig.get_path("purelib"))'; \
	$(BIN)/python -c "$$where" > "$$($(VENV)-$*/bin/python -c "$$where")/beside.pth"
	@$(VENV)-$*/bin/python -m pip install --disable-pip-version-check -q -r $< && touch $@ || \
	{ rm -rf $(VENV)-$*; echo 'skipped: $< cannot be installed here; its tests will skip'; }

lint: $(VENV)/.installed-dev  ## ruff
	$(BIN)/ruff check . && $(BIN)/ruff format --check .

types: $(VENV)/.installed-dev  ## mypy
	$(BIN)/mypy

bench: $(VENV)/.installed-bench  ## the benchmarks, or one: make bench BENCH=linear_probe
	$(BIN)/python -m benchmarks $(BENCH)

$(VENV)/.installed-docs: $(BIN)/python $(INPUTS)
	$(PIP) -e '.[docs]'
	@touch $@

docs: $(VENV)/.installed-docs  ## the pages as a site, into site/
	$(BIN)/mkdocs build --strict -q
	@echo site/index.html

chaos: $(VENV)/.installed-dev  ## all faults, one table; goes on where it was (make chaos CHAOS=--quick: five minutes)
	$(BIN)/python benchmarks/chaos.py $(or $(CHAOS),--json benchmarks/results/chaos.json)

clean:  ## remove what was built, not what was trained
	rm -rf build dist site *.egg-info .pytest_cache .ruff_cache .mypy_cache
