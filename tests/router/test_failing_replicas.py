"""Replicas that fail in every way, behind the real ingress, the real request router and Serve's proxy, over HTTP."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import fake_replicas
import httpx
import psutil
import pytest
import ray
from openai import APIError, OpenAI
from ray import serve

from cluster.ports import free_port
from replicas.actor_calls import ReplicaUnavailable, call_replica, replica_ids
from replicas.questions import ANSWER_S

pytestmark = [pytest.mark.timeout(400), pytest.mark.long]
HERE = Path(__file__).resolve().parent
PATHS = ("/v1/chat/completions", "/v1/completions")
WAIT_S = 60.0


class Cluster:
    """The application on a port of its own."""

    def __init__(self) -> None:
        port = free_port()
        path = os.pathsep.join((str(HERE.parents[1]), str(HERE)))
        ray.init(
            address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": path, "RAYLLM_ENABLE_WORKER_PROCESS_SETUP_HOOK": "0"}},
        )
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        serve.run(fake_replicas.application(), name="headrace")
        self.url = f"http://127.0.0.1:{port}"
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        self.openai = OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)
        for path in PATHS:  # imports what the first request needs
            assert self.post(path, stream=False).status_code == 200

    def wait_until_two_are_ready(self) -> None:
        deadline_s = time.monotonic() + WAIT_S
        while self.http.get("/readyz").json()["ready"] != 2:
            assert time.monotonic() < deadline_s
            time.sleep(0.2)

    def behave(self, replica: str, way: str) -> int:
        before: int = asyncio.run(call_replica(replica_ids("headrace")[replica], "behave", way=way))
        return before

    def hold(self) -> tuple[str, str]:
        """Have both replicas begin requests, and go on when they are told how; their names."""
        victim, other = replica_ids("headrace")
        for replica in (victim, other):
            self.behave(replica, "holds")
        return victim, other

    def wait_until_all_have_begun(self, requests: int, *replicas: str) -> None:
        """Each of the replicas that `hold` has some of them."""
        begun, deadline_s = Counter[str](), time.monotonic() + WAIT_S
        while begun.total() < requests:
            assert time.monotonic() < deadline_s
            begun += Counter({replica: self.behave(replica, "holds") for replica in replicas})
        assert all(begun[replica] for replica in replicas)

    def post(self, path: str, *, stream: bool) -> httpx.Response:
        return self.http.post(path, json=body(path, stream=stream))

    def answer(self, path: str, *, stream: bool) -> bool:
        """Whether the answer is whole."""
        answer = self.post(path, stream=stream)
        assert answer.status_code == 200, answer.text
        if not stream:
            return bool(answer.json()["choices"][0]["finish_reason"] == "stop")
        events = answer.text.strip().split("\n\n")
        return len(events) == fake_replicas.CHUNKS + 2 and events[-1] == "data: [DONE]"


def body(path: str, *, stream: bool) -> dict[str, Any]:
    asked: dict[str, Any] = {"messages": [{"role": "user", "content": "x"}]} if "chat" in path else {"prompt": "x"}
    return {"model": fake_replicas.MODEL, "stream": stream} | asked


@pytest.fixture(scope="module")
def running() -> Iterator[Cluster]:
    try:
        yield Cluster()
    finally:
        serve.shutdown()
        ray.shutdown()


@pytest.fixture
def cluster(running: Cluster) -> Cluster:
    """Two replicas that answer, and no memory of failures."""
    for replica in replica_ids("headrace"):
        with suppress(ReplicaUnavailable):  # dead, and about to be replaced
            running.behave(replica, "words")
    running.wait_until_two_are_ready()
    time.sleep(fake_replicas.OUT_FOR_S)
    return running


ASKED = [(path, stream) for path in PATHS for stream in (True, False)]


@pytest.mark.parametrize("way", ["failed", "leaves", "server error", "raises"])
def test_a_replica_that_fails_at_once_gets_one_request_and_the_client_sees_none_of_it(
    cluster: Cluster, way: str
) -> None:
    victim, other = replica_ids("headrace")
    cluster.behave(victim, way)
    # One request meets it; then many at once, of which a replica that fails in no time would get most.
    while cluster.behave(victim, way) == 0:
        assert cluster.answer(PATHS[0], stream=True)
    assert cluster.http.get("/readyz").json()["ready"] == 2
    with ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(cluster.answer, path, stream=stream) for path, stream in ASKED * 4]
        assert all(answer.result() for answer in answers)
    assert cluster.behave(victim, "words") <= 16, "it is back after a while, and meets one request then"
    assert cluster.behave(other, "words") >= 16


def test_rejections_and_the_client_s_errors_are_final(cluster: Cluster) -> None:
    for way, status in (("rejects", 429), ("client error", 400)):
        for replica in replica_ids("headrace"):
            cluster.behave(replica, way)
        for path, stream in ASKED:
            assert cluster.post(path, stream=stream).status_code == status
        assert sum(cluster.behave(replica, way) for replica in replica_ids("headrace")) == len(ASKED)


def test_when_both_fail_the_error_is_clean(cluster: Cluster) -> None:
    for way, status in (("failed", 503), ("raises", 500)):
        for replica in replica_ids("headrace"):
            cluster.behave(replica, way)
        answer = cluster.post(PATHS[0], stream=True)
        assert answer.status_code == status
        assert (answer.headers.get("retry-after") is not None) == (status == 503)
        assert "secret" not in answer.text and "Traceback" not in answer.text
        time.sleep(fake_replicas.OUT_FOR_S)


def test_a_replica_that_dies_at_once_loses_no_request(cluster: Cluster) -> None:
    victim, _ = replica_ids("headrace")
    cluster.behave(victim, "dies at once")
    for path, stream in ASKED:
        assert cluster.answer(path, stream=stream)


@pytest.mark.parametrize("way", ["dies later", "raises later", "error event"])
def test_a_stream_that_loses_its_replica_never_looks_complete(cluster: Cluster, way: str) -> None:
    asked = [(path, stream) for path, stream in ASKED for _ in range(3)]
    with ThreadPoolExecutor(len(asked)) as pool:
        victim, other = cluster.hold()
        answers = [pool.submit(cluster.post, path, stream=stream) for path, stream in asked]
        cluster.wait_until_all_have_begun(len(asked), victim, other)
        cluster.behave(other, "words")
        cluster.behave(victim, way)
        cut = 0
        for (_, stream), answer in zip(asked, answers, strict=True):
            text = answer.result().text
            if not stream:
                assert answer.result().status_code == 200, "given to the client whole or not at all, so tried again"
            elif "[DONE]" not in text:
                last = json.loads(text.strip().split("\n\n")[-1].removeprefix("data: "))
                assert last["error"]["code"] == 503 and "secret" not in text
                assert '"finish_reason": "stop"' not in text
                cut += 1
        assert cut > 0


@pytest.mark.parametrize("is_chat", [True, False])
def test_the_openai_client_raises_on_a_cut_stream(cluster: Cluster, is_chat: bool) -> None:
    cluster.hold()
    if is_chat:
        stream = cluster.openai.chat.completions.create(
            model=fake_replicas.MODEL, messages=[{"role": "user", "content": "x"}], stream=True
        )
    else:
        stream = cluster.openai.completions.create(model=fake_replicas.MODEL, prompt="x", stream=True)
    next(iter(stream))
    for replica in replica_ids("headrace"):
        cluster.behave(replica, "raises later")
    with pytest.raises(APIError):
        for _ in stream:
            pass


def test_readiness_does_not_wait_for_a_silent_engine(cluster: Cluster) -> None:
    victim, _ = replica_ids("headrace")
    cluster.behave(victim, "silent engine")
    slowest_s = 0.0
    deadline_s = time.monotonic() + WAIT_S
    while cluster.http.get("/readyz").json()["ready"] == 2:
        assert time.monotonic() < deadline_s
        time.sleep(0.1)
    for _ in range(20):
        for method in ("GET", "HEAD"):
            for path in ("/readyz", "/healthz"):
                begun_s = time.monotonic()
                answer = cluster.http.request(method, path)
                slowest_s = max(slowest_s, time.monotonic() - begun_s)
                assert answer.status_code == 200
                assert bool(answer.content) == (method == "GET")
    assert slowest_s < ANSWER_S, "it waited for the silent engine"
    assert cluster.http.get("/readyz").json() == {
        "status": "ready", "ready": 1, "replicas": 2, "models_without_replica": [],
    }
    begun_s = time.monotonic()
    state = cluster.http.get("/admin/state").json()["replicas"]
    assert time.monotonic() - begun_s < ANSWER_S
    assert (state[victim]["reachable"], state[victim]["last_answer_age_s"] > 1) == (False, True)


def test_a_killed_ingress_never_ends_a_stream_in_an_orderly_way(cluster: Cluster) -> None:
    ingress = [
        process for process in psutil.Process().children(recursive=True)
        if any("HeadraceIngress" in part or ":Ingress" in part for part in process.cmdline())
    ]
    stream = cluster.openai.chat.completions.create(
        model=fake_replicas.MODEL, messages=[{"role": "user", "content": "x"}], stream=True
    )
    chunks = iter(stream)
    next(chunks)
    with cluster.http.stream("POST", PATHS[1], json=body(PATHS[1], stream=True)) as raw:
        packets = raw.iter_bytes()
        next(packets)
        assert len(ingress) == 1
        os.kill(ingress[0].pid, signal.SIGKILL)
        with pytest.raises(httpx.RemoteProtocolError, match="incomplete chunked read"):
            b"".join(packets)
    with pytest.raises(APIError):
        list(chunks)
