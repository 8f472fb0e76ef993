# The relay and its packages; docs/operating.md, "Container", has the run command.
#
# Python packages are pinned by hash in requirements.txt. Pin the base image, too, before you rely on it.
# `docker buildx imagetools inspect python:3.14-slim` prints its digest, which goes behind the tag:
# python:3.14-slim@sha256:...
#
# `--build-arg PYTHON_IMAGE=...` names another base image. The default is a FROM, because Dependabot reads no ARG.
ARG PYTHON_IMAGE
# The newest Python for which all pinned packages have wheels.
FROM python:3.14-slim AS base

FROM ${PYTHON_IMAGE:-base} AS build
# Wheels only, because a source package would need a compiler, and would run its own code here.
COPY requirements.txt .
RUN python -m venv --without-pip /venv \
    && pip --python /venv/bin/python install --no-cache-dir --only-binary :all: --require-hashes -r requirements.txt
WORKDIR /app
# .dockerignore lists what goes into the image.
COPY . .
RUN python -m compileall -q .

FROM ${PYTHON_IMAGE:-base}
# Dead letters go here if DEAD_LETTER_FILE says so. A new volume gets this folder's owner.
RUN install -d -o 10001 -g 10001 -m 700 /var/lib/relay
COPY --from=build /venv /venv
COPY --from=build /app /app
WORKDIR /app
# gunicorn needs a small writable folder for its workers' heartbeat. Engines mount /dev/shm as memory
# even if the root file system is read-only; a disk could block a heartbeat.
ENV PATH=/venv/bin:$PATH \
    PYTHONDONTWRITEBYTECODE=1 \
    TMPDIR=/dev/shm
# A number, so that Kubernetes can verify that it isn't root.
USER 10001:10001
EXPOSE 8080
STOPSIGNAL SIGTERM
# Not urllib.request, which would ask a proxy from HTTP_PROXY.
HEALTHCHECK --start-period=10s --timeout=5s CMD ["python", "-I", "-c", "import http.client, os; \
    relay = http.client.HTTPConnection('127.0.0.1', int(os.environ.get('PORT') or 8080), timeout=4); \
    relay.request('GET', '/health'); \
    raise SystemExit(relay.getresponse().status != 200)"]
CMD ["gunicorn", "app:create_app()"]
# A release hands in its version, which config.py has.
ARG VERSION=unreleased
LABEL org.opencontainers.image.version=$VERSION
