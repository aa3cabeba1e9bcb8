# Each target is a line or two over a command that also works by itself.
.DEFAULT_GOAL := help
.PHONY: help up down dev serve test lock upgrade check wheelhouse image publish reproduce sbom bench
.PHONY: newest-base archive python up-venv down-venv dev-venv

PYTHON ?= python3

# compose reads .env by itself; this is for what runs without it: lines NAME=value. As there, the environment comes first.
dotenv = $(shell sed -n -e 's/^ *\(export  *\)\{0,1\}$(1) *= *["'\'']\{0,1\}\([^"'\'' ]*\).*/\2/p' .env 2>/dev/null | tail -n 1)
BIND := $(or $(BIND),$(call dotenv,BIND),127.0.0.1)
PORT := $(or $(PORT),$(call dotenv,PORT),5000)
TARGET := $(or $(TARGET),$(call dotenv,TARGET),runtime)
APP := $(or $(APP),$(call dotenv,APP))
APP_DIR := $(patsubst %/,%,$(or $(APP_DIR),$(call dotenv,APP_DIR),.))
$(if $(filter /% ..%,$(APP_DIR)),$(error APP_DIR=$(APP_DIR): takes a folder inside of the project))
LOCK := $(if $(filter-out .,$(APP_DIR)),$(APP_DIR)/)requirements.txt
RUNTIME := .venv/runtime$(if $(filter-out .,$(APP_DIR)),-$(subst /,-,$(APP_DIR)))
# Not abspath, which takes a space for the end of a path.
absolute = $(if $(filter-out /%,$(firstword $(1))),$(CURDIR)/)$(1)
PIP_CONF := $(call absolute,$(or $(PIP_CONF),$(call dotenv,PIP_CONF)))
CA_BUNDLE := $(call absolute,$(or $(CA_BUNDLE),$(call dotenv,CA_BUNDLE)))
WHEELHOUSE := $(call absolute,$(or $(WHEELHOUSE),$(call dotenv,WHEELHOUSE)))
PYTHON_IMAGE := $(or $(PYTHON_IMAGE),$(call dotenv,PYTHON_IMAGE),$(shell sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile))
export PYTHON_IMAGE APP_DIR PIP_CONF CA_BUNDLE WHEELHOUSE

COMMA := ,
# What each build takes. No network, with wheels from a folder.
INPUTS := --build-arg PYTHON_IMAGE --build-arg APP_DIR \
	$(if $(PIP_CONF),--secret 'id=pip_conf$(COMMA)src=$(PIP_CONF)') \
	$(if $(CA_BUNDLE),--secret 'id=ca_bundle$(COMMA)src=$(CA_BUNDLE)')
OFFLINE := $(if $(WHEELHOUSE),--network none --build-context 'wheelhouse=$(WHEELHOUSE)')
# The same for what does not run in a build; an empty variable would be another thing than none.
ifneq ($(APP),)
export APP
endif
ifneq ($(PIP_CONF),)
export PIP_CONFIG_FILE := $(PIP_CONF)
endif
ifneq ($(CA_BUNDLE),)
export PIP_CERT := $(CA_BUNDLE)
endif

# Not $(MAKE), which make would run under `make --dry-run` too.
SELF := $(MAKE) --silent

# Conditions, as the shell's `if` takes them.
RECENT := $(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11))'
ENGINE := docker compose version >/dev/null 2>&1 && docker info >/dev/null 2>&1
BASE := { docker image inspect "$(PYTHON_IMAGE)" >/dev/null 2>&1 || docker pull "$(PYTHON_IMAGE)" 2>/dev/null; }
UNPINNED := case "$(PYTHON_IMAGE)" in *@sha256:*) ;; \
	*) echo "warning: PYTHON_IMAGE=$(PYTHON_IMAGE) has no digest: another day it can be another image" >&2 ;; esac
