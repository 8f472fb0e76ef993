"""Attaches to the application what people see of it: counts, log lines and the page."""

from collections.abc import Callable

from flask import Flask

from config import Config
from ops.monitor.metrics import Metrics
from ops.monitor.observe import observe
from ops.page import routes
from ops.page.inspector import Inspector
from relay.delivery import Message
from server.shared import Shared

Upload = Callable[[list[Message], float], None]


def watch(app: Flask, config: Config, shared: Shared) -> Callable[[Upload], Upload]:
    """Observe the webhooks of `app`, and add the routes of the page. Return what makes uploads count."""
    metrics, inspector = Metrics(shared, config), Inspector(config)
    observe(app, config, metrics, inspector)
    app.register_blueprint(routes.blueprint(config, metrics, shared.started, inspector))
    return metrics.count_uploads
