# `make` lists the targets. Each is one standard command, or a script with a name.
.DEFAULT_GOAL := help
.PHONY: help up down dev test check lock upgrade wheels reproduce bench

# "yes" where Docker can run the service; otherwise this says why not, and `up` serves from a virtual environment.
docker = $(shell scripts/without-docker why >&2 || echo yes)
engine = $(shell docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1 && echo yes)

# What compose passes on, for the builds below.
comma := ,
build = docker build --build-arg PYTHON_IMAGE $(if $(PIP_CONF),--secret id=pip_conf$(comma)src=$(PIP_CONF))

help:      ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

# ---- run -----------------------------------------------------------------------------------------------------------
up:        ## build, start, wait until healthy, print the address
	@$(if $(docker),docker compose up --build --wait && echo "http://$$(docker compose port web 5000)",scripts/without-docker up)

down:      ## stop and remove what `make up` or `make dev` started; volumes stay
	@scripts/without-docker down
	@$(if $(engine),docker compose --profile '*' down)

dev:       ## serve your folder with live reload, on this machine only
	DEV_USER=$$(id -u):$$(id -g) docker compose up --build --watch dev

# ---- check ---------------------------------------------------------------------------------------------------------
test: .venv/ready ## run the tests that this machine can run
	.venv/bin/pytest

check: .venv/ready ## lint, and fail if a lock is not what its .in file asks for
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/hadolint Dockerfile
	.venv/bin/zizmor --quiet --offline .github
	$(if $(shell command -v shellcheck),shellcheck scripts/* .ci/run)
	$(build) --quiet --target lock --no-cache-filter relock --output .venv/lock .
	diff requirements.txt .venv/lock/ && diff requirements-dev.txt .venv/lock/

# ---- dependencies --------------------------------------------------------------------------------------------------
# --no-cache-filter: the cache does not know what the index has by now.
lock:      ## pin what the .in files ask for
	$(build) --target lock --no-cache-filter relock --output . .

upgrade:   ## pin the newest that they allow
	$(build) --target lock --no-cache-filter relock --build-arg PIP_COMPILE_OPTIONS=--upgrade --output . .

wheels:    ## collect the locked wheels, to build without a network
	$(build) --target wheels --output wheels .

# ---- prove ---------------------------------------------------------------------------------------------------------
reproduce: ## build twice without cache and compare digests
	scripts/reproduce

bench:     ## measure image and service beside the alternatives; takes wrk, slowhttptest and minutes
	python3 bench/container.py
	python3 bench/service.py

# ---- virtual environments, made anew for each new lock -------------------------------------------------------------
.venv/ready: requirements.txt requirements-dev.txt
.venv-runtime/ready: requirements.txt
%/ready:
	@python3 -c 'import sys; sys.exit(sys.version_info < (3, 11) and "python3 is too old: takes 3.11 or later")'
	python3 -m venv --clear $*
	$*/bin/pip install --quiet --disable-pip-version-check --require-hashes --only-binary=:all: $(^:%=--requirement=%)
	@touch $@
