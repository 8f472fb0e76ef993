"""Attaches to the application what people see of it: counts, log lines and the page."""

from flask import Flask

from config import Config
from ops.monitor.metrics import Metrics
from ops.monitor.observe import observe
from ops.page import routes
from ops.page.inspector import Inspector
from server.shared import Shared


def watch(app: Flask, config: Config, shared: Shared) -> Metrics:
    """Have the webhooks of `app` observed, and shown by the routes of the page. Return their counts."""
    metrics, inspector = Metrics(shared, config), Inspector(config)
    observe(app, config, metrics, inspector)
    app.register_blueprint(routes.blueprint(config, metrics, shared.started, inspector))
    return metrics
