"""Shared settings of all tests, the markers that say what a test needs, and `--fast`.

A test needs what its module imports, directly or through our own packages, and what the test or a fixture of its module
imports when it runs: `engine` for vLLM, `ray` for Ray. What is only reached through a command that a test calls cannot
be seen in the source; such a test carries its marker itself.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from import_graph import packages_reached

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

TESTS = Path(__file__).parent
MARKER_OF_FOLDER = {TESTS / "e2e": "cluster", TESTS / "helm": "chart"}
MARKER_OF_PACKAGE = {"vllm": "engine", "torch": "engine", "ray": "ray"}
NOT_FAST = {"engine", "ray", "cluster", "chart", "slow"}


class Blocker:
    """Makes importing vLLM or Ray an error, in whatever way a test comes to it."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        """Python's import system asks this first."""
        package = name.partition(".")[0]
        if package in MARKER_OF_PACKAGE:
            marker = MARKER_OF_PACKAGE[package]
            raise ImportError(f"the fast check imports {package}: mark the test {marker!r}, or remove the import")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--fast", action="store_true", help="only tests that need no vLLM, Ray, cluster or helm")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--fast"):
        sys.meta_path.insert(0, Blocker())
        settings.register_profile("fast", max_examples=25, deadline=None)  # `make test` tries more
        settings.load_profile("fast")


def markers(path: Path, functions: frozenset[str] = frozenset()) -> set[str]:
    """What the tests of a file need; with `functions`, also what these of its functions import."""
    by_folder = {marker for folder, marker in MARKER_OF_FOLDER.items() if folder in path.parents}
    reached = packages_reached(path, functions)
    return by_folder | {marker for package, marker in MARKER_OF_PACKAGE.items() if package in reached}


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    is_left_out = config.getoption("--fast") and collection_path.match("test_*.py") and markers(collection_path)
    return True if is_left_out else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        used = {getattr(item, "originalname", item.name), *getattr(item, "fixturenames", ())}
        for marker in markers(item.path, frozenset(used)):
            item.add_marker(marker)
    if config.getoption("--fast"):
        kept = [item for item in items if not NOT_FAST & {mark.name for mark in item.iter_markers()}]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept


@pytest.fixture(autouse=True, scope="module")
def _no_ray_is_left() -> Iterator[None]:
    """Building an application starts a Ray where there is none; the tests of other files must not find it."""
    yield
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()


@pytest.fixture(scope="session")
def chart() -> Iterator[Any]:
    """The Helm chart, loaded."""
    from chart_examples import CHART
    from helm_python import Chart

    with Chart.load(CHART) as loaded:
        yield loaded
