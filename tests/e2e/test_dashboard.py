"""The dashboard over a real cluster under load: charts move, a pin takes effect on the engines, nothing leaves home."""

from __future__ import annotations

import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from browser import NEEDS_CHROMIUM, Tab, chromium, tab_at
from cluster_process import CHECKOUT, HEADRACE, ClusterProcess, until

pytestmark = [pytest.mark.timeout(900), pytest.mark.long, NEEDS_CHROMIUM]
EVIL = "<img src=x onerror=window.stolen=1>"
KEY = "sk-operator-of-this-test"
PINNED = 3


class Load:
    """Clients that ask for one answer after the other; a rejected one comes back a little later."""

    def __init__(self, url: str, clients: int) -> None:
        self._stop = threading.Event()
        self.answered = self.rejected = 0
        self._threads = [threading.Thread(target=self._ask, args=(url,), daemon=True) for _ in range(clients)]
        for thread in self._threads:
            thread.start()

    def _ask(self, url: str) -> None:
        body = {"model": "smollm2-135m", "messages": [{"role": "user", "content": "Tell me a long story."}],
                "max_tokens": 40, "ignore_eos": True}
        headers = {"Authorization": f"Bearer {KEY}"}
        with httpx.Client(base_url=url, timeout=120.0, trust_env=False, headers=headers) as http:
            while not self._stop.is_set():
                status = http.post("/v1/chat/completions", json=body).status_code
                self.answered += status == 200
                self.rejected += status == 429
                self._stop.wait(0.0 if status == 200 else 0.5)

    def end(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(120.0)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ClusterProcess]:
    cluster = ClusterProcess(
        tmp_path_factory.mktemp("dashboard"), env={"HEADRACE_API_KEY": KEY},
        headrace={"targets": {"ttft_s": 20.0, "tpot_s": 2.0}, "controller": {"period_s": 1.0}},
    )
    try:
        cluster.wait_until_ready()
        yield cluster
    finally:
        cluster.stop()


def shown(tab: Tab, chart: str, label: str) -> str:
    """The latest value of a line."""
    row = tab.page.locator(f"#chart-{chart} .legend tr", has_text=label).first
    return str(row.locator("td").inner_text())


def replicas(cluster: ClusterProcess) -> list[dict[str, Any]]:
    return [one for one in cluster.state()["replicas"].values() if one["reachable"]]


def test_the_page_follows_a_real_cluster_and_a_pin_takes_effect(cluster: ClusterProcess) -> None:
    load = None
    with chromium() as browser, tab_at(browser, f"{cluster.url}/dashboard") as tab:
        tab.page.get_by_role("dialog").get_by_label("Key").fill(KEY)
        tab.complaints.clear()  # the browser logs the 401 for which the page asks for the key
        tab.page.get_by_role("button", name="Show the dashboard").click()
        tab.page.get_by_role("heading", name="Healthy").wait_for(timeout=60_000)
        assert "All 2 replicas answer" in tab.text("#health-sentences")
        try:
            load = Load(cluster.url, 12)
            until(lambda: load.answered > 0, 120)
            drawn = "document.querySelector('#chart-requests canvas').toDataURL()"
            tab.until("document.querySelector('#chart-requests canvas')", 60)
            before = tab.page.evaluate(drawn)
            until(lambda: float(shown(tab, "requests", "good").split()[0]) > 0, 60, lambda: tab.text("#charts"))
            assert tab.page.evaluate(drawn) != before
            until(lambda: shown(tab, "iteration", "predicted").endswith("s"), 60, lambda: tab.text("#charts"))
            until(lambda: "of capacity" in tab.text("#load") or "× capacity" in tab.text("#load"), 60,
                  lambda: tab.text("#now"))
            assert "requests/s arrive" in tab.text("#load .sentence")
            assert max(one["running"] for one in replicas(cluster)) > PINNED, "enough load for the pin to matter"
            _pin(tab, cluster)
        finally:
            if load is not None:
                load.end()
        assert tab.complaints == [] and tab.origins() == {cluster.url}


def _pin(tab: Tab, cluster: ClusterProcess) -> None:
    form = tab.page.locator("#thresholds-form")
    form.get_by_label("Most running requests").fill(str(PINNED))
    form.get_by_label("Why").fill(EVIL)
    form.get_by_role("button", name="Predict").click()
    form.locator(".prediction table").wait_for()
    assert all(one["thresholds"]["max_running"] != PINNED for one in replicas(cluster)), "only predicted"
    form.get_by_role("button", name="Apply").click()
    form.get_by_text("In force").wait_for()
    assert [one["thresholds"]["max_running"] for one in replicas(cluster)] == [PINNED] * 2
    assert all(one["thresholds"]["pinned"] for one in replicas(cluster))
    until(lambda: all(one["running"] <= PINNED for one in replicas(cluster)), 60, lambda: str(cluster.state()))
    tab.page.locator("#replicas .tag", has_text="pinned").first.wait_for()
    tab.page.locator("#events", has_text=EVIL).wait_for()
    assert tab.page.evaluate("window.stolen ?? 0") == 0 and tab.page.locator("main img").count() == 0
    form.get_by_label("Action").select_option("auto")
    form.get_by_role("button", name="Predict").click()
    form.locator(".prediction table").wait_for()
    form.get_by_role("button", name="Apply").click()
    until(lambda: not any(one["thresholds"]["pinned"] for one in replicas(cluster)), 30)
    tab.page.locator("#events", has_text="resumed automatic tuning").wait_for()


def test_a_wrong_prediction_is_a_sentence(cluster: ClusterProcess) -> None:
    for body, said in (
        ({"settings": {"targets": {"tpot_s": -1}}}, "tpot_s"),
        ({"thresholds": {"max_running": 10_000}}, "max_num_seqs = 64"),
        ({"model": "none"}, "the models are smollm2-135m"),
    ):
        answer = cluster.http.post("/admin/predict", json=body)
        assert answer.status_code in (400, 404) and said in answer.json()["error"]["message"]
    more = cluster.http.post("/admin/predict", json={"replicas": 3, "rate_rps": 1000.0}).json()
    assert more["then"]["replicas"] == 3 and more["then"]["goodput_rps"] <= more["then"]["capacity_rps"] < 1000.0


def test_the_terminal_says_the_same_until_ctrl_c(cluster: ClusterProcess) -> None:
    watching = subprocess.Popen(
        [HEADRACE, "status", "--watch", "--url", cluster.url], cwd=CHECKOUT, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True, env={"HEADRACE_API_KEY": KEY, "COLUMNS": "80", "PATH": "/usr/bin:/bin"},
    )
    time.sleep(8.0)  # to see it ask more than once
    assert watching.poll() is None
    watching.send_signal(signal.SIGINT)
    said, _ = watching.communicate(timeout=30)
    assert watching.returncode == 0 and "Traceback" not in said
    assert "How loaded?" in said and "One more replica?" in said


def test_it_says_when_the_server_has_stopped(cluster: ClusterProcess) -> None:
    with chromium() as browser, tab_at(browser, f"{cluster.url}/dashboard") as tab:
        tab.page.get_by_role("dialog").get_by_label("Key").fill(KEY)
        tab.page.get_by_role("button", name="Show the dashboard").click()
        tab.page.locator("#replicas tbody tr").nth(1).wait_for()
        cluster.stop()
        tab.page.get_by_text("The server has not answered since").wait_for(timeout=60_000)
        assert tab.text("#health-title") == "No answer" and tab.page.locator("canvas").count() > 0
