"""The rules fire when they should, and rules and dashboard read only series that there are."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
from expressions import RULES, dashboard, panels, queries, rules, series_in
from import_graph import ROOT
from test_docs_paths import anchors_of

from scheduler.metrics import ALL, Kind

HERE = Path(__file__).parent
VLLM = {"ray_vllm_prefix_cache_hits_total", "ray_vllm_prefix_cache_queries_total"}
"""Series of vLLM that the dashboard shows; the run against a real Prometheus finds them."""


def declared() -> set[str]:
    """Every series of ours in a scrape of Ray's agent."""
    found = set()
    for metric in ALL:
        parts = ("_bucket", "_sum", "_count") if metric.kind is Kind.HISTOGRAM else ("",)
        found |= {f"ray_{metric.exposed}{part}" for part in parts}
    return found


@pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is missing: apt-get install prometheus")
def test_each_alert_fires_on_its_own_trouble_and_on_no_other() -> None:
    run = subprocess.run(["promtool", "test", "rules", HERE / "rules_test.yaml"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


def test_each_alert_is_tested_and_has_its_section_in_the_runbook() -> None:
    anchors = anchors_of((ROOT / "docs" / "runbook.md").read_text())
    tested = set(re.findall(r"alertname: (\w+)", (HERE / "rules_test.yaml").read_text()))
    alerts = [rule for rule in rules() if "alert" in rule]
    assert {rule["alert"] for rule in alerts} == tested and len(alerts) >= 9
    for rule in alerts:
        anchor = rule["alert"].lower()
        assert rule["annotations"]["runbook_url"] == f"docs/runbook.md#{anchor}" and anchor in anchors
        assert rule["annotations"]["summary"] and rule["labels"]["severity"] in {"info", "warning", "critical"}


def test_rules_read_declared_series_and_recorded_ones_only() -> None:
    recorded = {rule["record"] for rule in rules() if "record" in rule}
    read = {series for rule in rules() for series in series_in(rule["expr"])}
    assert read <= declared() | recorded
    assert "ray_headrace" in RULES.read_text() and len(read) > 15, "the series are found at all"


def test_the_dashboard_reads_series_that_there_are() -> None:
    read = {series for _, query in queries() for series in series_in(query)}
    assert read - declared() == VLLM
    others = [one["expr"] for one in dashboard()["annotations"]["list"]]
    assert set().union(*map(series_in, others)) <= declared() | {"ALERTS"}
    assert not any("$" in query for _, query in queries()), "an unknown variable"


def test_every_panel_says_what_it_shows_and_none_is_twice_there() -> None:
    titles = [panel["title"] for panel in panels()]
    assert len(titles) == len(set(titles)) > 20
    assert all(panel["description"] and panel["targets"] for panel in panels())
    assert {panel["datasource"]["uid"] for panel in panels()} == {"${datasource}"}, "no data source of one site"
    places = [tuple(panel["gridPos"].values()) for panel in dashboard()["panels"]]
    assert len(places) == len(set(places))