NO_ENGINE := No Docker Engine answers
NO_BASE := The base image $(PYTHON_IMAGE) can neither be found nor pulled
WITHOUT = without=; if ! { $(ENGINE); }; then without="$(NO_ENGINE)"; elif ! $(BASE); then without="$(NO_BASE)"; fi
# compose itself knows no context that is not always there.
COMPOSE_BUILD = $(if $(WHEELHOUSE),docker build $(INPUTS) $(OFFLINE) --target $(TARGET) --tag "$$($(WEB_IMAGE))" .,docker compose build)
WEB_IMAGE = docker compose config --format json web \
	| $(PYTHON) -c 'import json, sys; print(json.load(sys.stdin)["services"]["web"]["image"])'

help: ## print this list
	@awk -F ':.*## ' '/^[a-z]+:.*## / { printf "make %-10s %s\n", $$1, $$2 }' Makefile

up: $(LOCK) ## build, start, wait until healthy, print the address; without Docker, serve from .venv in the background
	@$(WITHOUT); if [ -n "$$without" ]; then echo "$$without: serving from a virtual environment instead."; $(SELF) up-venv; \
	else $(UNPINNED); $(COMPOSE_BUILD) && $(SELF) down-venv || exit; \
	docker compose up --wait || { docker compose logs --tail 20 web >&2; exit 1; }; \
	echo "http://$$(docker compose port web 5000)"; fi

down: down-venv ## stop and remove what runs of it, whichever way it was started; volumes stay
	@if $(ENGINE); then docker compose --profile '*' down; fi

dev: export DEV_USER = $(shell id -u):$(shell id -g)
dev: $(LOCK) ## serve the folder while you edit it, on this machine alone, until Ctrl-C
	@$(WITHOUT); if [ -n "$$without" ]; then echo "$$without: serving from a virtual environment instead."; $(SELF) dev-venv; \
	else $(UNPINNED); $(SELF) down-venv; docker compose --progress quiet stop web; docker compose up --build --watch dev; fi

serve: export WAITRESS_LISTEN = $(BIND):$(PORT)
serve: $(RUNTIME) ## serve from .venv in the foreground
	$(SERVE)

test: .venv/dev ## run every test that this machine can run; REQUIRE_DOCKER=1 fails those that lack Docker
	.venv/bin/python -m pytest

lock: ## pin what the requirements files ask for
upgrade: ## pin the newest that they allow, and the base's newest digest; PACKAGE=NAME: that package alone
upgrade: PIP_COMPILE_OPTIONS := $(if $(PACKAGE),$(PACKAGE:%=--upgrade-package=%),--upgrade)
# A lock that has not changed stays untouched; one that has gets the time of now, which the build's cache would not give.
lock upgrade:
	@$(FRESH) && for lock in $$(cd "$$fresh" && find . -name 'requirements*.txt'); do cmp -s "$$fresh/$$lock" "$$lock" \
	    || { touch "$$fresh/$$lock" && mv "$$fresh/$$lock" "$$lock"; } || exit; done
	@$(if $(filter upgrade,$@),$(if $(PACKAGE),,$(SELF) newest-base))

check: python ## lint; fail if a lock is not what its .in file asks for, or the base not the one that is documented
	@$(PYTHON) tools/lock.py check
	@$(SELF) .venv/dev
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .
	.venv/bin/hadolint Dockerfile
	.venv/bin/zizmor --quiet --offline .github
	@if command -v shellcheck >/dev/null; then echo "shellcheck .ci"; shellcheck .ci/run .ci/provision; \
	else echo "shellcheck is not installed: .ci goes unchecked"; [ -z "$$CI" ]; fi
	@$(FRESH) && $(PYTHON) tools/lock.py diff "$$fresh"

wheelhouse: $(LOCK) ## collect the locked wheels in the folder wheelhouse; WHEELHOUSE=wheelhouse then builds without network
	@$(ENGINE) || { echo "$(NO_ENGINE): it is the image's Python that says which wheels it takes." >&2; exit 1; }
	@new=$$(mktemp -d .wheelhouse.XXXXXX) || exit; trap 'rm -rf "$$new"' EXIT; trap 'exit 1' HUP INT TERM; \
	docker buildx build --quiet $(INPUTS) --target wheelhouse --output "$$new/wheelhouse" . \
	&& rm -rf wheelhouse && mv "$$new/wheelhouse" . && ls wheelhouse

