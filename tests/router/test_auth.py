"""The API key before endpoints that are guarded, and before those alone."""

from __future__ import annotations

from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from router.auth import API_KEY_VARIABLE, guard

KEY = "sk-of-this-test"
GUARDED = [("GET", "/admin/state"), ("PUT", "/admin/thresholds"), ("POST", "/v1/chat/completions")]


@pytest.fixture
def client() -> TestClient:
    app = FastAPI()

    async def echo(request: Request) -> dict[str, Any]:
        return {"path": request.url.path}

    guarded = guard(
        {
            "state": lambda app: app.get("/admin/state"),
            "put": lambda app: app.put("/admin/thresholds", status_code=202),
            "chat": lambda app: app.post("/v1/chat/completions"),
        }
    )
    for register in guarded.values():
        register(app)(echo)
    app.get("/healthz")(echo)
    return TestClient(app)


def test_without_a_configured_key_everything_is_open(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert all(client.request(method, path).is_success for method, path in GUARDED)
    monkeypatch.setenv(API_KEY_VARIABLE, "")
    assert all(client.request(method, path).is_success for method, path in GUARDED)


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize(
    "header",
    [None, "", KEY, "Bearer", "Bearer ", "Bearer wrong", f"Bearer {KEY}x", f"Bearer {KEY[:-1]}", f"Basic {KEY}",
     f"Bearer {KEY.upper()}"],
)
def test_without_the_key_it_is_401(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str, header: str | None
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    response = client.request(method, path, headers={} if header is None else {"Authorization": header})
    assert response.status_code == 401
    assert "Authorization: Bearer KEY" in response.text
    assert KEY not in response.text


@pytest.mark.parametrize(("method", "path"), GUARDED)
@pytest.mark.parametrize("scheme", ["Bearer", "bearer"])
def test_with_the_key_it_answers(
    client: TestClient, monkeypatch: pytest.MonkeyPatch, method: str, path: str, scheme: str
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    response = client.request(method, path, headers={"Authorization": f"{scheme} {KEY}"})
    assert response.is_success
    assert response.json() == {"path": path}


def test_a_header_that_is_not_ascii_is_401(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert client.get("/admin/state", headers={"Authorization": b"Bearer \xe9\xff"}).status_code == 401


def test_health_is_open_with_a_key_configured(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert client.get("/healthz").status_code == 200


def test_options_of_a_guarded_route_are_kept(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert client.put("/admin/thresholds").status_code == 202
