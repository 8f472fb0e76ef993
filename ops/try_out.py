"""What `make run` does: check the settings and the port, say where to look, and run the relay as a dry run."""

import os
import sys
from pathlib import Path

from config import Config, ConfigError
from server.preflight import file_problem, open_files_problem, port_problem

BANNER = """
Trying out the relay at http://localhost:{port}. DRY_RUN is on: nothing is sent to Segment.
Open that address in a browser, or send a webhook from another terminal:

  curl -d @tests/events/email_opened.json http://localhost:{port}/webhook
"""


def main() -> None:
    os.environ["DRY_RUN"] = "force"
    try:
        config = Config.from_env(os.environ, file_problem)
        if problem := open_files_problem() or port_problem([("127.0.0.1", config.port)]):
            raise ConfigError([problem])
    except ConfigError as error:
        sys.exit(str(error))
    print(BANNER.format(port=config.port), flush=True)
    gunicorn = str(Path(sys.executable).parent / "gunicorn")
    # Listen on this machine only: anyone who opens the page of a dry run sees its webhooks.
    os.execv(gunicorn, [gunicorn, "app:create_app()", "--bind", f"127.0.0.1:{config.port}"])  # noqa: S606


if __name__ == "__main__":
    main()
