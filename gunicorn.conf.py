"""gunicorn's settings, each with its reason."""

import os
import sys
from contextlib import suppress
from typing import Any

from gunicorn import glogging

import logs
import shared
from config import VERSION, Config, ConfigError
from ops import preflight
from worker import Worker


def _read_config() -> Config:
    log = {name: os.environ[name] for name in ("LOG_LEVEL", "LOG_FORMAT") if name in os.environ}
    # Placeholders: on_starting reports the problems, in the form of the log, and exits.
    for env in (os.environ, {"DRY_RUN": "1"} | log):
        with suppress(ConfigError):
            return Config.from_env(env)
    return Config.from_env({"DRY_RUN": "1"})


_config = _read_config()
_shared = shared.of_service()  # before the workers are forked


class Logger(glogging.Logger):
    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        logs.set_up(_config.log_level, _config.log_format)


def on_starting(server: Any) -> None:
    """Before anything listens: one readable message instead of workers that die one by one."""
    try:
        Config.from_env(os.environ, preflight.file_problem)
        if problem := preflight.open_files_problem() or _port_problem(server):
            raise ConfigError([problem])
    except ConfigError as error:
        if _config.log_format == "text":
            sys.exit(str(error))
        server.log.critical(str(error))
        sys.exit(1)
    server.log.info("Route to Segment %s", VERSION)
    for warning in _config.warnings:
        server.log.warning(warning)


def _port_problem(server: Any) -> str | None:
    inherited = {"LISTEN_FDS", "GUNICORN_FD"} & set(os.environ)  # from systemd, or the gunicorn before this one
    return None if inherited or server.cfg.reuse_port else preflight.port_problem(server.cfg.address)


def pre_fork(server: Any, worker: Any) -> None:
    taken = {other.row for other in server.WORKERS.values()}
    worker.row = next((row for row in range(shared.ROWS) if row not in taken), 0)
    _shared.counts.use_row(worker.row)  # which the worker inherits


bind = f"0.0.0.0:{_config.port}"
# The page of a dry run shows what its one worker remembers.
workers = 1 if _config.dry_run else _config.workers

# A webhook mostly waits for Segment: greenlets wait by the thousand, slow clients with them.
worker_class = Worker
worker_connections = max(1, preflight.connections())
# Waiting here costs milliseconds; a refused connection costs an hour.
backlog = 2048

# Heroku's router keeps idle connections for 90 s (devcenter.heroku.com, HTTP routing). Let it close
# first: whoever does may close on a request that is on its way.
keepalive = 95
# What is in flight is answered within 3.5 s. Heroku kills after 30 s.
graceful_timeout = 10
# A worker whose event loop is stuck for this long is replaced.
timeout = 30

# No access log, for privacy. (Heroku's router has one, without bodies.)
accesslog = None
loglevel = _config.log_level
logger_class = Logger

# By default gunicorn obeys SCRIPT_NAME and PATH_INFO *headers* of a proxy. The relay doesn't need
# them, and a stranger's would cause a 500.
forwarder_headers = ""
# Not used, and one socket less to guard.
control_socket_disable = True
