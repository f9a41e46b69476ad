"""What the middleware takes of vLLM's API server."""

from __future__ import annotations

import asyncio
import inspect
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient
from prometheus_client import CollectorRegistry
from vllm.engine.protocol import EngineClient
from vllm.entrypoints.generate.base.serving import GenerateBaseServing
from vllm.entrypoints.launchers import launcher
from vllm.entrypoints.launchers.api_server import app_state
from vllm.entrypoints.openai import sse_keep_alive
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.openai.responses import serving as responses_serving
from vllm.entrypoints.serve.exception_handling.register import init_exception_handler
from vllm.entrypoints.serve.instrumentator import metrics as vllm_metrics
from vllm.entrypoints.serve.middleware import register
from vllm.exceptions import GenerationError, GracefulHTTPError, VLLMClientError
from vllm.v1.engine import utils as engine_utils
from vllm.v1.engine.async_llm import AsyncLLM

from headrace import RejectionMiddleware
from scheduler.alone import middleware
from scheduler.rejection import Rejection
from scheduler.request_rejected import RequestRejected

ARGUMENTS = SimpleNamespace(
    allowed_origins=["*"], allow_credentials=False, allowed_methods=["*"], allowed_headers=["*"], api_key=None,
    enable_request_id_headers=False, middleware=["headrace.RejectionMiddleware"],
)


def test_the_server_keeps_its_engine_client_where_the_middleware_looks() -> None:
    assert "state.engine_client = engine_client" in inspect.getsource(app_state.init_app_state)
    assert inspect.isabstract(EngineClient) and "generate" in EngineClient.__abstractmethods__


@pytest.mark.parametrize("serving", [chat_serving, completion_serving, responses_serving])
def test_each_api_asks_that_client_for_outputs(serving: Any) -> None:
    assert "self.engine_client.generate(" in inspect.getsource(serving)


def test_an_engine_client_s_generate_can_be_replaced() -> None:
    client = AsyncLLM.__new__(AsyncLLM)
    client.generate = middleware.telling(client.generate)
    assert client.generate.__name__ == "generate" and inspect.isasyncgenfunction(client.generate)


def test_a_stream_does_not_show_an_empty_output() -> None:
    """The reason why the middleware does not read bodies; when this changes it might."""
    source = inspect.getsource(chat_serving.OpenAIServingChat.chat_completion_stream_generator)
    assert "# Chunked prefill case, don't return empty chunks" in source


def test_a_stream_reports_the_raised_rejection_in_an_event() -> None:
    for kind in (GenerationError, GracefulHTTPError, VLLMClientError):
        assert issubclass(RequestRejected, kind)
    serving = GenerateBaseServing.__new__(GenerateBaseServing)
    data = serving._convert_generation_error_to_streaming_response(RequestRejected(Rejection("busy", 3), "in words"))
    assert '"in words"' in data and "429" in data


def test_keep_alives_are_comments() -> None:
    assert sse_keep_alive.SSE_KEEP_ALIVE_COMMENT.encode().startswith(middleware._COMMENT)


def test_vllm_loads_the_middleware_by_name_as_the_outermost() -> None:
    app = FastAPI()
    register.init_entrypoints_middleware(ARGUMENTS, app, ("generate",))
    assert app.user_middleware[0].cls is RejectionMiddleware


def test_under_vllm_s_own_handlers_and_middleware_a_rejection_is_a_429_with_cors() -> None:
    app = FastAPI()
    init_exception_handler(app)
    register.init_entrypoints_middleware(ARGUMENTS, app, ("generate",))

    class Client:
        async def generate(self) -> Any:
            rejected = SimpleNamespace(stop_reason=Rejection("busy", 3).as_json(), finish_reason="abort")
            yield SimpleNamespace(outputs=[rejected])

    app.state.engine_client = Client()
    app.state.args = SimpleNamespace(log_error_stack=False)

    @app.post("/v1/completions")
    async def completions() -> dict[str, int]:
        return {"outputs": len([one async for one in app.state.engine_client.generate()])}

    answer = TestClient(app).post("/v1/completions", headers={"Origin": "http://else.where"})
    assert answer.status_code == 429 and answer.headers["retry-after"] == "3"
    assert answer.headers["access-control-allow-origin"] == "*"
    assert answer.json()["error"]["type"] == "rate_limit_error"


def test_vllm_serves_its_metrics_as_plain_text_where_ours_are_appended(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_metrics, "get_prometheus_registry", CollectorRegistry)
    app = FastAPI()
    vllm_metrics.attach_router(app)
    app.add_middleware(RejectionMiddleware)

    async def state(self: Any) -> dict[str, Any]:
        return {"engines": {"0": {"reachable": True}}}

    monkeypatch.setattr(middleware.Engines, "state", state)
    openmetrics = {"Accept": "application/openmetrics-text;version=1.0.0,text/plain;version=0.0.4;q=0.5"}
    for headers in ({}, openmetrics):
        answer = TestClient(app).get("/metrics", headers=headers)
        assert answer.status_code == 200 and 'headrace_engine_up{engine="0"} 1.0' in answer.text


def test_an_engine_core_is_a_child_of_the_server_or_of_the_server_s_parent() -> None:
    source = inspect.getsource(engine_utils.CoreEngineProcManager)
    assert "context.Process(" in source, "started as a process of its own, by the process that makes the manager"


def test_the_server_ends_its_engines_before_itself() -> None:
    """And says the end of its lifespan last: what killed engines left is removed in between."""
    source = inspect.getsource(launcher.serve_http)
    assert 0 < source.index("engine_client.shutdown") < source.index("server_task.cancel()")
    assert "return server.shutdown()" in source


def test_the_module_loads_neither_ray_nor_torch() -> None:
    check = (
        "import sys, headrace; headrace.RejectionMiddleware; "
        "print(sorted({'ray', 'torch', 'vllm', 'scipy'} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


def test_generate_runs_in_the_context_of_its_request() -> None:
    """asyncio copies the context to tasks, so that what vLLM starts for a request finds that request's outcome."""
    outcome = middleware._Outcome()

    async def main() -> Any:
        token = middleware._outcome.set(outcome)
        try:
            return await asyncio.create_task(asyncio.sleep(0, middleware._outcome.get()))
        finally:
            middleware._outcome.reset(token)

    assert asyncio.run(main()) is outcome
