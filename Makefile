# `make` lists the commands. Each is short for a standard one; README.md names it.
.DEFAULT_GOAL := help
.PHONY: help up down dev test test-all check lock upgrade wheels reproduce bench

# PYTHON_IMAGE and PIP_CONF come from the environment; .env is for compose.
build = docker build --build-arg PYTHON_IMAGE $(PIP_CONF:%=--secret=id=pip_conf,src=%)

help:      ## list these commands
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

# ---- run -----------------------------------------------------------------------------------------------------------
up:        ## build, start, wait until healthy, print the address; without Docker, serve from a virtual environment
	@if scripts/without-docker why; then scripts/without-docker up; \
	elif docker compose up --build --wait; then echo "http://$$(docker compose port web 5000)"; \
	else echo 'make up failed, see above. Is it unhealthy? `docker compose logs web` says why.' >&2; exit 1; fi

down:      ## stop and remove what `make up` or `make dev` started; keep volumes
	@scripts/without-docker down
	@if docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1; then docker compose --profile '*' down; fi

dev:       ## serve your working copy with live reload, on this machine only, until Ctrl-C
	DEV_USER=$$(id -u):$$(id -g) docker compose up --build --watch dev

# ---- check ---------------------------------------------------------------------------------------------------------
test: .venv/ready ## run the quick tests
	.venv/bin/pytest -m 'not slow'
	@echo 'The slow tests were left out. `make test-all` runs them too.'

test-all: .venv/ready ## run all tests
	.venv/bin/pytest

check: .venv/ready ## lint, and fail if a lock file is out of date
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/hadolint Dockerfile
	.venv/bin/zizmor --quiet --offline .github
	$(if $(shell command -v shellcheck),shellcheck scripts/* .ci/run)
	$(build) --quiet --target lock --no-cache-filter relock --output .venv/lock .
	@diff requirements.txt .venv/lock/ && diff requirements-dev.txt .venv/lock/ || \
		{ echo 'make check: a lock file is out of date; run `make lock`' >&2; exit 1; }
	@echo 'make check: all passed'

# ---- dependencies --------------------------------------------------------------------------------------------------
# --no-cache-filter: a cached step would not see new releases. touch: a cached file may have an old time, and make would
# then not rebuild .venv.
lock:      ## pin what the .in files ask for; keep the pins that still fit
	$(build) --target lock --no-cache-filter relock --output . .
	@touch requirements.txt requirements-dev.txt

upgrade:   ## pin the newest releases that the .in files allow; PACKAGE=NAME: of one package
	$(if $(PACKAGE),@grep -q '^$(PACKAGE)==' requirements.txt requirements-dev.txt || \
		{ echo 'PACKAGE=$(PACKAGE): must be the name of a package in a lock file' >&2; exit 1; })
	$(build) --target lock --no-cache-filter relock --output . . \
		--build-arg PIP_COMPILE_OPTIONS="$(if $(PACKAGE),--upgrade-package=$(PACKAGE),--upgrade)"
	@touch requirements.txt requirements-dev.txt

wheels:    ## download the locked wheels, to build without a network
	$(build) --target wheels --output wheels .

# ---- verify --------------------------------------------------------------------------------------------------------
reproduce: ## build twice without cache and compare digests
	scripts/reproduce

bench: .venv-bench/ready ## compare with what people use instead, in about 45 minutes; QUICK=1: a first look, in three
	.venv-bench/bin/python -m bench $(if $(QUICK),--quick) $(if $(ONLY),--only $(ONLY))

# ---- virtual environments, rebuilt when a lock changes -------------------------------------------------------------
.venv/ready: requirements.txt requirements-dev.txt
# For scripts/without-docker.
.venv-runtime/ready: requirements.txt
# For bench/.
.venv-bench/ready: requirements-dev.txt bench/requirements.txt
%/ready:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is too old: needs 3.11 or later")'
	python3 -m venv --clear $*
	$*/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary=:all: $(^:%=--requirement=%)
	@touch $@
