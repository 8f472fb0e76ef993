# The commands of the README and of CI. Everything is installed into .venv, from nothing.

# The first Python that runs and is new enough; `make PYTHON=/path/to/python ...` names another.
PYTHON ?= $(shell for python in python3 python3.14 python3.13 python3.12 python3.11 /usr/bin/python3; do \
	$$python -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$python && break; done)
PIP = .venv/bin/python -m pip --disable-pip-version-check --quiet
PORT ?= 8080

.PHONY: install run test lint soak week bench audit lock clean

install: .venv/run

run: .venv/run
	@echo
	@echo "Trying out the relay: http://localhost:$(PORT), with DRY_RUN=1. Nothing is sent to Segment."
	@echo "Open that address in a browser, or send it a webhook from another terminal:"
	@echo
	@echo "  curl -d @tests/events/legacy.json http://localhost:$(PORT)/webhook"
	@echo
	@PORT=$(PORT) DRY_RUN=1 exec .venv/bin/gunicorn app:app

test: .venv/dev
	.venv/bin/python -m pytest

lint: .venv/dev
	.venv/bin/ruff format --check .
	.venv/bin/ruff check .
	.venv/bin/mypy .

# Nothing lost, whatever happens: SECONDS=60 of it, or as before with SEED=.
soak: .venv/dev
	.venv/bin/python proof/soak.py $(or $(SECONDS),60) $(SEED)

# What a policy of answers costs in a week; the README has the table.
week: .venv/dev
	@.venv/bin/python proof/week.py

# The relay beside bare Flask; needs wrk. Writes bench/RESULTS.md and bench/latency.svg.
bench: .venv/dev
	.venv/bin/python bench/bench.py

# Known vulnerabilities of what is pinned. Strictly: what could not be looked up is not sound.
audit: .venv/dev
	@.venv/bin/pip-audit --strict --require-hashes --disable-pip -r requirements.txt || { \
		echo; \
		echo "Not shown to be sound. Either the table above names vulnerabilities, or pip-audit could not look"; \
		echo "a package up at pypi.org (it says so above): then nothing is known, and it has to be run elsewhere."; \
		exit 1; }

# Pins everything that requirements*.in pull in, with the hashes of the files.
lock: .venv/dev
	$(PIP) install pip-tools
	CUSTOM_COMPILE_COMMAND="make lock" .venv/bin/pip-compile -q --strip-extras --allow-unsafe --generate-hashes --no-emit-index-url --no-emit-find-links $(UPGRADE) requirements.in
	CUSTOM_COMPILE_COMMAND="make lock" .venv/bin/pip-compile -q --strip-extras --allow-unsafe --generate-hashes --no-emit-index-url --no-emit-find-links $(UPGRADE) requirements-dev.in

clean:
	rm -rf .venv

.venv/bin/python:
	@test -n "$(PYTHON)" || { echo "This needs Python 3.11 or newer, as python3 or python3.x, or named: make PYTHON=..."; exit 1; }
	$(PYTHON) -m venv .venv

.venv/run: requirements.txt | .venv/bin/python
	$(PIP) install --require-hashes -r requirements.txt
	@touch $@

.venv/dev: requirements-dev.txt | .venv/run
	$(PIP) install --require-hashes -r requirements-dev.txt
	@touch $@
