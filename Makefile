# Everything a newcomer needs. `make` or `make help` lists the targets.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# one stamp for each dependency group of pyproject.toml that has been installed
RUN    := $(VENV)/.ready-run
EXPORT := $(VENV)/.ready-export
READY  := $(VENV)/.ready-dev
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(BIN):$(PATH)
# exact versions with hashes: as constraints, so that of the packages in the lock only those are
# installed that this platform and this build of torch need
LOCKED := --require-hashes --constraint requirements.lock --build-constraint requirements.lock

.DEFAULT_GOAL := help

help:  ## list these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1|/' | column -t -s '|'

$(RUN): pyproject.toml requirements.lock
	@echo "setting up $(VENV) (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# first the locked pip, by its own lines of the lock: an older one knows neither groups nor $(LOCKED)
	@sed -n '/^pip==/,/[^\\]$$/p' requirements.lock >$(VENV)/locked.txt
	@$(BIN)/python -m pip install --quiet --require-hashes --requirement $(VENV)/locked.txt
	@# then torch, if it is in a folder of wheels (PIP_FIND_LINKS): pip knows the hash of a file there
	@# only after opening it, and would prefer the build of PyPI
	@sed -n '/^torch==/,/[^\\]$$/p' requirements.lock >$(VENV)/locked.txt
	@$(BIN)/python -m pip install --quiet --no-index --no-deps --require-hashes \
	  --requirement $(VENV)/locked.txt 2>$(VENV)/locked.log || true
	@$(BIN)/python -m pip install --quiet $(LOCKED) --group run
	@# the command runs the code of the project it is called in, and elsewhere that of this one: the
	@# package itself is never installed
	@printf '%s\n' '#!/bin/sh' 'project=$$PWD' \
	  'until [ -f "$$project/secateur/__main__.py" ] || [ -z "$$project" ]; do' \
	  '  project=$${project%/*}' 'done' \
	  "[ -n \"\$$project\" ] || project='$(CURDIR)'" \
	  'export PYTHONPATH="$$project$${PYTHONPATH:+:$$PYTHONPATH}"' \
	  'exec "$${0%/*}/python" -m secateur "$$@"' >$(BIN)/secateur
	@chmod +x $(BIN)/secateur
	@touch $@

$(VENV)/.ready-%: $(RUN)
	@echo "installing group $* into $(VENV)"
	@$(BIN)/python -m pip install --quiet $(LOCKED) --group $*
	@touch $@

setup: $(READY) git  ## make .venv with everything that is needed

# DVC keeps experiments as commits, for which Git needs a name: one for this clone, if none is set.
# Without a repository (an unpacked archive) DVC must be told not to look for one.
git: $(RUN)
	@if test -e .git; then \
	  git config user.name >/dev/null || git config user.name "$${USER:-secateur}"; \
	  git config user.email >/dev/null || git config user.email "$${USER:-secateur}@localhost"; \
	  ! grep -qs no_scm .dvc/config.local || dvc config --local --unset core.no_scm; \
	elif ! grep -qs no_scm .dvc/config.local; then \
	  dvc config --local core.no_scm true; \
	  echo "no Git repository here: pipelines run; for experiments and tests: git init && make setup"; \
	fi

lock: ## write requirements.lock after a change of pyproject.toml; versions stay where they can
	@$(PYTHON) tools/lock.py

upgrade: ## write requirements.lock with the newest versions that pyproject.toml allows
	@$(PYTHON) tools/lock.py --upgrade

repro: $(RUN) git  ## run the pipelines: what has changed, and nothing else
	@python -m secateur check
	@dvc repro dvc.yaml stages/sensitivity/dvc.yaml

export: $(EXPORT) git  ## write the finetuned network for other runtimes: models/export
	@dvc repro dvc.yaml stages/export/dvc.yaml

# hundreds of processes start in the tests, and a second of each goes into compiling what is not kept
test: $(READY)  ## run the tests, in parallel
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(READY)  ## lint, format and types
	@ruff check .
	@ruff format --check .
	@mypy

format: $(READY)  ## put the code into the project's format
	@ruff check --fix .
	@ruff format .

ui: $(RUN)  ## compare runs in MLflow, at the address that it prints
	-@python -m secateur sync
	@echo "the runs: http://127.0.0.1:5000/#/experiments/1?workflowType=machine_learning"
	@mlflow ui

sync: $(RUN)  ## write runs that MLflow lacks, from the tracked files
	@python -m secateur sync

docs: $(READY)  ## build the pages and the reference into site/, without network
	@NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo "site/index.html"

.PHONY: help setup git lock upgrade repro export test check format ui sync docs
