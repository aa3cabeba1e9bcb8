# A Flask service in a slim image: `builder` downloads the locked wheels, `deps` installs them, `service` adds the code.
# Ordered for the build cache: what changes most often comes last. Needs Docker 28 or later.

# The digest is in a FROM line because update bots find it there. `--build-arg PYTHON_IMAGE=NAME` takes another base.
ARG PYTHON_IMAGE=pinned
FROM python:3.14.7-slim-trixie@sha256:ce40764625a4ff50df3548277632e7f96c4e77fe75fa848aae9885476e7df5a4 AS pinned
FROM ${PYTHON_IMAGE} AS base
# ARG, not ENV: for the steps of the build only. Python and pip write no bytecode of their own, which would differ from
# build to build, and pip fails where it would ask for a password.
ARG PYTHONDONTWRITEBYTECODE=1
ARG PIP_NO_INPUT=1

# ---- builder: the wheels that requirements.txt pins, each checked against its hash -------------------------------------
FROM base AS builder
# Wheels only: building from source would run build tools that no hash covers.
# The secret is pip's configuration, for a private index. It stays out of every layer and cache.
RUN --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip wheel --require-hashes --only-binary=:all: --wheel-dir=/wheels --requirement=/tmp/requirements.txt

# ---- wheels: to build without a network, `--build-context wheels=FOLDER` puts a folder in place of this stage ----------
FROM scratch AS wheels
COPY --from=builder /wheels /

# ---- deps: Python and the dependencies, ready to run -------------------------------------------------------------------
FROM base AS deps
# The official image has no bytecode for the standard library, and a read-only container would compile it at every start.
# Hash-based bytecode does not depend on file times, so two builds give the same. Without columns in tracebacks
# (no_debug_ranges) it is a fifth smaller.
RUN python -X no_debug_ranges -m compileall -q --invalidation-mode=unchecked-hash \
        -x '/(test|idlelib|tkinter|turtledemo|ensurepip|site-packages)/' \
        "$(python -c 'import sysconfig; print(sysconfig.get_path("stdlib"))')"
# The base's pip installs into the environment, which has none of its own: nothing can be installed at run time.
RUN --mount=type=bind,source=requirements.txt,target=/tmp/requirements.txt \
    --mount=type=bind,from=wheels,target=/wheels \
    python -m venv --without-pip /opt/venv \
    && pip --python=/opt/venv install --no-cache-dir --no-compile --no-index --find-links=/wheels --require-hashes \
        --requirement=/tmp/requirements.txt \
    && pip --python=/opt/venv check
# A package may carry code for another Python, which does not compile and is never imported: no reason to fail.
RUN python -X no_debug_ranges -m compileall -q --invalidation-mode=unchecked-hash /opt/venv || true
# Unbuffered, so that `docker logs` shows output at once.
ENV PATH=/opt/venv/bin:$PATH \
    PYTHONUNBUFFERED=1
WORKDIR /app

# ---- service: the code, and how it runs --------------------------------------------------------------------------------
FROM deps AS service
# --chmod: the same permissions in the image, whatever the umask of the clone.
COPY --chmod=u=rwX,go=rX serve ./serve
COPY --chmod=u=rwX,go=rX healthcheck.py ./
# YOUR APPLICATION: one line for each module and folder that it consists of, such as
# COPY --chmod=u=rwX,go=rX templates ./templates
ARG APP_DIR=.
COPY --chmod=u=rwX,go=rX ${APP_DIR}/app.py ./
# checked-hash: a file mounted over one of these takes effect.
RUN python -m compileall -q --invalidation-mode=checked-hash .
# An unprivileged user that owns nothing here but /data, where a volume may go. A number, so that Kubernetes sees that it
# is not root.
USER 65532:65532
WORKDIR /data
WORKDIR /app
EXPOSE 5000
# Often until the first success, so that `up --wait` is quick. -IS: without site-packages the probe starts in half the time.
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --start-interval=0.2s \
    CMD ["python", "-IS", "/app/healthcheck.py"]
CMD ["python", "-m", "serve"]

# ---- test: the same code, with the tests and their tools ---------------------------------------------------------------
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

# ---- lock: `docker build --target lock --output . .` pins the whole tree, in the image's own Python --------------------
FROM base AS relock
RUN --mount=type=bind,source=requirements-dev.txt,target=/tmp/requirements-dev.txt \
    --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache/pip \
    pip install --require-hashes --only-binary=:all: --requirement=/tmp/requirements-dev.txt
WORKDIR /lock
COPY pyproject.toml requirements*.in requirements*.txt ./
ARG PIP_COMPILE_OPTIONS=
RUN --mount=type=secret,id=pip_conf,target=/etc/pip.conf \
    --mount=type=cache,target=/root/.cache \
    pip-compile ${PIP_COMPILE_OPTIONS} requirements.in && pip-compile ${PIP_COMPILE_OPTIONS} requirements-dev.in
FROM scratch AS lock
COPY --from=relock /lock/requirements*.txt /

# ---- minimal: the same service without shell, pip and package manager (docs/minimal.md) --------------------------------
FROM deps AS rootfs
RUN --mount=type=bind,source=docker/rootfs.py,target=/tmp/rootfs.py \
    python -X no_debug_ranges -IS /tmp/rootfs.py /rootfs /opt/venv
FROM scratch AS minimal
COPY --from=rootfs /rootfs /
COPY --from=service /app /app
# An image from scratch inherits nothing: the same as in `deps` and `service`.
ENV PATH=/opt/venv/bin:/usr/local/bin:/usr/bin:/bin \
    PYTHONUNBUFFERED=1
USER 65532:65532
WORKDIR /data
WORKDIR /app
EXPOSE 5000
HEALTHCHECK --interval=10s --timeout=3s --start-period=10s --start-interval=0.2s \
    CMD ["python", "-IS", "/app/healthcheck.py"]
CMD ["python", "-m", "serve"]

# ---- runtime: the last stage is what `docker build .` gives ------------------------------------------------------------
FROM service AS runtime
