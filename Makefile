# Two commands do everything on a fresh machine: make run, make test. Only Python 3.11 and make are assumed.
SHELL := /bin/bash
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
GENERATE := .retinue/generate
PROTOS := $(shell find protos -name '*.proto' | sort)
export PYTHONDONTWRITEBYTECODE := # compiled modules are kept: tests start hundreds of processes

.DEFAULT_GOAL := help
.PHONY: help setup setup-dev run demo test etcd kubernetes generate check-generated proto lint types contract faults e2e bench bench-profile bench-elections bench-scatter bench-ambassador bench-adapter check lock clean

help: ## Shows this help
	@awk -F ':.*## ' '/^[a-z0-9-]+:.*## / { printf "  \033[1m%-16s\033[0m %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

$(VENV)/.run: services/requirements-run.txt services/pyproject.toml clients/python/pyproject.toml
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11) and "cannot set up: Python 3.11 or later is needed; say which with make PYTHON=python3.11")'
	@echo "setting up $(VENV) (once, about half a minute) ..."
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -q --require-hashes -r services/requirements-run.txt
	@$(BIN)/python -m pip install -q --no-deps --no-build-isolation -e clients/python -e services
	@$(BIN)/python -m compileall -q services/retinue_server clients/python/retinue  # starts take twice as long without
	@touch $@

$(VENV)/.dev: $(VENV)/.run tests/requirements.txt
	@echo "installing the test tools ..."
	@$(BIN)/python -m pip install -q --require-hashes -r tests/requirements.txt
	@touch $@

setup: $(VENV)/.run ## Makes .venv from the pinned requirements
setup-dev: $(VENV)/.dev

generate: ## Regenerates the stubs of every language whose tools are here
	@clients/generate.sh

check-generated: ## Fails if the committed stubs differ from what the protos give, or fail under the oldest runtimes
	@clients/generate.sh --check
	@cd clients/python && for stub in $$(find retinue -name '*_pb2_grpc.py' | sed 's/\.py$$//' | tr / .); do \
	  ../../$(GENERATE)/bin/python -W error -c "import $$stub" || exit 1; done
	@cd services && for stub in $$(find retinue_server -name '*_pb2_grpc.py' | sed 's/\.py$$//' | tr / .); do \
	  ../$(GENERATE)/bin/python -W error -c "import $$stub" || exit 1; done

run: $(VENV)/.run ## Starts the whole suite on loopback and prints lines to try, until Ctrl-C
	@exec $(BIN)/python deploy/local/run.py

DEMO ?= workqueue adapter
demo: $(VENV)/.run ## Shows patterns on real input (DEMO=pattern for one)
	@for demo in $(DEMO); do $(BIN)/python deploy/demo/$$demo.py || exit 1; done

PARALLEL := -n 4 --dist worksteal # also on two cores: tests wait about as long as they compute

etcd: $(VENV)/.dev
	@PYTHONPATH=tests $(BIN)/python -m support.etcd  # once, for minutes; no test waits for it

test: $(VENV)/.dev etcd ## Runs the tests (unit, engines, contract, faults)
	@$(BIN)/python -m pytest -q $(PARALLEL) $(PYTEST)

kubernetes: $(VENV)/.dev ## Builds a real API server; `make test` then tries the engine kubernetes on it, too (a quarter of an hour)
	@PYTHONPATH=tests $(BIN)/python -m support.kubernetes.build

contract: $(VENV)/.dev ## Runs the conformance suite against TARGET=host:port (CONTROL=unix:PATH for operators; LEAVES=host:port: tests/contract/pools.py)
	@$(BIN)/python -m pytest -q tests/contract $(if $(TARGET),--target $(TARGET)) $(if $(CONTROL),--control $(CONTROL)) $(if $(LEAVES),--leaves $(LEAVES)) $(PYTEST)

e2e: $(VENV)/.dev etcd ## Runs pods, the clients of every language and the printed lines
	@$(BIN)/python -m pytest -q tests/e2e $(PYTEST)

FAULTS := $(if $(LONG),--kills 200 --tasks 100000,--kills 20 --tasks 5000)
ELECTIONS := $(if $(LONG),--transitions 200,--transitions 10 --seconds 20)
SCATTERS := --seconds $(if $(LONG),600,30)
AMBASSADORS := --seconds $(if $(LONG),300,20)