image: ## build this commit, with SBOM and provenance, for PLATFORMS, as flask-helloworld.oci.tar
	@$(ABLE) && $(UNPINNED)
	$(COMMIT) && $(BUILD) $(ATTESTATIONS) $(PLATFORMS:%=--platform %) \
	    --target $(TARGET) --output '$(OCI)"name=$(IMAGE):$(VERSION)","dest=flask-helloworld.oci.tar.new"' "$$commit" \
	&& mv flask-helloworld.oci.tar.new flask-helloworld.oci.tar

publish: ## push what `make image IMAGE=NAME` has built of a released commit
	@$(RELEASED) && docker load --quiet --input flask-helloworld.oci.tar && image="$(IMAGE):$(VERSION)" \
	&& built=$$(docker image inspect --format '{{index .Config.Labels "org.opencontainers.image.revision"}}' "$$image") \
	&& if [ "$$built" = "$(REVISION)" ]; then docker push "$$image"; \
	else echo "flask-helloworld.oci.tar is of commit $$built, not $(REVISION); run: make image" >&2; exit 1; fi

reproduce: python ## build every target twice without cache, compare digests; PUBLISHED=NAME:TAG: with that image's too
	@$(ABLE) && $(PYTHON) tools/reproduce.py $(if $(PUBLISHED),--published '$(PUBLISHED)') $(filter-out $(TARGET),builder test minimal runtime) $(TARGET)

sbom: .venv/dev ## list what is in the image, as SPDX and as CycloneDX
	@new=$$(mktemp -d .sbom.XXXXXX) || exit; trap 'rm -rf "$$new"' EXIT; trap 'exit 1' HUP INT TERM; \
	$(SELF) archive ARCHIVE="$$new/image.tar" \
	    && SYFT_CHECK_FOR_APP_UPDATE=false .venv/bin/syft scan --quiet "oci-archive:$$new/image.tar" \
	        --source-name flask-helloworld --source-version '$(VERSION)' \
	        --output "spdx-json=$$new/sbom.spdx.json" --output "cyclonedx-json=$$new/sbom.cdx.json" \
	    && mv "$$new"/sbom.*.json . && ls sbom.*.json

bench: ## measure the image and the service beside the alternatives; takes Docker, wrk, slowhttptest and minutes
	$(PYTHON) bench/container.py
	$(PYTHON) bench/service.py

# --- Locks --------------------------------------------------------------------------------------------------------------

# How a recipe begins that takes fresh locks, in $$fresh: made by the image's own Python where an engine answers. Of what
# a build says, only the line that tells why not. First what can be said without pip-tools, which one of the locks has.
export PIP_COMPILE_OPTIONS :=
FRESH = ! $(RECENT) 2>/dev/null || $(PYTHON) tools/lock.py ready || exit; \
	fresh=$$(mktemp -d .lock.XXXXXX) || exit; trap 'rm -rf "$$fresh"' EXIT; trap 'exit 1' HUP INT TERM; \
	$(WITHOUT); if [ -n "$$without" ]; then echo "$$without: locking with $(PYTHON) instead."; \
	    $(SELF) .venv/dev && .venv/bin/python tools/lock.py pin "$$fresh"; \
	else docker buildx build --progress plain --target lock --no-cache-filter pins --output "$$fresh" \
	        $(INPUTS) --build-arg PIP_COMPILE_OPTIONS . >"$$fresh/log" 2>&1 \
	    || { sed -n 's/^\#[0-9]* [0-9.]* \(lock: .*\)/\1/p' "$$fresh/log" | grep . \
	        || sed -n '/^------/,$$p' "$$fresh/log" | grep . || cat "$$fresh/log"; exit 1; } >&2; fi

