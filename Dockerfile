# A Flask service in a slim image: `builder` downloads the locked wheels, `deps` installs them, `service` adds the code.
# Ordered for the build cache: what changes most often comes last. Needs Docker 28, for the symbolic modes of --chmod.
# No `# syntax` line: it would make every build depend on a registry.

# The base image, pinned in a FROM line, where update bots look. With `--build-arg PYTHON_IMAGE=NAME`, the build starts
# from NAME instead and does not pull this one.
ARG PYTHON_IMAGE
FROM python:3.14.7-slim-trixie@sha256:ce40764625a4ff50df3548277632e7f96c4e77fe75fa848aae9885476e7df5a4 AS pinned
FROM ${PYTHON_IMAGE:-pinned} AS base
# ARG, not ENV: only RUN steps see these variables, here and in stages based on this one. The image does not keep them.
# Python writes no bytecode by itself: it would differ between builds. pip fails instead of asking for a password.
ARG PYTHONDONTWRITEBYTECODE=1 PIP_NO_INPUT=1

# ---- builder: the wheels that requirements.txt pins, each checked against its hash ---------------------------------
FROM base AS builder
# Wheels only: building from source would run build tools that no hash covers.
# The secret is optional: pip's configuration, for a private index. It is mounted for this step only.
RUN --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip wheel --require-hashes --only-binary=:all: --wheel-dir=/wheels --requirement=/tmp/requirements.txt

# ---- wheels: to build without a network, replace this stage with a folder: `--build-context wheels=FOLDER` -----------
FROM scratch AS wheels
COPY --from=builder /wheels /

# ---- deps: Python and the dependencies, ready to run ---------------------------------------------------------------
FROM base AS deps
# (System libraries go here, with apt-get. `minimal` keeps only those that a dependency is linked with.)
# The official image has no bytecode for its standard library; a read-only container would compile it at every start.
# Hash-based bytecode does not depend on file times, so two builds give the same files. no_debug_ranges removes the
# column numbers of tracebacks, which makes the bytecode a fifth smaller. -x leaves out what no service imports.
RUN python -X no_debug_ranges -m compileall -q --invalidation-mode=unchecked-hash \
        -x '/(test|idlelib|tkinter|turtle|ensurepip|pydoc_data|_pydecimal|_pyio|_pydatetime|site-packages)' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# Installs from the wheels only, without an index, and with the base image's pip: the environment gets no pip.
RUN --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=bind,from=wheels,target=/wheels \
    python -m venv --without-pip /opt/venv \
    && pip --python=/opt/venv install --no-cache-dir --no-compile --no-index --find-links=/wheels --require-hashes \
        --requirement=/tmp/requirements.txt
# Some packages have files for other versions of Python. Those do not compile and are never imported: ignore the errors.
RUN python -X no_debug_ranges -m compileall -q --invalidation-mode=unchecked-hash /opt/venv || true
# Unbuffered, so that `docker logs` shows output at once.
ENV PATH=/opt/venv/bin:$PATH PYTHONUNBUFFERED=1
WORKDIR /app

# ---- service: the code, and how it runs ----------------------------------------------------------------------------
FROM deps AS service
# --chmod: the same permissions in every image; the umask at `git clone` has no effect.
COPY --chmod=u=rwX,go=rX serve ./serve
COPY --chmod=u=rwX,go=rX healthcheck.py ./
# The folder with app.py.
ARG APP_DIR=.
# YOUR APPLICATION: one line for each module, package, folder and data file. Nothing else gets into the image.
COPY --chmod=u=rwX,go=rX ${APP_DIR}/app.py ./
# COPY --chmod=u=rwX,go=rX ${APP_DIR}/templates ./templates
# checked-hash: Python notices if a changed file is mounted over one of these. This step keeps the column numbers for
# tracebacks of your code.
RUN python -m compileall -q --invalidation-mode=checked-hash .
# An unprivileged user. A number, which Kubernetes' runAsNonRoot can verify.
USER 65532:65532
# Creates /data as that user. An empty volume that is mounted there gets the same owner. The code still belongs to root.
WORKDIR /data
WORKDIR /app
EXPOSE 5000
# Every 0.2 s until the first success, so that `up --wait` returns quickly; a slow application needs a longer
# --start-period. -I and -S skip PYTHON* variables and site-packages: the check starts 20 % faster.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --start-interval=0.2s \
    CMD ["python", "-IS", "/app/healthcheck.py"]
CMD ["python", "-m", "serve"]

# ---- test: the same code, with the tests and their tools -----------------------------------------------------------
FROM deps AS test
RUN --mount=type=bind,source=requirements-dev.txt,target=/tmp/requirements-dev.txt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip --python=/opt/venv install --require-hashes --only-binary=:all: --requirement=/tmp/requirements-dev.txt
COPY --from=service /app ./
COPY --chmod=u=rwX,go=rX pyproject.toml ./
COPY --chmod=u=rwX,go=rX tests ./tests
USER 65532:65532
CMD ["python", "-m", "pytest"]

# ---- lock: pins the packages of the .in files and all their dependencies, in the image's own Python: `make lock` ---
FROM base AS relock
# pip-compile is one of the development tools.
RUN --mount=type=bind,source=requirements-dev.txt,target=/tmp/requirements-dev.txt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --only-binary=:all: --requirement=/tmp/requirements-dev.txt
WORKDIR /lock
COPY pyproject.toml requirements*.in requirements*.txt ./
# pyproject.toml has pip-compile's settings: hashes, and no address of an index.
ARG PIP_COMPILE_OPTIONS=
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache \
    pip-compile ${PIP_COMPILE_OPTIONS} requirements.in && pip-compile ${PIP_COMPILE_OPTIONS} requirements-dev.in
FROM scratch AS lock
COPY --from=relock /lock/requirements*.txt /

# ---- minimal: the same service without shell, pip and package manager (docs/minimal.md) ----------------------------
FROM deps AS rootfs
RUN --mount=type=bind,source=docker/rootfs.py,target=/tmp/rootfs.py \
    python -X no_debug_ranges -IS /tmp/rootfs.py /rootfs /opt/venv
FROM scratch AS minimal
COPY --from=rootfs /rootfs /
COPY --from=service /app /app
# `FROM scratch` inherits no settings: these repeat those of `deps` and `service`.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /data
WORKDIR /app
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --start-interval=0.2s \
    CMD ["python", "-IS", "/app/healthcheck.py"]
CMD ["python", "-m", "serve"]

# ---- runtime: `service`, as the last stage, is what a plain `docker build .` builds --------------------------------
FROM service AS runtime
