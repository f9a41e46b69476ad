"""The API key before endpoints that are guarded, and before those alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient

from router.auth import API_KEY_VARIABLE, Keyring, guard
from router.tenants import TenantConfig, sign

KEY = "sk-of-this-test"
GUARDED = [("GET", "/admin/state"), ("PUT", "/admin/thresholds"), ("POST", "/v1/chat/completions")]


def client_with(*tenants: TenantConfig) -> TestClient:
    app, keys = FastAPI(), Keyring(tenants)

    async def echo(request: Request) -> dict[str, Any]:
        return {"path": request.url.path}

    async def tenant_of(request: Request) -> dict[str, Any]:
        body = SimpleNamespace(vllm_xargs={"headrace_tenant": "forged", "mine": 1})
        sign(body, request.state.tenant)
        return {"path": request.url.path} | ({"xargs": body.vllm_xargs} if tenants else {})

    admin = {
        "state": lambda app: app.get("/admin/state"),
        "put": lambda app: app.put("/admin/thresholds", status_code=202),
    }
    for register in guard(admin, keys.require_operator).values():
        register(app)(echo)
    for register in guard({"chat": lambda app: app.post("/v1/chat/completions")}, keys.require_user).values():
        register(app)(tenant_of)
    app.get("/healthz")(echo)
    return TestClient(app)


@pytest.fixture
def client() -> TestClient:
    return client_with()


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> TestClient:
    """Two tenants with keys of their own."""
    monkeypatch.setenv("KEY_OF_RED", "sk-red")
    monkeypatch.setenv("KEY_OF_BLUE", "sk-blue")
    red, blue = TenantConfig(name="red", weight=3, api_key_env="KEY_OF_RED"), TenantConfig(
        name="blue", api_key_env="KEY_OF_BLUE")
    return client_with(red, blue)


def chat(client: TestClient, key: str | None) -> Any:
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    return client.post("/v1/chat/completions", headers=headers)


def test_a_tenants_key_says_whose_a_request_is_and_clients_cannot(
    shared: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert chat(shared, "sk-red").json()["xargs"] == {"mine": 1, "headrace_tenant": "red", "headrace_weight": 3.0}
    assert chat(shared, "sk-blue").json()["xargs"]["headrace_tenant"] == "blue"
    assert chat(shared, KEY).json()["xargs"] == {"mine": 1}


def test_a_tenants_key_opens_nothing_else(shared: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert shared.get("/admin/state", headers={"Authorization": "Bearer sk-red"}).status_code == 401
    assert shared.get("/admin/state").status_code == 401, "with tenants and no operator's key it is shut"
    monkeypatch.setenv(API_KEY_VARIABLE, KEY)
    assert shared.get("/admin/state", headers={"Authorization": "Bearer sk-red"}).status_code == 401
    assert shared.get("/admin/state", headers={"Authorization": f"Bearer {KEY}"}).status_code == 200


def test_with_tenants_every_request_needs_a_key(shared: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    assert [chat(shared, key).status_code for key in (None, "", "sk-green", "sk-red")] == [401, 401, 401, 200]
    monkeypatch.delenv("KEY_OF_RED")
    assert chat(shared, "").status_code == chat(shared, "sk-red").status_code == 401, "a key that is not set opens none"


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
