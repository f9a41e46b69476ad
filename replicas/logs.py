"""Where our log lines go: with those of Serve, in the form and from the level that `logging_config` asks for.

In a Serve replica our loggers write to the files of Serve's own. The controller is no Serve replica; it writes a file
of its own beside Serve's. The fence around Serve's non-public names of logging: `tests/replicas/test_logs.py`.
"""

from __future__ import annotations

import logging
import os

from ray._common.formatters import JSONFormatter
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig

PACKAGES = ("headrace", "cluster", "router", "replicas", "scheduler")


class _AsServe(logging.Handler):
    """Writes where Serve's handlers do.

    Past the buffer of Serve's file handler: a buffer is closed for good, and drops all lines, once any library in the
    process configures the loggers by `logging.config.dictConfig`, as vLLM does when it is imported.
    """

    def __init__(self) -> None:
        super().__init__()
        self._seen: tuple[logging.Handler, ...] = ()
        self._targets: list[tuple[logging.Handler, logging.Handler]] = []
        self._look()

    def _look(self) -> None:
        present = tuple(logging.getLogger(SERVE_LOGGER_NAME).handlers)
        if present != self._seen:  # Serve has been configured anew
            self._seen, self._targets = present, [(one, getattr(one, "target", None) or one) for one in present]

    def emit(self, record: logging.LogRecord) -> None:
        """Write a record."""
        self._look()
        for handler, target in self._targets:
            if handler.filter(record):
                target.handle(record)


def follow_serve() -> None:
    """Log as Serve does in this process, which is a Serve replica."""
    level, handler = logging.getLogger(SERVE_LOGGER_NAME).level, _AsServe()
    for package in PACKAGES:
        logger = logging.getLogger(package)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)


def form() -> dict[str, str]:
    """In which form and from which level on this process logs, for another process of ours."""
    serve = logging.getLogger(SERVE_LOGGER_NAME)
    targets = [getattr(handler, "target", None) or handler for handler in serve.handlers]
    is_json = any(isinstance(target.formatter, JSONFormatter) for target in targets)
    return {"encoding": "JSON" if is_json else "TEXT", "log_level": logging.getLevelName(serve.level or logging.INFO)}


def beside_serve(name: str, form: dict[str, str]) -> None:
    """Log into a file of this process's own, `NAME_PID.log` among Serve's; for an actor that is no Serve replica."""
    configure_component_logger(
        component_name=name, component_id=str(os.getpid()), logging_config=LoggingConfig(**form)
    )
    follow_serve()
