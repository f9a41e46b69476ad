"""A real Prometheus over a real stack under load: every query of the dashboard has data, and the counters add up."""

from __future__ import annotations

import asyncio
import random
import re
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from cluster_process import ClusterProcess, until
from collector import Collector
from expressions import queries, rules
from prometheus import MISSING, Prometheus, installed, prometheus

from cluster.config import load_config
from cluster.run_folder import folder_for
from scheduler.metrics import ALL

pytestmark = [pytest.mark.long, pytest.mark.skipif(not installed(), reason=MISSING)]
TARGETS = {"ttft_s": 4.0, "tpot_s": 0.5}
SECRET = "the rivers of Atlantis"
STARTED = "Finished initializing replica."
EXPORTED_S = 25.0
"""Ray hands values on every ten seconds, and forgets a gauge after twenty."""
RAYS = {
    "Component", "NodeAddress", "SessionName", "Version", "WorkerId", "JobId", "NodeId", "otel_scope_name",
    "otel_scope_version", "otel_scope_schema_url", "instance", "job", "__name__", "le",
}


@pytest.fixture(scope="module")
def collector() -> Iterator[Collector]:
    with Collector.running() as collector:
        yield collector


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[ClusterProcess]:
    cluster = ClusterProcess(
        tmp_path_factory.mktemp("metrics"), llm={"deployment_config": {"num_replicas": 1}},
        headrace={
            "targets": TARGETS, "controller": {"min_finished": 10}, "tracing": {"otlp_endpoint": collector.endpoint},
        },
    )
    try:
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def scraped(cluster: ClusterProcess, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    with prometheus(tmp_path_factory.mktemp("prometheus"), cluster.metrics_port) as found:
        yield found


@pytest.fixture(scope="module")
def earlier() -> Counter[str]:
    """Outcomes of the requests of other tests."""
    return Counter()


class Load(threading.Thread):
    """Streaming and other chat requests above capacity until stopped; how many ended how."""

    def __init__(self, url: str, rate_rps: float) -> None:
        super().__init__(daemon=True)
        self._url, self._rate_rps, self._random = url, rate_rps, random.Random(1)
        self._stop_asked = threading.Event()
        self.outcomes: Counter[str] = Counter()

    def run(self) -> None:
        asyncio.run(self._all())

    def stop(self) -> None:
        """No more requests; those under way are waited for."""
        self._stop_asked.set()
        self.join(120.0)
        assert not self.is_alive()

    async def _all(self) -> None:
        async with httpx.AsyncClient(base_url=self._url, timeout=120.0, trust_env=False) as http:
            tasks = []
            while not self._stop_asked.is_set():
                tasks.append(asyncio.create_task(self._one(http, len(tasks))))
                await asyncio.sleep(self._random.expovariate(self._rate_rps))
            await asyncio.gather(*tasks)

    async def _one(self, http: httpx.AsyncClient, number: int) -> None:
        body = {
            "model": "smollm2-135m", "max_tokens": 24, "stream": number % 2 == 0,
            "messages": [{"role": "user", "content": f"{number}: tell me about {SECRET}."}],
        }
        async with http.stream("POST", "/v1/chat/completions", json=body) as answer:
            if number % 20 == 0 and answer.status_code == 200:
                self.outcomes["hung_up"] += 1
                return
            async for _ in answer.aiter_bytes():
                pass
        self.outcomes[{200: "completed", 429: "rejected"}.get(answer.status_code, str(answer.status_code))] += 1


def test_the_port_is_open_to_this_machine_only_and_up_prints_it(cluster: ClusterProcess) -> None:
    url = f"http://127.0.0.1:{cluster.metrics_port}/metrics"
    assert f"metrics at {url}" in cluster.log.read_text()
    addresses = {
        listening.laddr.ip for listening in psutil.net_connections("tcp")
        if listening.status == psutil.CONN_LISTEN and listening.laddr.port == cluster.metrics_port
    }
    assert addresses == {"127.0.0.1"}


def test_a_request_is_one_trace_from_the_client_to_the_last_token(
    cluster: ClusterProcess, collector: Collector, earlier: Counter[str]
) -> None:
    trace_id, parent = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"
    answer = cluster.http.post(
        "/v1/chat/completions", headers={"traceparent": f"00-{trace_id}-{parent}-01"}, json={
            "model": "smollm2-135m", "max_tokens": 8, "messages": [{"role": "user", "content": f"{SECRET}?"}],
        },
    )
    assert answer.status_code == 200, answer.text
    earlier["completed"] += 1
    wanted = {"route", "queue", "prefill", "decode", "llm_request"}
    spans = until(lambda: collector.spans(trace_id, wanted), 60.0, lambda: str(collector.spans(trace_id, set())))
    assert spans["route"].parent == parent
    assert {spans[name].parent for name in wanted - {"route"}} == {spans["route"].id}
    assert spans["queue"].attributes["headrace.decision"] == "admitted"
    assert spans["queue"].attributes["headrace.waited_s"] >= 0
    assert spans["route"].attributes["headrace.outcome"] == "completed"
    assert spans["decode"].attributes["headrace.output_tokens"] == 8
    order = [spans[name].start_s for name in ("route", "queue", "prefill", "decode")]
    assert order == sorted(order) and spans["decode"].end_s <= spans["route"].end_s + 0.1
    assert not any(SECRET in str(span) for span in spans.values())


def test_every_query_of_the_dashboard_has_data_under_load_and_the_counters_add_up(
    cluster: ClusterProcess, scraped: Prometheus, earlier: Counter[str]
) -> None:
    load = Load(cluster.url, rate_rps=6.0)
    load.outcomes.update(earlier)
    load.start()
    try:
        missing = dict(queries())

        def has_data() -> bool:
            empty = {title: query for title, query in queries() if not scraped.query(query)}
            missing.clear()
            missing.update(empty)
            return not empty

        until(has_data, 120.0, lambda: f"no data: {missing}\n{load.outcomes}")
        broken = [rule for rule in scraped.rules() if rule["health"] != "ok"]
        assert not broken and {rule["name"] for rule in scraped.rules()} == {
            rule.get("alert") or rule["record"] for rule in rules()
        }
    finally:
        load.stop()
    # It tells an engine how many the ingress has rejected since the one before.
    last = cluster.http.post("/v1/chat/completions", json={
        "model": "smollm2-135m", "max_tokens": 2, "messages": [{"role": "user", "content": "last"}],
    })
    assert last.status_code == 200, last.text
    load.outcomes["completed"] += 1

    def name(of: str) -> str:
        return f"sum(ray_headrace_{of}) or vector(0)"

    def is_settled() -> bool:
        ended = sum(scraped.total(name(f"{kind}_total")) for kind in ("completed", "aborted", "rejected", "recalled"))
        started = scraped.total(name("http_requests_started_total"))
        return (
            bool(ended) and scraped.total(name("arrivals_total")) == ended
            and scraped.total(name("requests_in_flight")) == 0
            and started == scraped.total(name("http_requests_total")) == sum(load.outcomes.values())
        )

    totals = 'sum by (__name__) ({__name__=~"ray_headrace.*(_total|_flight)"})'
    until(is_settled, 2 * EXPORTED_S, lambda: f"{load.outcomes} {scraped.query(totals)}")
    reasons = scraped.query("sum by (outcome, reason) (ray_headrace_http_requests_total)")
    by_outcome = {labels["outcome"]: round(value) for labels, value in scraped.query(
        "sum by (outcome) (ray_headrace_http_requests_total)"
    )}
    assert by_outcome == dict(load.outcomes), reasons
    assert by_outcome["completed"] > 20 and by_outcome["rejected"] > 0
    assert scraped.total(name("rejected_total")) == by_outcome["rejected"]
    observed = scraped.total("sum(ray_headrace_http_request_seconds_count)")
    assert round(observed) == by_outcome["completed"]


def test_labels_are_those_declared_and_never_a_request(cluster: ClusterProcess, scraped: Prometheus) -> None:
    declared = {label for metric in ALL for label in metric.labels} | RAYS
    series = scraped.query('{__name__=~"ray_headrace_.*"}')
    assert len(series) > 100 and {label for labels, _ in series for label in labels} <= declared
    assert {labels["model"] for labels, _ in series if "model" in labels} <= {"smollm2-135m", "none"}
    names = set(cluster.state()["replicas"])
    assert {labels["replica"] for labels, _ in series if "replica" in labels} == names


def test_the_logs_have_changes_and_no_requests(cluster: ClusterProcess, scraped: Prometheus) -> None:
    """After hundreds of requests, some of which hung up, and a pin."""
    folder = folder_for(load_config(cluster.config, with_engine=False)).logs

    def texts() -> dict[str, str]:
        return {path.name: path.read_text(errors="replace") for path in folder.parent.rglob("*") if _is_log(path)}

    def changes() -> str:
        (text,) = [text for name, text in texts().items() if name.startswith("headrace_controller_")]
        return text

    assert cluster.put({"thresholds": {"max_running": 30}, "pin": True, "reason": "a test"}).status_code == 200
    until(lambda: re.search(r"pin of smollm2-135m by .*: a test \(.*max_running none -> 30", changes()), 30.0, changes)
    assert cluster.put({"auto": True}).status_code == 200
    assert re.search(r"thresholds of \S+: version \d+ -> \d+: .+ \(fluid\.\S+ \S+ -> .+\)", changes()), changes()
    for name, text in texts().items():
        assert SECRET not in text, f"{name} has a prompt"
        served = text.rpartition(STARTED)[2]  # while a replica starts, questions to it fail
        assert "Traceback" not in served, f"{name}:\n{served[:3000]}"
        requests = [line for line in text.splitlines() if "/v1/chat/completions" in line]
        assert len(requests) < 5, f"{name} has lines of single requests: {requests[:3]}"


def _is_log(path: Path) -> bool:
    return path.is_file() and path.suffix in {".log", ".err", ".out"}


def test_a_controller_that_hangs_is_noticed(cluster: ClusterProcess, scraped: Prometheus) -> None:
    def pending() -> list[Any]:
        return scraped.query('ALERTS{alertname="HeadraceControllerSilent"}')

    until(lambda: scraped.total("max(ray_headrace_controller_up)") == 1 and not pending(), EXPORTED_S)
    (controller,) = [child for child in cluster.children() if "ControllerActor" in " ".join(child.cmdline())]
    controller.send_signal(signal.SIGSTOP)
    try:
        until(pending, 2 * EXPORTED_S + 20.0, lambda: str(scraped.query('{__name__=~"ray_headrace_controller.*"}')))
        until(lambda: not scraped.query("ray_headrace_load_ratio"), EXPORTED_S + 10.0)  # what it knew does not stay
    finally:
        controller.send_signal(signal.SIGCONT)
    until(lambda: scraped.query("ray_headrace_load_ratio") and not pending(), 2 * EXPORTED_S)

