# Everything a newcomer needs. `make` or `make help` lists the targets.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
READY  := $(VENV)/.ready
export PATH := $(CURDIR)/$(BIN):$(PATH)

.DEFAULT_GOAL := help

help:  ## list these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1|/' | column -t -s '|'

$(READY): pyproject.toml
	@echo "setting up $(VENV) (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install --quiet --upgrade 'pip>=25.1'
	@$(BIN)/python -m pip install --quiet --group dev
	@# the command runs the code that is here: the package itself is never installed
	@printf '#!/bin/sh\nexec "$${0%%/*}/python" -m secateur "$$@"\n' >$(BIN)/secateur
	@chmod +x $(BIN)/secateur
	@# DVC keeps experiments as commits, for which Git needs a name: one for this clone, if none is set
	@git config user.name >/dev/null || git config user.name "$${USER:-secateur}"
	@git config user.email >/dev/null || git config user.email "$${USER:-secateur}@localhost"
	@touch $@

setup: $(READY)  ## make .venv with everything that is needed

repro: $(READY)  ## run the pipelines: what has changed, and nothing else
	@dvc repro --all-pipelines

test: $(READY)  ## run the tests, a process for every processor
	@OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(READY)  ## lint, format and types
	@ruff check .
	@ruff format --check .
	@mypy

format: $(READY)  ## put the code into the project's format
	@ruff check --fix .
	@ruff format .

ui: $(READY)  ## compare runs at http://127.0.0.1:5000
	@mlflow ui

sync: $(READY)  ## write runs that MLflow lacks, from the tracked files
	@python -m secateur sync

docs: $(READY)  ## build the pages and the reference into site/, without network
	@NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo "site/index.html"

.PHONY: help setup repro test check format ui sync docs
