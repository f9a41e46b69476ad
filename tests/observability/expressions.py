"""The expressions of the rules and of the Grafana dashboard, and the series they name."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

import yaml
from import_graph import ROOT

FILES = ROOT / "helm" / "headrace" / "files"
RULES = FILES / "rules.yaml"
DASHBOARD = FILES / "grafana-dashboard.json"
_SERIES = re.compile(r"\b(?:ray_[a-z0-9_]+|headrace:[a-z0-9_:]+|ALERTS)\b")
_VARIABLES = {"$model": ".*", "$replica": ".*", "$__rate_interval": "1m"}


def rules() -> list[dict[str, Any]]:
    """All recording and alert rules."""
    return [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]


def dashboard() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return found


def panels() -> list[dict[str, Any]]:
    """The panels that draw something."""
    return [panel for panel in dashboard()["panels"] if panel["type"] != "row"]


def queries() -> Iterator[tuple[str, str]]:
    """Each query of the dashboard with its panel's title, variables filled in."""
    for panel in panels():
        for target in panel["targets"]:
            yield panel["title"], filled(target["expr"])


def filled(expression: str) -> str:
    """An expression of the dashboard as Grafana would send it, for all models and replicas."""
    for name, value in _VARIABLES.items():
        expression = expression.replace(name, value)
    return expression


def series_in(expression: str) -> set[str]:
    """The names of the series that an expression reads."""
    return set(_SERIES.findall(expression))
