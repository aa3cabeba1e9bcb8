# Wheels come from the lock in `builder`, become a virtual environment there, and move into the slim `runtime`.
# Each step stands before whatever changes more often: base, dependencies, code.
# The folder with the application and its requirements.txt.
ARG APP_DIR=.
ARG PYTHON_IMAGE=python:3.14.7-slim-trixie@sha256:ce40764625a4ff50df3548277632e7f96c4e77fe75fa848aae9885476e7df5a4
# The labels of the images: who you are, and the version, which has no other place; and the base, taken apart.
ARG TITLE=flask-helloworld
ARG DESCRIPTION="A greeting service in Flask, served by waitress"
ARG VERSION=0.1.0
ARG LICENSES=MIT
ARG SOURCE=https://example.org/flask-helloworld
ARG BASE=${PYTHON_IMAGE%@*}
ARG BASE_DIGEST=${PYTHON_IMAGE#${BASE}}
ARG BASE_NAME=${BASE##*/}
ARG BASE_FOLDER=${BASE%${BASE_NAME}}

# ---- pip: the base, and how its pip reaches the package index ----------------------------------------------------------
FROM ${PYTHON_IMAGE} AS pip
# Again, because an ARG from before the first FROM has a value in a stage only where the stage names it.
ARG PYTHON_IMAGE
RUN case "${PYTHON_IMAGE}" in \
        *@sha256:*) ;; \
        *) echo "warning: PYTHON_IMAGE=${PYTHON_IMAGE} has no digest: another day it can be another image" >&2 ;; \
    esac
# A package with a .pth file would else leave bytecode that depends on when it was built. And nobody is there to answer
# when an index asks for a password.
ENV PYTHONDONTWRITEBYTECODE=1 \
    PIP_NO_INPUT=1
# A private index, a proxy, a CA of one's own come as build secrets: they are there while a step runs, and in no layer,
# history or cache after. compose passes empty ones where none are set.
COPY --chmod=0755 <<'SH' /with-secrets
#!/bin/sh
[ ! -s /run/secrets/pip_conf ] || export PIP_CONFIG_FILE=/run/secrets/pip_conf
[ ! -s /run/secrets/ca_bundle ] || export PIP_CERT=/run/secrets/ca_bundle
exec "$@"
SH

# ---- wheelhouse: the locked wheels -------------------------------------------------------------------------------------
FROM pip AS download
ARG APP_DIR
# Only wheels: to build from source, pip would fetch build tools that no hash covers, and run them.
RUN --mount=type=bind,source=${APP_DIR}/requirements.txt,target=/lock/requirements.txt \
    --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle \
    --mount=type=cache,target=/root/.cache/pip \
    mkdir /wheels \
    && /with-secrets pip wheel --require-hashes --only-binary=:all: --wheel-dir=/wheels --requirement=/lock/requirements.txt

# By this name a folder takes its place: `docker build --build-context wheelhouse=wheelhouse --network=none .`
FROM scratch AS wheelhouse
COPY --from=download /wheels /

