"""How gunicorn runs the relay: each value beside the outside number that it must fit."""

import os
import resource
import shutil
import sys
import tempfile
from typing import Any

import gevent

# Where the workers' counts are added up; a folder of this service, gone with it.
if "PROMETHEUS_MULTIPROC_DIR" not in os.environ:
    os.environ["PROMETHEUS_MULTIPROC_DIR"] = tempfile.mkdtemp(prefix="relay-metrics-")

import metrics
import pause  # noqa: F401 - imported before the workers are forked, it is shared by them
from config import Config, ConfigError
from dead_letters import file_problem
from worker import Worker

try:
    _config = Config.from_env(os.environ)
except ConfigError:
    # Never served: on_starting ends the start, with these and all other problems.
    _config = Config.from_env({"DRY_RUN": "1"})


def on_starting(server: Any) -> None:
    """Before anything listens: one readable message instead of workers that die one by one."""
    try:
        Config.from_env(os.environ, file_problem)
    except ConfigError as error:
        sys.exit(str(error))
    for warning in _config.warnings:
        server.log.warning(warning)


def post_worker_init(worker: Any) -> None:
    def remember_now_and_then() -> None:
        while True:
            metrics.remember()
            gevent.sleep(5)

    gevent.spawn(remember_now_and_then)


def on_exit(server: Any) -> None:
    shutil.rmtree(os.environ["PROMETHEUS_MULTIPROC_DIR"], ignore_errors=True)


def _open_files(wanted: int) -> int:
    """Return how many files a worker may have open, at most `wanted`; raises the usual limit, 1,024, where it can."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return wanted if soft == resource.RLIM_INFINITY else min(wanted, soft)


bind = f"0.0.0.0:{_config.port}"
# In a dry run one, which remembers the webhooks that the page shows.
workers = 1 if _config.dry_run else _config.workers
loglevel = _config.log_level

# A webhook mostly waits for Segment: greenlets wait in thousands, and slow clients with them.
worker_class = Worker
# So many are answered within 3.5 s even if all send at once: each takes the processor some 0.4 ms.
worker_connections = _open_files(2000 + 124) - 124  # the rest is for uploads and files
# Waiting here costs milliseconds; a refused connection costs an hour.
backlog = 2048

# Heroku's router keeps idle connections for 90 s (devcenter.heroku.com, HTTP routing). The side
# that closes first risks to close under a request: never us.
keepalive = 95
# What is in flight is answered within 3.5 s. Heroku kills after 30 s.
graceful_timeout = 10
# A worker whose loop does not turn for so long is stuck, and replaced.
timeout = 30

# Who sent what is nobody's business: no access log (Heroku's router has one, without bodies).
accesslog = None
# By default gunicorn obeys SCRIPT_NAME and PATH_INFO *headers* of a proxy. Nobody needs them,
# and a stranger's would be a 500.
forwarder_headers = ""
# Not used, and a socket less to guard.
control_socket_disable = True
