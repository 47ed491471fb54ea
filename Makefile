# Two commands do everything on a fresh machine: make run, make test. Only Python 3.11 and make are assumed.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GENERATE := .retinue/generate
PROTOS := $(shell find protos -name '*.proto' | sort)

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run demo test generate check-generated proto lint types walls contract faults e2e bench check lock clean

help: ## Shows this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.run: services/requirements-run.txt services/pyproject.toml clients/python/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cannot set up: Python 3.11 or later is needed; say which with make PYTHON=python3.11")'
	@echo "setting up $(VENV) (once, about half a minute) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --require-hashes -r services/requirements-run.txt
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e clients/python -e services
	@touch $@

$(VENV)/.dev: $(VENV)/.run tests/requirements.txt
	@echo "installing the test tools ..."
	@$(BIN)/python -m pip install -q --require-hashes -r tests/requirements.txt
	@touch $@

setup: $(VENV)/.run ## Makes .venv from the pinned requirements
setup-dev: $(VENV)/.dev

generate: ## Regenerates the stubs of every language whose tools are here
	@clients/generate.sh

check-generated: ## Fails if the committed stubs differ from what the protos give
	@clients/generate.sh --check