# ---- builder: /opt/venv, made from wheels that the lock names by hash -------------------------------------------------
FROM pip AS builder
ARG APP_DIR
COPY --from=wheelhouse / /wheels/
# pip works on the environment from outside: nothing that could install anything gets into it.
RUN --mount=type=bind,source=${APP_DIR}/requirements.txt,target=/lock/requirements.txt \
    for wheel in /wheels/*; do \
        [ -e "${wheel}" ] || continue; \
        { sum=$(sha256sum "${wheel}") && grep -q "sha256:${sum%% *}" /lock/requirements.txt; } \
            || { echo "${wheel} is not in requirements.txt; make wheelhouse collects what is" >&2; exit 1; }; \
    done \
    && python -m venv --without-pip /opt/venv \
    && pip --python=/opt/venv install --no-cache-dir --no-index --find-links=/wheels --require-hashes --no-compile \
        --requirement=/lock/requirements.txt \
    && pip --python=/opt/venv check

# ---- bytecode: compiles the part of the standard library that is in use -----------------------------------------------
# The official slim image has no bytecode, and a container on a read-only file system would compile every module again
# at each start. By hash instead of time stamp, bytecode stays valid when a copy or a reproducible build changes times;
# unchecked, because nobody edits what is installed in an image.
FROM scratch AS bytecode
COPY <<'PYTHON' /stdlib.py
"""stdlib.py FOLDER: compile what modules of the standard library the sources in FOLDER import, and theirs."""

import ast
import contextlib
import importlib
import pathlib
import py_compile
import sys
from importlib.machinery import FrozenImporter, PathFinder

FUNCTION = (ast.FunctionDef, ast.AsyncFunctionDef)


def statements(node):
    """Yield what runs when a module is imported, as much of it as is there: not what is in functions."""
    for inner in ast.iter_child_nodes(node):
        if not isinstance(inner, FUNCTION):
            yield inner
            yield from statements(inner)


names = {"encodings.idna"}  # what getaddrinfo() imports without an import statement
for source in pathlib.Path(sys.argv[1]).rglob("*.py"):
    with contextlib.suppress(SyntaxError, ValueError):  # a template in a package, say: it cannot be imported either
        for node in statements(ast.parse(source.read_bytes())):
            if isinstance(node, ast.Import):
                names.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and not node.level:
                names.update([node.module, *(f"{node.module}.{alias.name}" for alias in node.names)])

for name in sorted(names):
    if name.partition(".")[0] in sys.stdlib_module_names:
        with contextlib.suppress(Exception):  # no module but a function, or one that this platform has not
            importlib.import_module(name)

# By name, because a module may have put another one in its place (collections.abc does).
for name in list(sys.modules):
    if FrozenImporter.find_spec(name):  # in the interpreter itself
        continue
    package = sys.modules.get(name.rpartition(".")[0])
    spec = PathFinder.find_spec(name, getattr(package, "__path__", None))
    if spec and spec.origin and spec.origin.endswith(".py") and not pathlib.Path(spec.cached).exists():
        py_compile.compile(spec.origin, doraise=True, invalidation_mode=py_compile.PycInvalidationMode.UNCHECKED_HASH)
PYTHON

# ---- code: the application and what runs it, in the modes and with the times of no particular clone --------------------
FROM ${PYTHON_IMAGE} AS code
ARG APP_DIR
# As much of it as .dockerignore lets in. Where serve lies, that is the project's own files too.
WORKDIR /code/app
COPY ${APP_DIR} ./
RUN rm -f requirements*.in requirements*.txt \
    && if [ -d serve ]; then rm -rf examples pyproject.toml tests tools; fi
COPY healthcheck.py ./
COPY serve ./serve
COPY pyproject.toml /code/test/
COPY tests /code/test/tests
# Writing the image anew (rewrite-timestamp) only lowers times that are after the commit's; earlier ones, which the files of
# a folder may have, are raised here.
ARG SOURCE_DATE_EPOCH
RUN mkdir -p /code/volume/data \
    && find /code -type d -exec chmod 0755 {} + -o -type f -exec chmod 0644 {} + \
    && chmod 0770 /code/volume/data \
    && if [ -n "${SOURCE_DATE_EPOCH}" ]; then find /code -exec touch -h -d "@${SOURCE_DATE_EPOCH}" {} +; fi

# ---- environment: what an edit of the code leaves as it is --------------------------------------------------------------
FROM ${PYTHON_IMAGE} AS environment
# Unbuffered, or what an application prints would show in `docker logs` late, and after a crash never.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /app
COPY --from=builder /opt/venv /opt/venv
# What does not compile cannot be imported either (a template, code for another version), so that is no reason to stop;
# the tests see to it that nothing else is missing. -B here and below: no other bytecode than what is asked for.
RUN --mount=type=bind,from=bytecode,target=/bytecode \
    python -B -m compileall -qq --invalidation-mode=unchecked-hash /opt/venv; \
    python -IB /bytecode/stdlib.py /opt/venv

# ---- application: the code, whose edit repeats the steps from here on ---------------------------------------------------
FROM environment AS application
# All of it belongs to root and cannot be written by the user that runs it.
COPY --from=code /code/app ./
# Checked, so that a file mounted over the image's own takes effect.
RUN --mount=type=bind,from=bytecode,target=/bytecode \
    python -B -m compileall -q --invalidation-mode=checked-hash . \
    && python -IB /bytecode/stdlib.py .

# ---- service: how it runs ---------------------------------------------------------------------------------------------
FROM application AS service
# Where a volume goes: an empty one takes over owner and mode. Of the group root, in which OpenShift's random users are.
COPY --from=code --chown=65532:0 /code/volume /
# By number, so that Kubernetes' runAsNonRoot can tell; with no name in /etc/passwd, because nothing here needs one.
USER 65532:65532
EXPOSE 5000
STOPSIGNAL SIGTERM
# Quick while it starts, so that whoever waits for healthy waits no longer than it takes. -IS: see healthcheck.py.
HEALTHCHECK --interval=10s --timeout=3s --retries=3 --start-period=10s --start-interval=0.2s \
    CMD ["python", "-IS", "/app/healthcheck.py"]
CMD ["python", "-m", "serve"]

# ---- test: the same, and the tests with what they need ----------------------------------------------------------------
# An environment in the same place, of which `test` takes what the other has not. Of its own, so that `lock` can be built
# where requirements.txt cannot be installed: to mend that is what it is for.
FROM pip AS dev
RUN --mount=type=bind,source=requirements-dev.txt,target=/lock/requirements-dev.txt \
    --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle \
    --mount=type=cache,target=/root/.cache/pip \
    python -m venv --without-pip /opt/venv \
    && /with-secrets pip --python=/opt/venv install --require-hashes --only-binary=:all: --no-compile \
        --requirement=/lock/requirements-dev.txt \
    && pip --python=/opt/venv check

FROM service AS test
COPY --from=dev /opt/venv /opt/venv
COPY --from=code /code/test ./
CMD ["python", "-m", "pytest"]

# ---- lock: `docker build --target lock --output . .` writes the requirements files, pinned by the image's own Python ---
FROM dev AS pins
WORKDIR /lock
ARG PIP_COMPILE_OPTIONS=
RUN --mount=type=bind,target=/lock \
    --mount=type=secret,id=pip_conf --mount=type=secret,id=ca_bundle \
    --mount=type=cache,target=/root/.cache/pip --mount=type=cache,target=/root/.cache/pip-tools \
    mkdir /fresh && /with-secrets /opt/venv/bin/python tools/lock.py pin /fresh

FROM scratch AS lock
COPY --from=pins /fresh /

# ---- minimal: `docker build --target minimal .`: no shell, no pip, no package manager ------------------------------------
# Where in its line a statement is (PEP 657) takes a fifth of the bytecode, compressed; a traceback has the lines anyway.
FROM environment AS compact
# As in `environment`, what does not compile is no reason to stop. All, /opt included, gets the interpreter's time, so that
# this layer, too, is the same in each build.
RUN python -X no_debug_ranges -B -m compileall -f -qq --invalidation-mode=unchecked-hash /opt/venv; \
    mkdir -p /environment/opt && mv /opt/venv /environment/opt/ \
    && find /environment -exec touch -h -r "$(readlink -f /environment/opt/venv/bin/python)" {} +

FROM application AS root
RUN --mount=type=bind,source=tools/minimal.py,target=/minimal.py \
    python -X no_debug_ranges -IB /minimal.py /minimal /opt/venv /app

# Four layers, of which an edit of the code changes one; the first too if it imports another module of the standard
# library. --link keeps a layer the same whatever is below. What follows is repeated from `environment`, `service` and
# `runtime`, because it cannot be inherited without their files; a test compares it.
FROM scratch AS minimal
COPY --link --from=root /minimal /
COPY --link --from=compact /environment /
COPY --link --from=application /app /app
COPY --link --from=code --chown=65532:0 /code/volume /
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin \
    PYTHONUNBUFFERED=1
WORKDIR /app
USER 65532:65532
EXPOSE 5000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=3s --retries=3 --start-period=10s --start-interval=0.2s \
    CMD ["python", "-IS", "/app/healthcheck.py"]
CMD ["python", "-m", "serve"]
ARG TITLE DESCRIPTION VERSION LICENSES SOURCE BASE_NAME BASE_FOLDER BASE_DIGEST
LABEL org.opencontainers.image.title="${TITLE}" \
      org.opencontainers.image.description="${DESCRIPTION}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="${LICENSES}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_FOLDER:-docker.io/library/}${BASE_NAME}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST#@}"

# ---- runtime: what `docker build .` gives -----------------------------------------------------------------------------
FROM service AS runtime
ARG TITLE DESCRIPTION VERSION LICENSES SOURCE BASE_NAME BASE_FOLDER BASE_DIGEST
# A name without a folder is one of Docker Hub's own. `make image` adds revision and created.
LABEL org.opencontainers.image.title="${TITLE}" \
      org.opencontainers.image.description="${DESCRIPTION}" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.licenses="${LICENSES}" \
      org.opencontainers.image.source="${SOURCE}" \
      org.opencontainers.image.base.name="${BASE_FOLDER:-docker.io/library/}${BASE_NAME}" \
      org.opencontainers.image.base.digest="${BASE_DIGEST#@}"