faults: $(VENV)/.dev etcd ## Kills things while they work, and looks what is left (LONG=1: 200 kills over 100,000 tasks, 200 transitions of elections, ten minutes of scatter/gather and of the ambassador; SEED=n; SCHEDULES=1000000: so many simulated worlds)
	@$(BIN)/python -m pytest -q tests/faults $(if $(SCHEDULES),--schedules $(SCHEDULES) -n auto) $(PYTEST)
	@export PYTHONPATH=tests:services:clients/python; for engine in sqlite postgres; do \
	  $(BIN)/python -m support.faults --engine $$engine $(FAULTS) $(if $(SEED),--seed $(SEED)) || exit 1; done; \
	  $(BIN)/python -m support.faults.held --seconds $(if $(LONG),600,60) || exit 1; \
	  for engine in $$($(BIN)/python -m support.election_faults --list); do \
	  $(BIN)/python -m support.election_faults --engine $$engine $(ELECTIONS) $(if $(SEED),--seed $(SEED)) || exit 1; done; \
	  $(BIN)/python -m support.scatter_faults $(SCATTERS) $(if $(SEED),--seed $(SEED)) || exit 1; \
	  $(BIN)/python -m support.ambassador_faults $(AMBASSADORS) $(if $(SEED),--seed $(SEED))

bench: $(VENV)/.dev ## Plays the scoreboard beside the peers (CELLS="process" SYSTEMS="retinue bullmq" ROUNDS=5 TASKS=60000)
	@PYTHONPATH=tests $(BIN)/python -m bench $(if $(CELLS),--cells $(CELLS)) $(if $(SYSTEMS),--systems $(SYSTEMS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(TASKS),--tasks $(TASKS)) $(if $(REFERENCE),--reference)

bench-profile: $(VENV)/.dev ## Shows where server, producer and worker spend their time in a cell (CELL=process TASKS=60000)
	@PYTHONPATH=tests $(BIN)/python -m bench.profile $(or $(CELL),process) $(if $(TASKS),--tasks $(TASKS))

bench-elections: $(VENV)/.dev etcd ## Measures leader election beside etcd and client-go (CELLS="handover many" ROUNDS=3)
	@PYTHONPATH=tests $(BIN)/python -m bench.elections $(if $(CELLS),--cells $(CELLS)) $(if $(SYSTEMS),--systems $(SYSTEMS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(REFERENCE),--reference)

bench-scatter: $(VENV)/.dev ## Measures scatter/gather beside a bare loop and Node, with slow leaves and too many requests (CELLS="overhead_32 tree" ROUNDS=3)
	@PYTHONPATH=tests $(BIN)/python -m bench.scatter $(if $(CELLS),--cells $(CELLS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(REFERENCE),--reference)

bench-ambassador: $(VENV)/.dev ## Measures hops through the ambassador beside nutcracker, HAProxy and Envoy by hand (CELLS="memcached_get_64 http" ROUNDS=3)
	@PYTHONPATH=tests $(BIN)/python -m bench.ambassador $(if $(CELLS),--cells $(CELLS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(REFERENCE),--reference)

bench-adapter: $(VENV)/.dev ## Measures the adapter: scrapes, CPU per series beside prometheus_client, StatsD, hung apps, watchers (CELLS="scrapes cost" ROUNDS=3)
	@PYTHONPATH=tests $(BIN)/python -m bench.adapter $(if $(CELLS),--cells $(CELLS)) $(if $(ROUNDS),--rounds $(ROUNDS)) $(if $(REFERENCE),--reference)

proto: $(VENV)/.dev ## Lints and formats the contract, and compares it with the last release
	@$(BIN)/buf lint
	@$(BIN)/buf format -d --exit-code
	@tag=$$(git describe --tags --abbrev=0 --match 'v*' 2>/dev/null); \
	  if [ -n "$$tag" ]; then $(BIN)/buf breaking --against ".git#tag=$$tag"; \
	  else echo "buf breaking: no release yet to compare with"; fi

lint: $(VENV)/.dev ## ruff, shell and import walls
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/lint-imports

types: $(VENV)/.dev ## mypy --strict
	@$(BIN)/mypy

check: proto lint types check-generated test e2e ## All that CI runs

lock: $(VENV)/.dev ## Compiles the pinned requirements anew, with hashes and without index addresses
	@for f in services/requirements services/requirements-run tests/requirements clients/python/requirements-generate deploy/image/requirements-build services/retinue_server/ambassador/engines/envoy/requirements-descriptors; do \
	  $(BIN)/uv pip compile --python-version 3.11 --universal -q --generate-hashes --no-header $$f.in -o $$f.txt; done

clean: ## Removes what was set up and all local state
	@rm -rf $(VENV) .retinue clients/node/node_modules clients/node/dist
