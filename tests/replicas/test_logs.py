"""Our log lines among Serve's: the same file, level and form."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from logging.config import dictConfig
from pathlib import Path

import pytest
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve._private.logging_utils import configure_component_logger
from ray.serve.schema import LoggingConfig

from cluster.config import LoggingConfig as Ours
from replicas import logs


@pytest.fixture(autouse=True)
def loggers() -> Iterator[None]:
    """As they were, afterwards."""
    names = (SERVE_LOGGER_NAME, *logs.PACKAGES)
    found = {name: logging.getLogger(name) for name in names}
    before = {name: (list(one.handlers), one.propagate, one.level) for name, one in found.items()}
    yield
    for handler in logging.getLogger(SERVE_LOGGER_NAME).handlers:
        handler.close()
    for name, (handlers, propagate, level) in before.items():
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = handlers, propagate
        logger.setLevel(level)


def serve_logs_to(folder: Path, **config: str) -> None:
    configure_component_logger(
        component_name="d", component_id="r", logging_config=LoggingConfig(logs_dir=str(folder), **config),
        max_bytes=1_000_000, backup_count=1,
    )


def lines(folder: Path) -> list[str]:
    for handler in logging.getLogger(SERVE_LOGGER_NAME).handlers:
        handler.flush()
    (file,) = folder.glob("*.log")
    return file.read_text().splitlines()


@pytest.mark.parametrize("encoding", ["TEXT", "JSON"])
def test_our_lines_are_in_serve_s_file_and_form(tmp_path: Path, encoding: str) -> None:
    serve_logs_to(tmp_path, encoding=encoding)
    logs.follow_serve()
    logging.getLogger("cluster.event_log").info("thresholds of %s: %s", "a", "settled")
    logging.getLogger("router.gate").debug("not at this level")
    (line,) = lines(tmp_path)
    if encoding == "JSON":
        assert json.loads(line)["message"] == "thresholds of a: settled" and json.loads(line)["levelname"] == "INFO"
    else:
        assert line.endswith("thresholds of a: settled") and "INFO" in line
    assert logs.form() == {"encoding": encoding, "log_level": "INFO"}


def test_the_lines_follow_a_new_configuration_of_serve(tmp_path: Path) -> None:
    old, new = tmp_path / "old", tmp_path / "new"
    serve_logs_to(old)
    logs.follow_serve()
    serve_logs_to(new, encoding="JSON")
    logging.getLogger("replicas.server").warning("a word")
    assert json.loads(lines(new)[0])["message"] == "a word" and not lines(old)
    LoggingConfig(**logs.form())


def test_lines_are_written_after_a_library_has_configured_its_loggers(tmp_path: Path) -> None:
    """As vLLM does at its import; it closes every handler of the process."""
    serve_logs_to(tmp_path)
    logs.follow_serve()
    dictConfig({"version": 1, "disable_existing_loggers": False})
    logging.getLogger("cluster.event_log").info("thresholds of a")
    assert lines(tmp_path)[0].endswith("thresholds of a")


def test_our_setting_is_serve_s_own_without_a_line_for_each_request() -> None:
    config = LoggingConfig(**Ours().model_dump())
    assert (config.encoding, config.log_level, config.enable_access_log) == ("TEXT", "INFO", False)
