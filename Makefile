# Each target is a line or two over a command that also works by itself.
.DEFAULT_GOAL := help
.PHONY: help up down serve test lock upgrade check up-venv down-venv lock-venv

PYTHON ?= python3

# compose reads .env by itself; here is the same for what runs without it. As there, the environment comes first.
dotenv = $(shell sed -n 's/^$(1)=["'\'']\{0,1\}\([^"'\'' ]*\).*/\1/p' .env 2>/dev/null | tail -n 1)
BIND := $(or $(BIND),$(call dotenv,BIND),127.0.0.1)
PORT := $(or $(PORT),$(call dotenv,PORT),5000)
PYTHON_IMAGE := $(or $(PYTHON_IMAGE),$(call dotenv,PYTHON_IMAGE),$(shell sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile))
export PYTHON_IMAGE

# Conditions, as the shell's `if` takes them.
ENGINE := docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1
BASE := { docker image inspect "$(PYTHON_IMAGE)" >/dev/null 2>&1 || docker pull "$(PYTHON_IMAGE)" 2>/dev/null; }
NO_ENGINE := No Docker Engine answers
NO_BASE := The base image $(PYTHON_IMAGE) can neither be found nor pulled

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-9s %s\n", $$1, $$2 }' Makefile

up: ## build, start, wait until healthy, print the address; without Docker, serve from .venv in the background
	@if ! { $(ENGINE); }; then echo "$(NO_ENGINE): serving from a virtual environment instead."; $(MAKE) -s up-venv; \
	elif ! $(BASE); then echo "$(NO_BASE): serving from a virtual environment instead."; $(MAKE) -s up-venv; \
	else docker compose up --build --wait && echo "http://$$(docker compose port web 5000)"; fi

down: down-venv ## stop and remove what `make up` started
	@if $(ENGINE); then docker compose down; fi

serve: export WAITRESS_LISTEN = $(BIND):$(PORT)
serve: .venv/runtime ## serve from .venv in the foreground
	.venv/bin/python serve.py

test: .venv/dev ## run every test that this machine can run; REQUIRE_DOCKER=1 fails those that lack Docker
	.venv/bin/pytest

lock: ## pin what the requirements files ask for
upgrade: ## pin the newest releases that the requirements files allow
upgrade: PIP_COMPILE_OPTIONS := --upgrade
lock upgrade:
	@if ! { $(ENGINE); }; then echo "$(NO_ENGINE): locking with $(PYTHON) instead."; $(MAKE) -s lock-venv; \
	elif ! $(BASE); then echo "$(NO_BASE): locking with $(PYTHON) instead."; $(MAKE) -s lock-venv; \
	else docker build --target lock --no-cache-filter pins --output . \
	    --build-arg PYTHON_IMAGE --build-arg PIP_COMPILE_OPTIONS='$(PIP_COMPILE_OPTIONS)' .; fi

check: .venv/dev ## lint Python, Dockerfile and shell; fail if a lock is not what its .in file asks for
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/hadolint Dockerfile
	@if command -v shellcheck; then shellcheck .ci/*; else echo "shellcheck is not installed: .ci goes unchecked"; fi
	@fresh=$$(mktemp -d) && trap 'rm -rf "$$fresh"' EXIT && cp pyproject.toml requirements*.in requirements*.txt "$$fresh" \
	    && pip_compile="$(CURDIR)/.venv/bin/pip-compile --quiet" && (cd "$$fresh" && $(PIP_COMPILE)) \
	    && for lock in requirements*.txt; do diff "$$lock" "$$fresh/$$lock" \
	        || { echo "$$lock is not what its .in file asks for; run: make lock" >&2; exit 1; }; done

# --- Without Docker ---------------------------------------------------------------------------------------------------

# Two locks, in this order: the second is constrained by the first.
PIP_COMPILE := $$pip_compile && $$pip_compile requirements-dev.in
PIP_INSTALL := .venv/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary=:all:

# Anew for each new lock, so that nothing stays that the lock no longer has.
.venv/runtime: requirements.txt
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))' \
	    || { echo "$(PYTHON) is not Python 3.11 or later; name one that is: make PYTHON=python3.14" >&2; exit 1; }
	$(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) --requirement requirements.txt
	@touch $@

.venv/dev: .venv/runtime requirements-dev.txt
	$(PIP_INSTALL) --requirement requirements-dev.txt
	@touch $@

# The log says when it listens: a probe alone might ask something else on that port. 300 times 0.1 s, then it is not to be.
up-venv: export WAITRESS_LISTEN = $(BIND):$(PORT)
up-venv: down-venv .venv/runtime
	@nohup .venv/bin/python serve.py >.serve.log 2>&1 </dev/null & \
	pid=$$!; echo "$$pid" >.serve.pid; tries=300; \
	until grep -q 'Serving on' .serve.log || ! kill -0 "$$pid" 2>/dev/null || [ "$$tries" = 0 ]; do \
	    tries=$$((tries - 1)); sleep 0.1; done; \
	if grep -q 'Serving on' .serve.log && .venv/bin/python -IS healthcheck.py >>.serve.log; then echo "http://$(BIND):$(PORT)"; \
	else cat .serve.log >&2; $(MAKE) -s down-venv; exit 1; fi

# By number and name: the number alone may be another process's by now. 10 s at most: whoever should may not reap it.
down-venv:
	@if pid=$$(cat .serve.pid 2>/dev/null) && ps -p "$$pid" -o args= | grep -q 'serve\.py'; then \
	    kill "$$pid"; tries=100; \
	    while kill -0 "$$pid" 2>/dev/null && [ "$$tries" -gt 0 ]; do tries=$$((tries - 1)); sleep 0.1; done; fi
	@rm -f .serve.pid

lock-venv: .venv/dev
	@pip_compile=".venv/bin/pip-compile --quiet $(PIP_COMPILE_OPTIONS)" && $(PIP_COMPILE)
