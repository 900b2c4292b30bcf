# make help lists the targets.
SHELL := /bin/bash
.DEFAULT_GOAL := help
.PHONY: help setup lint types unit test test-cluster test-faults test-soak demo clean

export OMP_NUM_THREADS ?= 1
PYTHON := .venv/bin/python
# Files of tests at a time: most of them wait for processes that they have started.
JOBS ?= 2
SOURCES := $(wildcard megatron_atum tools tests benchmarks examples setup.py pretrain_atum.py)

help: ## this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1\t\2/p' Makefile | expand -t 20

setup: ## .venv with the pinned packages; does nothing when it is up to date
	@bash tools/setup_env.sh

lint: setup ## ruff: rules and format
	@echo "== ruff check" && $(PYTHON) -m ruff check $(SOURCES)
	@echo "== ruff format --check" && $(PYTHON) -m ruff format --check $(SOURCES)

types: setup ## mypy
	@echo "== mypy" && $(PYTHON) -m mypy

unit: setup ## pytest; ARGS="tests/model -k gate" chooses what
	@echo "== pytest" && $(PYTHON) -m pytest $(ARGS)

test: ## lint, types and all tests
	@bash tools/setup_cluster_tests.sh
	@$(MAKE) --no-print-directory lint
	@$(MAKE) --no-print-directory types
	@$(MAKE) --no-print-directory unit ARGS="-m 'not alone' -n $(JOBS) --dist loadfile $(ARGS)"
	@$(MAKE) --no-print-directory unit ARGS="-m alone $(ARGS)"

test-cluster: setup ## real Slurm, SageMaker's toolkit, hadolint, buildah; as root, else it says what was not run
	@bash tools/setup_cluster_tests.sh
	@$(MAKE) --no-print-directory unit ARGS="tests/launch $(ARGS)"

test-faults: ## seeded kills and resumes, full disks, damaged checkpoints; SEEDS=n kills n times (24)
	@$(MAKE) --no-print-directory unit ARGS="tests/faults $(ARGS)"

test-soak: ## the kills alone, SEEDS=n of them (300); takes about five seconds each
	@SEEDS=$(or $(SEEDS),300) $(MAKE) --no-print-directory unit ARGS="tests/faults/test_kills.py $(ARGS)"

demo: setup ## the main job on real photographs: train TP2 x PP2, kill, resume, export, caption
	@$(PYTHON) examples/tiny/demo.py

clean: ## removes caches; .venv and runs/ stay
	rm -rf build dist *.egg-info .pytest_cache .ruff_cache .mypy_cache
	find . -name __pycache__ -not -path './.venv*' -prune -exec rm -rf {} +
