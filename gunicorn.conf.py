"""gunicorn's settings, each with its reason."""

import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from gunicorn import glogging

sys.path.insert(0, str(Path(__file__).resolve().parent))  # with -c, gunicorn may have been started anywhere

from config import VERSION, Config, ConfigError
from server import log as logs
from server import preflight, shared
from server.connection import MAX_HEAD
from server.worker import Worker, keep_signals_of_forks


def _read_config() -> tuple[Config, ConfigError | None]:
    """Return the settings or, with what is wrong with them, placeholders for gunicorn to start with and refuse."""
    try:
        return Config.from_env(os.environ, preflight.file_problem, bundle_problem=preflight.bundle_problem), None
    except ConfigError as error:
        env = {"DRY_RUN": "1"}
        for name in ("LOG_LEVEL", "LOG_FORMAT"):  # one may be wrong, and the other right
            with suppress(ConfigError):
                Config.from_env(env | {name: os.environ.get(name, "")})
                env[name] = os.environ.get(name, "")
        return Config.from_env(env), error


_config, _error = _read_config()
logs.stream().stay()  # before -D
_shared = shared.of_service()  # before the workers are forked
keep_signals_of_forks()


class Logger(glogging.Logger):
    def setup(self, cfg: Any) -> None:
        super().setup(cfg)
        logs.set_up(_config.log_level, _config.log_format)


def nworkers_changed(server: Any, new: int, old: int | None) -> None:
    """The first of gunicorn's hooks: before --preload loads the application, with what gevent has yet to patch."""
    if old is None and server.cfg.preload_app:
        _refuse(server, ConfigError([preflight.other_server_problem()]))


def on_starting(server: Any) -> None:
    """Before anything listens: one readable message instead of a crash for each worker."""
    if _error:
        _refuse(server, _error)
    if problem := _worker_problem(server) or preflight.open_files_problem() or _port_problem(server):
        _refuse(server, ConfigError([problem]))
    server.log.info("Route to Segment %s", VERSION)
    for warning in filter(None, [*_config.warnings, _script_name_warning()]):
        server.log.warning(warning)


def _refuse(server: Any, error: ConfigError) -> None:
    if _config.log_format == "json":
        server.log.critical(str(error))
    else:
        logs.stream().write(f"{error}\n")
    sys.exit(1)


def _worker_problem(server: Any) -> str | None:
    # Without the parentheses gunicorn would take the function for the application, and fail on every webhook.
    wrong = server.app.app_uri == "app:create_app" or not issubclass(server.worker_class, Worker)
    return preflight.other_server_problem() if wrong else None


def _port_problem(server: Any) -> str | None:
    inherited = {"LISTEN_FDS", "GUNICORN_FD"} & set(os.environ)  # from systemd, or the gunicorn before this one
    return None if inherited or server.cfg.reuse_port else preflight.port_problem(server.cfg.address, seconds=3)


def _script_name_warning() -> str | None:
    if not (script_name := os.environ.get("SCRIPT_NAME")):
        return None
    return (
        f"SCRIPT_NAME is {script_name}: the relay answers at {script_name.rstrip('/')}/webhook, and at /webhook. "
        "Which of the two the address for Customer.io ends in depends on the proxy; unset SCRIPT_NAME if there is none."
    )


def pre_exec(server: Any) -> None:
    logs.stream().restore()


def pre_fork(server: Any, worker: Any) -> None:
    taken = {other.row for other in server.WORKERS.values()}
    worker.row = next((row for row in range(shared.ROWS) if row not in taken), 0)
    _shared.counts.use_row(worker.row)  # which the worker inherits


def post_fork(server: Any, worker: Any) -> None:
    _shared.in_our_worker = isinstance(worker, Worker)
    if _config.dry_run and sys.stdout:  # print() would hold up everybody while nobody reads
        sys.stdout = logs.Output()


bind = f"0.0.0.0:{_config.port}"
# The page of a dry run shows what its one worker remembers.
workers = 1 if _config.dry_run else _config.workers

# A webhook mostly waits for Segment: greenlets wait by the thousand, slow clients with them.
worker_class = Worker
worker_connections = max(1, preflight.connections())
# Waiting here costs milliseconds; a refused connection costs an hour.
backlog = 2048

# Heroku's router keeps idle connections for 90 s (devcenter.heroku.com, HTTP routing). Let it close
# first: the side that does may cut off a request that is on its way.
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
# gunicorn refuses a request in which two proxies disagree about https. The page reads X-Forwarded-Proto itself.
secure_scheme_headers: dict[str, str] = {}
# A cookie or a service mesh's trace may be long. connection.py limits the sum of all fields.
limit_request_field_size = MAX_HEAD
limit_request_line = 8190  # bytes, the most that gunicorn can
limit_request_fields = 200
# Not used: one socket less to guard.
control_socket_disable = True
