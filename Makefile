# Everything a newcomer needs. `make` or `make help` lists the targets.
VENV   ?= .venv
PYTHON ?= python3
BIN    := $(VENV)/bin
# stamp files, one for each dependency group of pyproject.toml that has been installed
RUN    := $(VENV)/.ready-run
EXPORT := $(VENV)/.ready-export
READY  := $(VENV)/.ready-dev
export PATH := $(if $(filter /%,$(VENV)),,$(CURDIR)/)$(BIN):$(PATH)
# exact versions with hashes, as constraints: of the packages in the lock, pip installs only those
# that this platform and this build of torch need
LOCKED := --require-hashes --constraint requirements.lock --build-constraint requirements.lock

.DEFAULT_GOAL := help

help:  ## list these targets
	@grep -hE '^[a-z]+:.*##' $(MAKEFILE_LIST) | sed -E 's/^([a-z]+):.*## */  make \1|/' | column -t -s '|'

$(RUN): pyproject.toml requirements.lock
	@echo "setting up $(VENV) (a minute or two, once)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@# first the locked pip, from its lines in the lock: older versions know neither groups nor $(LOCKED)
	@sed -n '/^pip==/,/[^\\]$$/p' requirements.lock >$(VENV)/locked.txt
	@$(BIN)/python -m pip install --quiet --require-hashes --requirement $(VENV)/locked.txt
	@# then torch, if it is in a folder of wheels (PIP_FIND_LINKS): pip learns the hash of such a file
	@# only when it opens it, and would otherwise prefer the build on PyPI
	@sed -n '/^torch==/,/[^\\]$$/p' requirements.lock >$(VENV)/locked.txt
	@$(BIN)/python -m pip install --quiet --no-index --no-deps --require-hashes \
	  --requirement $(VENV)/locked.txt 2>$(VENV)/locked.log || true
	@$(BIN)/python -m pip install --quiet $(LOCKED) --group run
	@# the command secateur runs the code of the project in which it is called, and outside of projects
	@# the code of this one; the package itself is never installed
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

setup: $(READY) git  ## create .venv with everything that is needed

# DVC stores experiments as commits, so Git needs a user name: if there is none, set one for this
# clone. Without a repository (in an unpacked archive), DVC must be told not to look for one.
git: $(RUN)
	@if test -e .git; then \
	  git config user.name >/dev/null || git config user.name "$${USER:-secateur}"; \
	  git config user.email >/dev/null || git config user.email "$${USER:-secateur}@localhost"; \
	  ! grep -qs no_scm .dvc/config.local || dvc config --local --unset core.no_scm; \
	elif ! grep -qs no_scm .dvc/config.local; then \
	  dvc config --local core.no_scm true; \
	  echo "no Git repository here: pipelines run; for experiments and tests: git init && make setup"; \
	fi

lock: ## update requirements.lock after a change of pyproject.toml; keeps versions if possible
	@$(PYTHON) tools/lock.py

upgrade: ## update requirements.lock to the newest versions that pyproject.toml allows
	@$(PYTHON) tools/lock.py --upgrade

repro: $(RUN) git  ## run the pipelines; skips stages whose inputs have not changed
	@python -m secateur check
	@dvc repro dvc.yaml stages/sensitivity/dvc.yaml

export: $(EXPORT) git  ## export the finetuned network for other runtimes to models/export
	@dvc repro dvc.yaml stages/export/dvc.yaml

# the tests start hundreds of processes: without .pyc files, each would spend a second compiling
test: $(READY)  ## run the tests in parallel
	@PYTHONDONTWRITEBYTECODE= OMP_NUM_THREADS=1 python -m pytest -n auto --dist loadfile --no-loadscope-reorder

check: $(READY)  ## check lint, format and types
	@ruff check .
	@ruff format --check .
	@mypy

format: $(READY)  ## fix lint and format the code
	@ruff check --fix .
	@ruff format .

ui: $(RUN)  ## compare runs in MLflow; prints the address
	-@python -m secateur sync
	@echo "the runs: http://127.0.0.1:5000/#/experiments/1?workflowType=machine_learning"
	@mlflow ui

sync: $(RUN)  ## write runs that are missing in MLflow, from tracked files
	@python -m secateur sync

docs: $(READY)  ## build the documentation into site/, without network
	@NO_MKDOCS_2_WARNING=1 mkdocs build --quiet
	@echo "site/index.html"

.PHONY: help setup git lock upgrade repro export test check format ui sync docs
