"""Settings, pins and numbers of replicas change under six streams: nothing restarts that need not, no stream is cut."""

from __future__ import annotations

import json
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
import yaml
from cluster_process import CHECKOUT, HEADRACE, ClusterProcess, merge, until

pytestmark = [pytest.mark.timeout(900), pytest.mark.long]
FIRST = {"ttft_s": 60.0, "tpot_s": 20.0}
IN_FORCE_S = 2.0


class Streams:
    """Clients that stream one answer after the other; `failures` says what was not a whole answer."""

    def __init__(self, url: str, count: int) -> None:
        self._url, self._stop = url, threading.Event()
        self.answers, self.failures = 0, list[str]()
        self._clients = [threading.Thread(target=self._stream, daemon=True) for _ in range(count)]
        for client in self._clients:
            client.start()

    def _stream(self) -> None:
        body = {
            "model": "smollm2-135m", "messages": [{"role": "user", "content": "Tell me a long story."}],
            "max_tokens": 60, "temperature": 0, "stream": True, "ignore_eos": True,
        }
        with httpx.Client(base_url=self._url, timeout=120.0, trust_env=False) as http:
            while not self._stop.is_set():
                try:
                    self._one(http, body)
                except Exception as error:
                    self.failures.append(repr(error))
                    self._stop.wait(0.5)

    def _one(self, http: httpx.Client, body: dict[str, Any]) -> None:
        with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if answer.status_code != 200:
                self.failures.append(f"HTTP {answer.status_code}: {answer.read()[:200]!r}")
                self._stop.wait(0.5)
                return
            events = [line.removeprefix("data: ") for line in answer.iter_lines() if line]
        choices = [choice for event in events[:-1] for choice in json.loads(event).get("choices", [])]
        if events[-1:] != ["[DONE]"] or not any(choice["finish_reason"] == "length" for choice in choices):
            self.failures.append(f"cut: {events[-2:]}")
        self.answers += 1

    def end(self) -> None:
        self._stop.set()
        for client in self._clients:
            client.join(120.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    cluster = ClusterProcess(
        tmp_path_factory.mktemp("live"), headrace={"targets": FIRST, "controller": {"period_s": 1.0}}
    )
    try:
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.stop()


def processes(cluster: ClusterProcess, name: str) -> set[int]:
    """The process ids of a deployment's replicas."""
    found = set()
    for process in cluster.children():
        try:
            if f"ServeReplica:headrace:{name}" in " ".join(process.cmdline()):
                found.add(process.pid)
        except psutil.Error:
            continue
    return found


def deploy(cluster: ClusterProcess, **changes: Any) -> str:
    """`headrace up` again, on the changed file; what it says."""
    config = yaml.safe_load(cluster.config.read_text())
    merge(config["applications"][0]["args"], changes)
    cluster.config.write_text(yaml.safe_dump(config))
    return headrace("up", str(cluster.config))


def scale(cluster: ClusterProcess, replicas: int) -> str:
    config = yaml.safe_load(cluster.config.read_text())
    config["applications"][0]["args"]["llm_configs"][0]["deployment_config"]["num_replicas"] = replicas
    cluster.config.write_text(yaml.safe_dump(config))
    return headrace("up", str(cluster.config))


def headrace(*arguments: str) -> str:
    done = subprocess.run(
        [HEADRACE, *arguments], cwd=CHECKOUT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def reachable(cluster: ClusterProcess) -> dict[str, Any]:
    return {name: one for name, one in cluster.state(at_once=True)["replicas"].items() if one["reachable"]}


def tpots(cluster: ClusterProcess) -> set[Any]:
    """The TPOT targets that the engines have: by their settings, and by the thresholds that they obey."""
    found = set()
    for one in reachable(cluster).values():
        found |= {one["settings"]["targets"]["tpot_s"], one["thresholds"]["fluid"]["tpot_s"]}
    return found


def within(seconds: float, condition: Callable[[], Any], describe: Callable[[], Any]) -> float:
    begun = time.monotonic()
    until(condition, seconds, lambda: str(describe()))
    return time.monotonic() - begun


def test_changes_restart_nothing_and_cut_no_stream(cluster: ClusterProcess, tmp_path: Path) -> None:
    ingress, replicas = processes(cluster, "HeadraceIngress"), processes(cluster, "HeadraceServer")
    assert len(ingress) == 1 and len(replicas) == 2
    streams = Streams(cluster.url, 6)
    until(lambda: streams.answers + len(streams.failures) >= 2, 120)

    assert "nothing changed" in headrace("up", str(cluster.config))
    said = deploy(cluster, headrace={"targets": {"tpot_s": 15.0}})
    assert "targets.tpot_s 20.0 -> 15.0" in said
    within(IN_FORCE_S, lambda: tpots(cluster) == {15.0}, lambda: tpots(cluster))

    said = headrace("settings", "set", "targets.tpot_s=12", "--by", "anna", "--reason", "noon", "--url", cluster.url)
    assert "targets.tpot_s 15.0 -> 12.0" in said
    within(IN_FORCE_S, lambda: tpots(cluster) == {12.0}, lambda: tpots(cluster))
    event = next(one for one in reversed(cluster.events()) if one["kind"] == "settings")
    assert (event["by"], event["key"], event["new"]) == ("anna", "anonymous", {"targets.tpot_s": 12.0})
    wrong = cluster.http.put("/admin/settings", json={"settings": {"targets": {"tpot_s": -1}}})
    assert wrong.status_code == 400 and "tpot_s" in wrong.json()["error"]["message"]

    pinned = cluster.put({"thresholds": {"max_running": 24}, "by": "anna", "reason": "rush hour"})
    assert pinned.status_code == 200 and pinned.json()["pin"] == {"kept": True}

    assert processes(cluster, "HeadraceIngress") == ingress and processes(cluster, "HeadraceServer") == replicas
    said = scale(cluster, 1)
    assert "replicas 2 -> 1" in said
    assert "targets.tpot_s 12.0 -> 15.0" in said, "a deployment puts the file's targets in force again"
    until(lambda: len(processes(cluster, "HeadraceServer")) == 1, 120)
    (left,) = processes(cluster, "HeadraceServer")
    assert left in replicas and processes(cluster, "HeadraceIngress") == ingress

    assert "replicas 1 -> 2" in scale(cluster, 2)
    until(lambda: len(reachable(cluster)) == 2, 180)
    within(IN_FORCE_S + 1.0, lambda: all(
        one["thresholds"]["pinned"] and one["thresholds"]["max_running"] == 24 and one["pin"]["by"] == "anna"
        for one in reachable(cluster).values()
    ), cluster.state)
    assert {one["settings"]["targets"]["tpot_s"] for one in reachable(cluster).values()} == {15.0}
    assert left in processes(cluster, "HeadraceServer") and processes(cluster, "HeadraceIngress") == ingress

    streams.end()
    assert streams.failures == [] and streams.answers > 6
