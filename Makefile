# Everything is installed into .venv. `make` alone lists the targets.

# The first Python that runs and is new enough; `make install PYTHON=/path/to/python` picks another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP = .venv/bin/python -m pip --disable-pip-version-check --quiet
# Many tests mostly wait, so three processes keep two cores busy.
PYTEST = .venv/bin/python -m pytest -n 3 --dist loadfile
PORT ?= 8080

.PHONY: help install run test test-fast lint soak soak-proxies image-test week thirty bench bench-count audit lock clean

help: ## List the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-13s %s\n", $$1, $$2}' $(firstword $(MAKEFILE_LIST))

install: .venv/run ## Install what the relay runs on

run: .venv/run ## Run the relay without keys; it prints track calls and sends nothing (PORT=8080)
	@PORT=$(PORT) exec .venv/bin/python -m ops.try_out

test: .venv/dev ## Run all tests
	$(PYTEST)

test-fast: .venv/dev ## Run the tests that need neither gunicorn nor a browser
	$(PYTEST) -m "not gunicorn and not browser"

lint: .venv/dev ## Check format, style and types
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy .

soak: .venv/dev ## Check that no event is lost while everything fails (SECONDS=60; SEED= repeats a run)
	.venv/bin/python proof/soak.py $(or $(SECONDS),60) $(SEED)

soak-proxies: .venv/dev ## Check that no event is lost behind Caddy, nginx and HAProxy (SECONDS=20 for each)
	.venv/bin/python proof/soak_proxies.py $(or $(SECONDS),20)

image-test: .venv/bin/python ## Build the image and try it, with Docker or Podman (BUILD= arguments for the build)
	.venv/bin/python proof/image.py $(BUILD)

week: .venv/dev ## Print what each answer costs in a week (the table in docs/design.md)
	@.venv/bin/python proof/week.py

thirty: .venv/dev ## Show what thirty lines would do where this relay has more (the table in docs/design.md)
	@.venv/bin/python bench/thirty.py

bench: .venv/dev ## Measure the relay beside aiohttp, Go and others (needs wrk; writes docs/performance.md)
	.venv/bin/python bench/bench.py

bench-count: .venv/dev ## Count a webhook's instructions, beside bare Flask's (needs valgrind)
	@.venv/bin/python bench/count.py

# Strict: a package that could not be looked up counts as a failure.
audit: .venv/dev ## Look up known vulnerabilities of the pinned packages
	@.venv/bin/pip-audit --strict --require-hashes --disable-pip -r requirements.txt || { \
		echo; \
		echo "The audit failed. Either the table above lists vulnerabilities, or pip-audit could not look up"; \
		echo "a package at pypi.org (it says so above). In that case run it from a machine that can."; \
		exit 1; }

# The header of what it writes has the command, where Dependabot finds its options.
lock: .venv/dev ## Pin the dependencies again, with hashes (UPGRADE=--upgrade for newer versions)
	.venv/bin/pip-compile -q --strip-extras --allow-unsafe --generate-hashes --no-emit-index-url --no-emit-find-links $(UPGRADE) requirements.in
	.venv/bin/pip-compile -q --strip-extras --allow-unsafe --generate-hashes --no-emit-index-url --no-emit-find-links $(UPGRADE) requirements-dev.in

clean: ## Delete .venv
	rm -rf .venv

# Without pip it is only half made: Debian's python3 needs the package python3-venv.
.venv/bin/python .venv/bin/pip:
	@test -n "$(PYTHON)" || { echo "No Python 3.11 or newer found. Name one: make install PYTHON=/path/to/python"; exit 1; }
	$(PYTHON) -m venv .venv --clear

.venv/run: requirements.txt .venv/bin/pip
	$(PIP) install --require-hashes -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt .venv/run
	$(PIP) install --require-hashes -r requirements-dev.txt
	@touch $@
