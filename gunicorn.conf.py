"""How gunicorn runs the relay: each value beside the outside number that it must fit."""

import os
import resource
import sys
from typing import Any

import logs
import shared
from config import Config, ConfigError
from dead_letters import file_problem
from worker import Worker

CONNECTIONS = 2000  # a worker
FEWEST_CONNECTIONS = 100
OTHER_FILES = 124  # a worker's uploads, dead letters and its own

try:
    _config = Config.from_env(os.environ)
except ConfigError:
    # Never served: on_starting ends the start, with these and all other problems.
    _config = Config.from_env({"DRY_RUN": "1"})

_shared = shared.of_service()  # made here, before the workers are forked, so that all have the same


def on_starting(server: Any) -> None:
    """Before anything listens: one readable message instead of workers that die one by one."""
    try:
        Config.from_env(os.environ, file_problem)
        if worker_connections < FEWEST_CONNECTIONS:
            enough = FEWEST_CONNECTIONS + OTHER_FILES
            raise ConfigError([f"A worker may not have enough files open (ulimit -n): it needs {enough}."])
    except ConfigError as error:
        sys.exit(str(error))
    logs.set_up(_config.log_level)
    for warning in _config.warnings:
        server.log.warning(warning)


def on_reload(server: Any) -> None:
    logs.set_up(_config.log_level)  # gunicorn has made its own anew


def pre_fork(server: Any, worker: Any) -> None:
    taken = {other.row for other in server.WORKERS.values()}
    worker.row = next((row for row in range(shared.ROWS) if row not in taken), 0)


def post_fork(server: Any, worker: Any) -> None:
    _shared.counts.use_row(worker.row)


def _open_files(wanted: int) -> int:
    """Return how many files a worker may have open, at most `wanted`; raises the usual limit, 1,024, where it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)


bind = f"0.0.0.0:{_config.port}"
# A dry run has one, which remembers the webhooks that the page shows.
workers = 1 if _config.dry_run else _config.workers

# A webhook mostly waits for Segment: greenlets wait by the thousand, slow clients with them.
worker_class = Worker
worker_connections = max(1, _open_files(CONNECTIONS + OTHER_FILES) - OTHER_FILES)
# Waiting here costs milliseconds; a refused connection costs an hour.
backlog = 2048

# Heroku's router keeps idle connections for 90 s (devcenter.heroku.com, HTTP routing). The side
# that closes first may close on a request that is on its way, so that is never us.
keepalive = 95
# What is in flight is answered within 3.5 s. Heroku kills after 30 s.
graceful_timeout = 10
# A worker whose event loop is stuck for this long is replaced.
timeout = 30

# Who sent what is nobody's business: no access log. (Heroku's router has one, without bodies.)
accesslog = None
loglevel = _config.log_level

# By default gunicorn obeys SCRIPT_NAME and PATH_INFO *headers* of a proxy. Nobody needs them,
# and a stranger's would be a 500.
forwarder_headers = ""
# Not used, and one socket less to guard.
control_socket_disable = True
