"""The gate before the endpoints: keys, limits, bad bodies, slow ones, and rejection without a replica's knowing."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from typing import Any

import httpx
import pytest
from fake_engine_app import CHAT, COMPLETIONS, MODEL, FakeApplication, chat, completion
from fake_store import FakeStore
from fastapi.testclient import TestClient
from ray.exceptions import RayActorError
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from test_front_door_rule import Watch

from cluster.live import SettingsJudge
from router import gate
from router.auth import API_KEY_FILE_VARIABLE, API_KEY_VARIABLE
from router.limits import KeyLimits, Limits
from router.live_settings import SettingsOffice, SettingsUpdate
from router.tenants import TenantConfig

ADMIN = "/admin/thresholds"


@pytest.fixture(autouse=True)
def without_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(API_KEY_VARIABLE, raising=False)
    monkeypatch.delenv(API_KEY_FILE_VARIABLE, raising=False)


@pytest.fixture
def serving(monkeypatch: pytest.MonkeyPatch) -> Any:
    return lambda **options: FakeApplication(**options).stand_in(monkeypatch)


def client(application: FakeApplication) -> TestClient:
    return TestClient(application.app, raise_server_exceptions=False)


def error_of(response: httpx.Response) -> str:
    error = response.json()["error"]
    assert error["code"] == response.status_code
    return str(error["message"])


BAD_BODIES = {
    "a declared length of 10^30": (b'{"model": "fake", "messages": [], "expected_output_tokens": 1%s}' % (b"0" * 30)),
    "a lone surrogate": b'{"model": "fake", "messages": [{"role": "user", "content": "\\ud800"}]}',
    "1e400": b'{"model": "fake", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1e400}',
    "a priority of 20 digits": b'{"model": "fake", "prompt": "x", "priority": 99999999999999999999}',
    "300 nested arrays": b'{"model": "fake", "prompt": %s1%s}' % (b"[" * 300, b"]" * 300),
    "a schema nested 300 deep": json.dumps(chat(response_format={
        "type": "json_schema", "json_schema": {"name": "n", "schema": json.loads('{"a":' * 100 + "1" + "}" * 100)},
    })).encode(),
    "a schema as text nested 300 deep": json.dumps(
        chat(structured_outputs={"json": '{"a":' * 300 + "1" + "}" * 300})
    ).encode(),
    "no JSON": b"{",
    "no object": b"[]",
    "not UTF-8": b'{"model": "\xff"}',
    "NaN": b'{"model": "fake", "prompt": "x", "temperature": NaN}',
    "a field of the wrong type": json.dumps({"model": MODEL, "messages": 7, "prompt": {"x" * 5000: 1}}).encode(),
    "200 choices": json.dumps(chat(n=200, prompt="x")).encode(),
    "200 choices as text": json.dumps(chat(n="200", prompt="x")).encode(),
    "200 prompts": json.dumps(chat(prompt=["x"] * 200)).encode(),
    "a model that is not served": json.dumps(chat(model="other" * 200, prompt="x")).encode(),
    "a wrong declared length": json.dumps(chat(prompt="x", expected_output_tokens="y" * 1000)).encode(),
}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/v1/embeddings", "/tokenize", "/detokenize", "/v1/score"])
@pytest.mark.parametrize("name", BAD_BODIES)
def test_a_bad_body_is_a_client_error_of_one_sentence(
    serving: Any, caplog: pytest.LogCaptureFixture, path: str, name: str
) -> None:
    if path not in (CHAT, COMPLETIONS) and ("choices" in name or "prompts" in name or "length" in name):
        pytest.skip("nothing is generated there")
    if path == CHAT and "prompts" in name:
        pytest.skip("a chat has no prompts")
    application = serving()
    with caplog.at_level(logging.DEBUG):
        response = client(application).post(
            path, content=BAD_BODIES[name], headers={"content-type": "application/json"}
        )
    message = error_of(response)
    assert response.status_code in (400, 404) and len(message) <= 200 and "\n" not in message
    assert not any(word in response.text for word in ("Traceback", "site-packages", "0x", "ray::"))
    assert not [record for record in caplog.records if record.exc_info]
    assert not application.server.received


@pytest.mark.parametrize(("path", "method"), [(CHAT, "POST"), (COMPLETIONS, "POST"), (ADMIN, "PUT")])
@pytest.mark.parametrize("kind", [None, "text/plain", "application/octet-stream", "multipart/form-data"])
def test_a_body_without_a_json_content_type_is_415(serving: Any, path: str, method: str, kind: str | None) -> None:
    response = client(serving()).request(
        method, path, content=json.dumps(chat()), headers={"content-type": kind} if kind else {}
    )
    assert response.status_code == 415 and "Content-Type: application/json" in error_of(response)


def test_a_good_request_passes_unchanged(serving: Any) -> None:
    application = serving()
    with client(application) as http:
        answer = http.post(CHAT, json=chat(n=2, seed=2**62, messages=[{"role": "user", "content": "ä 1e999 日本"}]))
        assert answer.status_code == 200 and answer.json()["choices"][0]["message"]["content"] == "ok"
        assert http.post(COMPLETIONS, json={"model": MODEL, "prompt": [1, 2, 3]}).status_code == 200
        assert http.get("/v1/models").json()["data"][0]["id"] == MODEL
    received = application.server.received[0]
    assert (received.n, received.seed, received.messages[0]["content"]) == (2, 2**62, "ä 1e999 日本")


def test_a_failure_of_the_server_says_nothing_of_its_insides(serving: Any, caplog: pytest.LogCaptureFixture) -> None:
    application = serving()
    application.server.failure = RuntimeError("at 10.0.0.7 in /srv/secret.py")
    response = client(application).post(CHAT, json=chat(), headers={"x-request-id": "r-1"})
    assert response.status_code == 500
    assert not any(word in response.text for word in ("10.0.0.7", "secret", "RuntimeError"))
    assert "10.0.0.7" in caplog.text, "the log has it"


# Sizes and pace.


def test_limits_of_sizes(serving: Any) -> None:
    limits = Limits(body_bytes=400, header_bytes=3000, max_tokens=50, prompt_tokens=4, choices=4, json_depth=5)
    http = client(serving(limits=limits))
    large = http.post(CHAT, json=chat(user="x" * 400))
    assert (large.status_code, large.headers["connection"]) == (413, "close")
    assert http.post(CHAT, json=chat(), headers={"x-large": "y" * 3000}).status_code == 431
    for body, said in (
        ({"max_tokens": 51}, "max_tokens = 51 is not allowed; allowed: at most 50"),
        ({"prompt": [1, 2, 3, 4, 5]}, "a prompt has 5 tokens; allowed: at most 4"),
        ({"prompt": [[1], [1, 2, 3, 4, 5]]}, "a prompt has 5 tokens"),
        ({"prompt": ["a", "b", "c"], "n": 2}, "n = 2 for 3 prompts makes 6 choices; allowed: 4 in one request"),
        ({"stop": [[[[[["x"]]]]]]}, "nested too deeply; allowed: 5"),
    ):
        response = http.post(COMPLETIONS, json={"model": MODEL, "prompt": "x"} | body)
        assert response.status_code == 400 and said in error_of(response)


@pytest.mark.parametrize(("path", "fields", "said"), [
    (COMPLETIONS, {"max_tokens": 51, "max_completion_tokens": 1}, "max_tokens = 51"),
    (COMPLETIONS, {"max_tokens": "51"}, "max_tokens = 51"),
    (CHAT, {"max_tokens": 1, "max_completion_tokens": 51}, "max_tokens = 51"),
    (CHAT, {"max_tokens": 51, "max_completion_tokens": None}, "max_tokens = 51"),
])
def test_the_output_is_bounded_by_the_field_that_the_engine_reads(
    serving: Any, path: str, fields: dict[str, Any], said: str
) -> None:
    application = serving(limits=Limits(max_tokens=50))
    body = {"model": MODEL, "prompt": "x"} if path == COMPLETIONS else chat()
    response = client(application).post(path, json=body | fields)
    assert response.status_code == 400 and said in error_of(response)
    assert not application.server.received


@pytest.mark.parametrize(("limit", "path", "fields", "most"), [
    (50, CHAT, {}, 50), (50, CHAT, {"max_tokens": None}, 50), (50, CHAT, {"max_tokens": 7}, 7),
    (50, CHAT, {"max_completion_tokens": 7}, 7), (50, CHAT, {"max_tokens": 99, "max_completion_tokens": 7}, 7),
    (50, COMPLETIONS, {}, 16), (50, COMPLETIONS, {"max_tokens": None}, 16), (50, COMPLETIONS, {"max_tokens": 40}, 40),
    (10, COMPLETIONS, {}, 10), (10, COMPLETIONS, {"max_tokens": None, "max_completion_tokens": 3}, 10),
    (None, CHAT, {}, None), (None, COMPLETIONS, {}, 16),
])
def test_the_limit_of_output_is_written_into_a_request_that_states_none(
    serving: Any, limit: int | None, path: str, fields: dict[str, Any], most: int | None
) -> None:
    application = serving(limits=Limits(max_tokens=limit))
    body = {"model": MODEL, "prompt": "x"} if path == COMPLETIONS else chat()
    assert client(application).post(path, json=body | fields).status_code == 200
    (received,) = map(vars, application.server.received)
    if path == CHAT and received["max_completion_tokens"] is not None:
        assert received["max_completion_tokens"] == most
    else:
        assert received["max_tokens"] == most


def asgi(application: FakeApplication, pieces: list[tuple[float, bytes]], *, endless: bool = False) -> dict[str, Any]:
    """The answer to a body that comes in pieces, each after so many seconds."""
    sent: list[dict[str, Any]] = []

    async def run() -> None:
        left = list(pieces)

        async def receive() -> dict[str, Any]:
            pause_s, piece = left.pop(0) if left else (0.0, b"x")
            await asyncio.sleep(pause_s)
            return {"type": "http.request", "body": piece, "more_body": endless or bool(left)}

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        scope = {
            "type": "http", "http_version": "1.1", "method": "POST", "path": CHAT, "raw_path": CHAT.encode(),
            "query_string": b"", "root_path": "", "scheme": "http", "server": ("t", 80), "client": ("t", 1),
            "headers": [(b"content-type", b"application/json")],
        }
        await asyncio.wait_for(application.app(scope, receive, send), 5.0)

    asyncio.run(run())
    return {"status": sent[0]["status"], "headers": dict(sent[0]["headers"]), "body": json.loads(sent[1]["body"])}


def test_a_body_that_stops_or_never_ends_is_closed(serving: Any) -> None:
    application = serving(limits=Limits(chunk_s=0.1, body_s=0.4))
    text = json.dumps(chat()).encode()
    whole = asgi(application, [(0.01, text[:20]), (0.01, text[20:])])
    assert whole["status"] == 200
    stopped = asgi(application, [(0.0, text[:20]), (9.0, text[20:])])
    assert stopped["status"] == 408 and stopped["headers"][b"connection"] == b"close"
    assert "nothing came for 0.1 s" in stopped["body"]["error"]["message"]
    slow = asgi(application, [(0.05, b" ")] * 100)
    assert slow["status"] == 408 and "it took 0.4 s" in slow["body"]["error"]["message"]
    application.desk.change((), Limits(body_bytes=1000), {})
    endless = asgi(application, [], endless=True)
    assert endless["status"] == 413 and endless["headers"][b"connection"] == b"close"
    assert application.desk.usage.under_way("anonymous") == 0


def test_other_requests_are_answered_while_a_large_body_is_looked_through(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    application, answered, asked_for = serving(), threading.Event(), gate.asked_for

    def slowly(found: Any, *arguments: Any, **options: Any) -> Any:
        assert "large" not in found or answered.wait(5.0), "nothing else was answered"
        return asked_for(found, *arguments, **options)

    async def run() -> None:
        transport = httpx.ASGITransport(application.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            large = asyncio.create_task(http.post(CHAT, json=chat(large="x" * 100_000)))
            await asyncio.sleep(0)
            assert (await http.post(CHAT, json=chat())).status_code == 200
            answered.set()
            assert (await large).status_code == 200

    monkeypatch.setattr(gate, "asked_for", slowly)
    asyncio.run(asyncio.wait_for(run(), 20.0))


# Keys and who may do what.


def test_all_but_health_asks_for_a_key_and_a_wrong_one_is_not_repeated(
    serving: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-operator")
    monkeypatch.setenv("RED", "sk-red")
    http = client(serving(tenants=[TenantConfig(name="red", api_key_env="RED")]))
    paths = [("GET", "/docs"), ("GET", "/openapi.json"), ("GET", "/v1/models"), ("POST", CHAT), ("PUT", ADMIN),
             ("GET", "/admin/state"), ("POST", "/tokenize"), ("GET", "/no/such/path"), ("GET", "/redoc")]
    for method, path in paths:
        for key in (None, "sk-wrong", "sk-operato", "sk-operatorx"):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            response = http.request(method, path, headers=headers)
            assert (response.status_code, response.headers["www-authenticate"]) == (401, "Bearer"), path
            assert key is None or key not in response.text
    assert http.get("/healthz").status_code == 200
    for key, allowed in (("sk-operator", {200}), ("sk-red", {200})):
        headers = {"authorization": f"Bearer {key}"}
        assert http.get("/openapi.json", headers=headers).status_code in allowed
        assert http.post(CHAT, json=chat(), headers=headers).status_code == 200
    assert http.get("/admin/thresholds", headers={"authorization": "Bearer sk-red"}).status_code == 401
    assert http.get("/admin/thresholds", headers={"authorization": "Bearer sk-operator"}).status_code == 200


def test_the_document_is_ours(serving: Any) -> None:
    from headrace import __version__

    http = client(serving())
    document = http.get("/openapi.json").json()
    assert (document["info"]["title"], document["info"]["version"]) == ("Headrace", __version__)
    assert {CHAT, ADMIN, "/healthz"} <= document["paths"].keys()
    assert "Headrace" in http.get("/docs").text


def test_no_web_page_may_call_unless_its_origin_is_configured(serving: Any) -> None:
    page = {"origin": "https://page.example", "access-control-request-method": "POST"}
    http = client(serving())
    for path in (CHAT, ADMIN):
        for answer in (http.options(path, headers=page), http.get("/v1/models", headers=page)):
            assert not [name for name in answer.headers if name.startswith("access-control")]
    http = client(serving(limits=Limits(cors_origins=("https://page.example",))))
    assert http.options(CHAT, headers=page).headers["access-control-allow-origin"] == "https://page.example"
    assert "access-control-allow-origin" not in http.options(CHAT, headers=page | {"origin": "https://x"}).headers
    assert "access-control-allow-origin" not in http.options(ADMIN, headers=page).headers
    assert "access-control-allow-origin" not in http.get("/admin/thresholds", headers=page).headers


@pytest.mark.parametrize("prefix", ["/x", ""])
def test_a_root_path_does_not_lead_past_the_keys(serving: Any, monkeypatch: pytest.MonkeyPatch, prefix: str) -> None:
    monkeypatch.setenv(API_KEY_VARIABLE, "sk-operator")
    http = TestClient(serving().app, root_path=prefix, raise_server_exceptions=False)
    assert http.get(f"{prefix}/admin/thresholds").status_code == 401
    assert http.get(f"{prefix}/healthz").status_code == 200


@pytest.mark.parametrize("path", [
    f"{CHAT}%0A", f"{COMPLETIONS}%0A", f"{COMPLETIONS}%0D%0A", f"{COMPLETIONS}%00", "/v1%0A/completions", "/healthz%0A",
    f"{ADMIN}%0A", "/x%C2%85", "/%7F",
])
def test_a_path_with_a_control_character_is_404_before_anything_looks_at_it(serving: Any, path: str) -> None:
    application = serving(limits=Limits(max_tokens=1, cors_origins=("https://page.example",)))
    http = client(application)
    for method in ("POST", "GET", "PUT", "OPTIONS"):
        response = http.request(
            method, path, json={"model": MODEL, "prompt": "x", "messages": [], "max_tokens": 999},
            headers={"origin": "https://page.example", "access-control-request-method": "POST"},
        )
        assert response.status_code == 404 and "control character" in error_of(response)
    assert not application.server.received


# What a key may use.


def test_requests_per_minute_of_each_key(serving: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RED", "sk-red")
    monkeypatch.setenv("BLUE", "sk-blue")
    tenants = [TenantConfig(name="red", api_key_env="RED"), TenantConfig(name="blue", api_key_env="BLUE")]
    limits = Limits(requests_per_minute=3, keys={"blue": KeyLimits(tokens_per_minute=1000)})
    http = client(serving(limits=limits, tenants=tenants))

    def ask(key: str, **fields: Any) -> httpx.Response:
        return http.post(CHAT, json=chat(**fields), headers={"authorization": f"Bearer {key}"})

    assert [ask("sk-red").status_code for _ in range(5)] == [200, 200, 200, 429, 429]
    refused = ask("sk-red")
    assert 20 <= int(refused.headers["retry-after"]) <= 60 and "3 requests a minute" in error_of(refused)
    assert [ask("sk-blue", max_tokens=400).status_code for _ in range(3)] == [200, 200, 429]
    assert "1000 tokens a minute" in error_of(ask("sk-blue", max_tokens=400))


@pytest.mark.parametrize("status", [429, 503])
def test_what_was_not_served_is_not_counted(serving: Any, status: int) -> None:
    """A client that came back when it was told paid for each rejection, until its key was used up."""
    application = serving(limits=Limits(requests_per_minute=1))

    async def refuses(method: str, body: Any) -> Any:
        yield ErrorResponse(error=ErrorInfo(message="full", type="rate_limit_error", code=status))

    http, answers = client(application), application.server._answers
    application.server._answers = refuses
    assert [http.post(CHAT, json=chat()).status_code for _ in range(3)] == [status] * 3
    application.server._answers = answers
    assert [http.post(CHAT, json=chat()).status_code for _ in range(2)] == [200, 429]


def test_concurrent_requests_of_a_key_and_counts_that_survive_new_limits(serving: Any) -> None:
    application = serving(limits=Limits(concurrent_requests=2))

    async def run() -> None:
        application.server.may_answer.clear()
        transport = httpx.ASGITransport(application.app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t") as http:
            under_way = [asyncio.create_task(http.post(CHAT, json=chat())) for _ in range(2)]
            while len(application.server.received) < 2:
                await asyncio.sleep(0)
            refused = await http.post(CHAT, json=chat())
            assert refused.status_code == 429 and "2 requests of this key are under way" in error_of(refused)
            application.desk.change((), Limits(concurrent_requests=3), {})
            under_way.append(asyncio.create_task(http.post(CHAT, json=chat())))
            while len(application.server.received) < 3:
                await asyncio.sleep(0)
            assert (await http.post(CHAT, json=chat())).status_code == 429
            application.server.may_answer.set()
            assert [one.status_code for one in await asyncio.gather(*under_way)] == [200] * 3
        assert application.desk.usage.under_way("anonymous") == 0

    asyncio.run(asyncio.wait_for(run(), 20.0))


# Rejection in front of full replicas.


def test_a_full_model_is_429_before_the_body_is_read(serving: Any) -> None:
    watch = Watch()
    application = serving(reports=watch, clock=watch.now)
    watch.report("a", 2, model=MODEL)
    watch.clock[0] += 0.2
    http = client(application)
    assert [http.post(CHAT, json=chat()).status_code for _ in range(3)] == [200] * 3, "a place is given back"
    watch.report("a", 0, model=MODEL)
    watch.clock[0] += 0.2
    rejected = http.post(CHAT, json=chat())
    assert rejected.status_code == 429 and 6 <= int(rejected.headers["retry-after"]) <= 10
    assert rejected.json()["error"]["type"] == "rate_limit_error"
    assert http.post(CHAT, content=b"never parsed").status_code == 429
    assert len(application.server.received) == 3
    application.desk.change((), Limits(front_door=False), {})
    assert http.post(CHAT, json=chat()).status_code == 200
    assert application.server.received[-1].vllm_xargs == {"headrace_turned_away": 2}


def test_what_was_turned_away_is_told_once_by_a_request_that_the_engine_counts(serving: Any) -> None:
    """Eight choices told it eight times, a second attempt again, and an embedding lost it."""
    application = serving()
    http, told = client(application), []

    async def answers(method: str, body: Any) -> Any:
        told.append((getattr(body, "vllm_xargs", None) or {}).get("headrace_turned_away", 0))
        if fails:
            raise fails.pop()
        yield completion(method, body)

    fails: list[Exception] = []
    application.server._answers = answers
    places = application.desk.front_door._places_of(MODEL)
    places.turned_away = 19
    http.post("/v1/embeddings", json={"model": MODEL, "input": "hi"})
    assert http.post(CHAT, json=chat(n=8)).status_code == 200
    assert told[-1] == 2 and places.turned_away == 3, "8 × 2 are told, the rest is for the next"
    fails.append(RayActorError())
    assert http.post(COMPLETIONS, json={"model": MODEL, "prompt": ["a", "b"]}).status_code == 200
    assert told[-2:] == [1, 0] and places.turned_away == 1


def test_with_several_models_the_body_says_which_one_is_full(serving: Any) -> None:
    watch = Watch()
    application = serving(reports=watch, models=["one", "two"], clock=watch.now)
    watch.report("a", 0, model="one")
    watch.report("b", 5, model="two")
    http = client(application)
    assert http.post(CHAT, json=chat(model="one")).status_code == 429
    assert http.post(CHAT, json=chat(model="one:adapter")).status_code == 429
    assert http.post(CHAT, json=chat(model="two")).status_code == 200
    assert http.post(CHAT, json=chat(model="three")).status_code == 404


def test_other_tenants_alone_leave_what_an_operator_changed_of_the_settings() -> None:
    application = FakeApplication()
    ingress = application.ingress
    ingress._office = SettingsOffice(FakeStore(), SettingsJudge({MODEL: {}}), ingress._follow)

    async def deploy_twice() -> None:
        models: dict[str, Any] = {MODEL: {}}
        await ingress.reconfigure({"tenants": [], "models": models})
        await ingress._office.keep(SettingsUpdate(settings={"limits": {"choices": 3}}), {})
        assert application.desk.limits_of(MODEL).choices == 3 and application.desk.keys.is_open
        tenant = {"name": "red", "api_key_env": "KEY_OF_RED"}
        await ingress.reconfigure({"tenants": [tenant], "models": models})

    asyncio.run(deploy_twice())
    assert application.desk.limits_of(MODEL).choices == 3 and not application.desk.keys.is_open


def test_content_of_a_wrong_type_is_a_400(serving: Any) -> None:
    body = {"model": MODEL, "messages": [{"role": "user", "content": ["plain text in a list"]}]}
    response = client(serving()).post(CHAT, json=body)
    assert response.status_code == 400 and "content" in error_of(response)
