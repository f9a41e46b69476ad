"""One replica, two under load, one again, on a real cluster: by the controller's decision, and no request fails."""

from __future__ import annotations

import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from cluster_process import HEADRACE, ClusterProcess, until

pytestmark = [pytest.mark.timeout(1200), pytest.mark.long]
STARTED_WITHIN_S, GONE_WITHIN_S = 300.0, 300.0


class Load:
    """Short requests at a steady pace, each from a thread of its own; what did not end with 200 or 429 is a failure."""

    def __init__(self, url: str, every_s: float) -> None:
        self._url, self._every_s, self._stop = url, every_s, threading.Event()
        self.codes: list[int] = []
        self.failures: list[str] = []
        self._threads: list[threading.Thread] = []
        self._pace = threading.Thread(target=self._send, daemon=True)
        self._pace.start()

    def _send(self) -> None:
        while not self._stop.wait(self._every_s):
            one = threading.Thread(target=self._one, daemon=True)
            self._threads.append(one)
            one.start()

    def _one(self) -> None:
        body = {
            "model": "smollm2-135m", "messages": [{"role": "user", "content": "Say something short."}],
            "max_tokens": 24, "temperature": 0, "ignore_eos": True,
        }
        try:
            answer = httpx.post(f"{self._url}/v1/chat/completions", json=body, timeout=240.0, trust_env=False)
        except httpx.HTTPError as error:
            self.failures.append(repr(error))
            return
        self.codes.append(answer.status_code)
        if answer.status_code not in (200, 429):
            self.failures.append(f"HTTP {answer.status_code}: {answer.text[:200]}")

    def end(self) -> None:
        self._stop.set()
        self._pace.join()
        for one in self._threads:
            one.join(240.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    """A replica that takes few requests at once, so that a small load needs two."""
    llm = {
        "deployment_config": {"num_replicas": None, "autoscaling_config": {"min_replicas": 1, "max_replicas": 2}},
        "engine_kwargs": {"max_num_seqs": 2},
    }
    cluster = ClusterProcess(
        tmp_path_factory.mktemp("autoscaling"), llm=llm, headrace={
            "targets": {"ttft_s": 20.0}, "controller": {"period_s": 2.0, "min_finished": 5},
            "autoscaling": {"start_up_s": 20.0},
        },
    )
    try:
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.stop()


def reachable(cluster: ClusterProcess) -> int:
    return sum(one["reachable"] for one in cluster.state(at_once=True)["replicas"].values())


def wanted(cluster: ClusterProcess) -> dict[str, Any]:
    return dict(cluster.state(at_once=True)["controller"].get("scaling", {}).get("smollm2-135m") or {})


def test_two_under_load_and_one_again_without_a_failed_request(cluster: ClusterProcess) -> None:
    until(lambda: wanted(cluster).get("replicas") == 1, 60, lambda: str(wanted(cluster)))
    load = Load(cluster.url, every_s=0.25)
    try:
        until(lambda: reachable(cluster) == 2, STARTED_WITHIN_S, lambda: f"{wanted(cluster)} {load.failures}")
        at_two = wanted(cluster)
        said = subprocess.run(
            [HEADRACE, "status", "--url", cluster.url], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    finally:
        load.end()
    assert at_two["replicas"] >= 2 and "rejected ones included" in at_two["reason"]
    assert "replicas wanted. " in " ".join(said.split()) and "are offered" in said
    until(lambda: wanted(cluster).get("measured"), 60, lambda: str(wanted(cluster)))
    gentle = Load(cluster.url, every_s=4.0)
    try:
        until(lambda: wanted(cluster)["replicas"] == 1, GONE_WITHIN_S, lambda: str(wanted(cluster)))
        until(lambda: reachable(cluster) == 1, GONE_WITHIN_S, lambda: f"{reachable(cluster)} replicas")
        time.sleep(5)  # requests go on after the second one has left
    finally:
        gentle.end()
    assert load.failures == gentle.failures == []
    assert load.codes.count(200) > 20 and gentle.codes.count(200) == len(gentle.codes) > 5
