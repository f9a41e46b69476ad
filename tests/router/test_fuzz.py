"""Schemathesis over the served OpenAPI document: whatever comes in, no 5xx, no insides of the server, no long echo.

In this process, over a fake model server; seeded and bounded.
"""

from __future__ import annotations

import json
import logging
from typing import Any

import pytest
from fake_engine_app import FakeApplication
from fastapi.testclient import TestClient
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

schemathesis = pytest.importorskip("schemathesis")

SETTINGS = settings(
    max_examples=25, deadline=None, derandomize=True, database=None, phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
INSIDES = ("Traceback", "site-packages", "/home/", "ray::", "File \"", " object at 0x")


@pytest.fixture(scope="module")
def application() -> Any:
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv("HEADRACE_API_KEY", raising=False)
        yield FakeApplication().stand_in(monkeypatch)


def judge(response: Any, caplog: pytest.LogCaptureFixture) -> None:
    text = response.text
    assert response.status_code < 500, text[:500]
    assert not [word for word in INSIDES if word in text]
    assert not [record for record in caplog.records if record.exc_info and record.name.startswith("router")]
    if response.status_code >= 400 and text:
        error = response.json()["error"]
        assert len(error["message"]) <= 600 and "\n" not in error["message"]
        assert error["param"] is None


@pytest.mark.long
def test_requests_by_the_document(application: FakeApplication, caplog: pytest.LogCaptureFixture) -> None:
    document = schemathesis.openapi.from_asgi("/openapi.json", application.app)
    document = document.exclude(path="/readyz")  # it says 503 where no replica runs
    tried = 0
    for operation in (result.ok() for result in document.get_all_operations()):

        @SETTINGS
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.NEGATIVE))
        def wrong(case: Any) -> None:
            caplog.clear()
            judge(case.call(), caplog)

        @SETTINGS
        @given(case=operation.as_strategy(generation_mode=schemathesis.GenerationMode.POSITIVE))
        def right(case: Any) -> None:
            caplog.clear()
            judge(case.call(), caplog)

        right()
        if operation.body:
            wrong()
        tried += 1
    assert tried >= 10


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=300),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12,
)
FIELDS = st.sampled_from(["version", "policy", "types", "segments", "max_running", "fluid", "reason", "mode", "x"])


def test_thresholds_of_any_kind(application: FakeApplication, caplog: pytest.LogCaptureFixture) -> None:
    http = TestClient(application.app, raise_server_exceptions=False)

    @settings(SETTINGS, max_examples=150)
    @given(replica=st.none() | JSON, thresholds=st.none() | JSON | st.dictionaries(FIELDS, JSON, max_size=4),
              pin=st.none() | JSON)
    def run(replica: Any, thresholds: Any, pin: Any) -> None:
        caplog.clear()
        body = json.dumps({"replica": replica, "thresholds": thresholds, "pin": pin}).encode()
        response = http.put("/admin/thresholds", content=body, headers={"content-type": "application/json"})
        judge(response, caplog)

    with caplog.at_level(logging.DEBUG):
        run()


@pytest.mark.parametrize(("fields", "said"), [
    ({"version": 10**12}, "version is not allowed"), ({"version": -5}, "version is not allowed"),
    ({"reason": "r" * 201}, "reason has 201 characters; allowed: at most 200"),
])
def test_version_and_reason_are_bounded(application: FakeApplication, fields: Any, said: str) -> None:
    http = TestClient(application.app, raise_server_exceptions=False)
    response = http.put("/admin/thresholds", json={"thresholds": {"policy": "fcfs"} | fields})
    assert response.status_code == 400 and said in response.json()["error"]["message"]
