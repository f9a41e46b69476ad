"""A real Prometheus over a running stack, with our rules."""

from __future__ import annotations

import contextlib
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import yaml
from cluster_process import free_port, running, until
from expressions import RULES

Sample = tuple[dict[str, str], float]
MISSING = "prometheus is missing: apt-get install prometheus"


def installed() -> bool:
    return shutil.which("prometheus") is not None


class Prometheus:
    def __init__(self, port: int) -> None:
        self._http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30.0, trust_env=False)

    def is_ready(self) -> bool:
        with contextlib.suppress(httpx.HTTPError):
            return self._http.get("/-/ready").status_code == 200
        return False

    def query(self, expression: str) -> list[Sample]:
        """The samples that an expression has now."""
        answer = self._http.get("/api/v1/query", params={"query": expression}).json()
        assert answer["status"] == "success", f"{expression}: {answer}"
        return [(one["metric"], float(one["value"][1])) for one in answer["data"]["result"]]

    def total(self, expression: str) -> float:
        """The sum of an expression's samples; 0 without any."""
        return sum(value for _, value in self.query(expression))

    def rules(self) -> list[dict[str, Any]]:
        groups = self._http.get("/api/v1/rules").json()["data"]["groups"]
        return [rule for group in groups for rule in group["rules"]]


@contextlib.contextmanager
def prometheus(folder: Path, target_port: int) -> Iterator[Prometheus]:
    """One that scrapes a metrics agent every two seconds, and evaluates our rules as often."""
    port = free_port()
    rules = folder / "rules.yaml"
    text = yaml.safe_load(RULES.read_text())
    for group in text["groups"]:
        group.pop("interval", None)
    rules.write_text(yaml.safe_dump(text))
    config = folder / "prometheus.yml"
    config.write_text(yaml.safe_dump({
        "global": {"scrape_interval": "2s", "evaluation_interval": "2s"}, "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": "ray", "static_configs": [{"targets": [f"127.0.0.1:{target_port}"]}]}],
    }))
    with (folder / "prometheus.log").open("w") as log, running(subprocess.Popen(
        [
            "prometheus", f"--config.file={config}", f"--storage.tsdb.path={folder / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log, stderr=log,
    )):
        found = Prometheus(port)
        until(found.is_ready, 30.0, (folder / "prometheus.log").read_text)
        yield found