# From Dependabot's line, where there is one, because that is the only line that Dependabot moves.
newest-base:
	@base=$$(sed -n 's/^ARG PYTHON_IMAGE=//p' Dockerfile); moved=$$(sed -n 's/^FROM //p' .github/base/Dockerfile 2>/dev/null); \
	moved=$${moved:-$$base}; tag=$${moved%@*}; \
	new=$$(docker buildx imagetools inspect --format '{{json .Manifest.Digest}}' "$$tag" 2>&1 | tr -d '"'); \
	case $$new in \
	sha256:*) new="$$tag@$$new"; if [ "$$new" = "$$base" ]; then echo "The base is its tag's newest: $$base"; else \
	    for file in Dockerfile README.md .github/base/Dockerfile; do [ ! -f "$$file" ] || { cp -p "$$file" "$$file.new" \
	        && sed -e "s|$$base|$$new|g" -e "s|$$moved|$$new|g" "$$file" >"$$file.new" && mv "$$file.new" "$$file"; } \
	        || { rm -f "$$file.new"; exit 1; }; done; echo "The base is now $$new"; fi ;; \
	*) echo "No registry answers for $$tag, so the base stays: $$new" ;; \
	esac

# --- One commit, one image --------------------------------------------------------------------------------------------

# Expanded where they are used: git is asked by these targets alone.
VERSION = $(shell sed -n 's/^ARG VERSION=//p' Dockerfile)
REVISION = $(shell git rev-parse HEAD)
CREATED = $(shell TZ=UTC0 git log -1 --date=format-local:%Y-%m-%dT%H:%M:%SZ --format=%cd)
IMAGE := flask-helloworld
# The generator takes part in no image: it writes the list that is attached to one.
SBOM_GENERATOR := docker/buildkit-syft-scanner:stable-1@sha256:ae4f3b554449e7e25548e7d8ccc029d17357348e30c6e3df01b92bc93654d6a9
ATTESTATIONS := --provenance mode=max --attest type=sbom,generator=$(SBOM_GENERATOR)

# What is built is the commit, whatever else lies in the folder; FOLDER=1 builds the folder, to see that it is the same.
# Unpacked, because docker does not heed .dockerignore in an archive.
COMMIT = $(if $(FOLDER),commit=.,commit=$$(mktemp -d) && trap 'rm -rf "$$commit"' EXIT && trap 'exit 1' HUP INT TERM \
	&& git -c core.autocrlf=false archive HEAD | tar -x -C "$$commit")
# The commit's time stands for the build's, in labels, layers and history. Younger files get it when the image is written;
# without cache, because a layer from an earlier build has files that are older than the commit.
BUILD = SOURCE_DATE_EPOCH=$$(git log -1 --format=%ct) BUILDX_GIT_LABELS= docker buildx build --no-cache $(INPUTS) $(OFFLINE) \
	--label org.opencontainers.image.revision=$(REVISION) --label org.opencontainers.image.created=$(CREATED)
OCI = "type=oci","rewrite-timestamp=true",$(if $(filter minimal,$(TARGET)),$(ZSTD))
# A seventh less to pull than with gzip. `runtime` stays as it is, because its base's layers are shared as they are.
ZSTD := "compression=zstd","compression-level=22","force-compression=true",

# Docker's own builder writes OCI images only from the containerd store, which is the default of Engine 29.
ABLE = { git rev-parse --verify --quiet HEAD >/dev/null || { echo "This takes a commit of a git repository." >&2; exit 1; }; \
	docker info --format '{{.DriverStatus}}' 2>/dev/null | grep -q containerd || { \
	    echo "This takes a Docker Engine with the containerd image store, https://docs.docker.com/go/containerd" >&2; exit 1; }; \
	[ "$$(git log -1 --format=%ct)" -le "$$(date +%s)" ] || { \
	    echo "The commit's time is still to come: the clock is wrong, or was when it was made." >&2; exit 1; }; \
	[ -z "$$(git status --porcelain)" ] || echo "What is built is the commit; it does not have your changes." >&2; }

RELEASED = { git tag --points-at HEAD | grep -qx 'v$(VERSION)' && grep -q '^\#\# \[$(VERSION)\]' CHANGELOG.md || { \
	    echo "This takes a commit with the tag v$(VERSION), and a section [$(VERSION)] in CHANGELOG.md." >&2; exit 1; }; \
	! grep -q '^ARG SOURCE=https://example.org' Dockerfile || { \
	    echo "Dockerfile: SOURCE is an example; put the address of your repository." >&2; exit 1; }; }

archive:
	@$(ABLE) && $(COMMIT) && $(BUILD) --provenance false --target $(TARGET) --output '$(OCI)"dest=$(ARCHIVE)"' "$$commit"

# --- Without Docker ---------------------------------------------------------------------------------------------------

PIP_INSTALL := .venv/bin/python -m pip install --quiet --disable-pip-version-check --require-hashes --only-binary=:all:

python:
	@$(RECENT) || { echo "$(PYTHON) is not Python 3.11 or later; name one that is: make PYTHON=python3.14" >&2; exit 1; }

requirements.txt requirements-dev.txt:
	@echo "lock: $@ is missing; \`git checkout $@\` restores it" >&2; exit 1

$(filter-out requirements.txt,$(LOCK)):
	@echo "APP_DIR=$(APP_DIR): no folder with a requirements.txt; make lock pins a requirements.in" >&2; exit 1

# Anew for each new lock, so that nothing stays that the lock no longer has.
.venv/runtime: requirements.txt
$(RUNTIME): $(LOCK)
$(sort .venv/runtime $(RUNTIME)): | python
	$(PYTHON) -m venv --clear .venv
	$(PIP_INSTALL) $(if $(WHEELHOUSE),--no-index --find-links='$(WHEELHOUSE)') --requirement '$<'
	@touch '$@'

.venv/dev: .venv/runtime requirements-dev.txt
	$(PIP_INSTALL) --requirement requirements-dev.txt
	@touch $@

SERVE = cd '$(APP_DIR)' && exec env PYTHONPATH='$(CURDIR)' '$(CURDIR)/.venv/bin/python' -m serve

dev-venv: $(RUNTIME)
	cd '$(APP_DIR)' && '$(CURDIR)/.venv/bin/flask' --app "$${APP:-app:app}" run --debug --host 127.0.0.1 --port $(PORT)

# The log says when it listens: a probe alone might ask something else on that port. 150 times 0.1 s at most.
up-venv: export WAITRESS_LISTEN = $(BIND):$(PORT)
up-venv: export LOG_LEVEL = INFO
up-venv: down-venv $(RUNTIME)
	@rm -f .serve.log; ($(subst exec ,exec nohup ,$(SERVE))) >.serve.log 2>&1 </dev/null & \
	pid=$$!; echo "$$pid" >.serve.pid; tries=150; \
	until { grep -q 'Serving on' .serve.log 2>/dev/null && .venv/bin/python -IS healthcheck.py >.serve.health; } \
	    || ! kill -0 "$$pid" 2>/dev/null || [ "$$tries" = 0 ]; do tries=$$((tries - 1)); sleep 0.1; done; \
	if [ "$$tries" != 0 ] && kill -0 "$$pid" 2>/dev/null; then echo "http://$(BIND):$(PORT)"; \
	else cat .serve.log .serve.health >&2 2>/dev/null; $(SELF) down-venv; exit 1; fi

# By number and name, where ps can tell the name: the number alone may be another process's by now.
down-venv:
	@if pid=$$(cat .serve.pid 2>/dev/null) && kill -0 "$$pid" 2>/dev/null \
	    && { ! command -v ps >/dev/null || ps -p "$$pid" -o args= | grep -q 'python.* -m serve'; }; then \
	    kill "$$pid"; tries=100; \
	    while kill -0 "$$pid" 2>/dev/null; do tries=$$((tries - 1)); sleep 0.1; \
	        if [ "$$tries" = 0 ]; then echo "process $$pid (.serve.pid) does not end" >&2; exit 1; fi; done; fi
	@rm -f .serve.pid .serve.health
