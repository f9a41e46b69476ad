"""The ingress's FastAPI app in this process, over a fake model server: Ray's own endpoints and ours, no cluster."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from types import SimpleNamespace
from typing import Any

from fake_store import FakeStore
from fastapi import FastAPI
from ray.llm._internal.serve.core.configs.openai_api_models import (
    ChatCompletionResponse,
    CompletionResponse,
    ErrorInfo,
    ErrorResponse,
    ModelCard,
)
from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS
from ray.serve._private.http_util import make_fastapi_class_based_view
from synthetic_engine import SyntheticEngine

from cluster.live import SettingsJudge
from replicas import questions
from replicas.ranks import EngineAddress
from router import ingress as ingress_module
from router.attempts import Attempts
from router.front_door import NO_REPORTS, Reports
from router.gate import Desk, open_desk
from router.http_app import http_app
from router.in_flight import InFlight
from router.ingress import ADMIN_ENDPOINTS, HEALTH_ENDPOINTS, HeadraceIngress
from router.limits import DEFAULT_LIMITS, Limits
from router.live_settings import SettingsOffice
from router.replica_watch import ReplicaWatch
from router.tenants import TenantConfig
from scheduler.messages import Apply
from scheduler.wire import answer_of, read_question

MODEL = "fake"
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


def completion(kind: str, body: Any) -> Any:
    """One answer of the fake model server."""
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    common = {"id": "x", "created": 1, "model": MODEL, "usage": usage}
    if kind == "chat":
        message = {"role": "assistant", "content": "ok"}
        choice = {"index": 0, "finish_reason": "stop", "message": message}
        return ChatCompletionResponse(object="chat.completion", choices=[choice], **common)
    return CompletionResponse(choices=[{"index": 0, "text": "ok", "finish_reason": "stop"}], **common)


class FakeServer:
    """Stands for the handle of a model's deployment; `received` is what reached it."""

    def __init__(self) -> None:
        self.received: list[Any] = []
        self.failure: Exception | None = None
        self.may_answer = asyncio.Event()
        self.may_answer.set()

    def options(self, **_: Any) -> FakeServer:
        return self

    def __getattr__(self, method: str) -> Any:
        if method.startswith("_"):
            raise AttributeError(method)
        return SimpleNamespace(remote=lambda body, raw=None: self._answers(method, body))

    async def _answers(self, method: str, body: Any) -> AsyncGenerator[Any, None]:
        self.received.append(body)
        await self.may_answer.wait()
        if self.failure is not None:
            raise self.failure
        if method in ("chat", "completions"):
            yield completion(method, body)
        else:
            yield ErrorResponse(error=ErrorInfo(message=f"no {method} here", type="BadRequestError", code=400))


class FakeApplication:
    """The app, its desk, and what stands behind it. `engine` answers /admin."""

    def __init__(
        self, *, limits: Limits = DEFAULT_LIMITS, tenants: Sequence[TenantConfig] = (), reports: Reports = NO_REPORTS,
        models: Sequence[str] = (MODEL,), clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.server, self.engine = FakeServer(), SyntheticEngine(engine_id="a")
        self.desk: Desk = open_desk(tenants, limits, {}, reports, models, clock)
        self.app: FastAPI = http_app(lambda: self.desk)
        endpoints = {**HEALTH_ENDPOINTS, **ADMIN_ENDPOINTS, **DEFAULT_ENDPOINTS}
        methods = {name: add(self.app)(getattr(HeadraceIngress, name)) for name, add in endpoints.items()}
        served = type("HeadraceIngress", (HeadraceIngress,), methods)
        make_fastapi_class_based_view(self.app, served)
        self.ingress = self._ingress(served, models)
        for route in self.app.routes:
            for dependency in getattr(getattr(route, "dependant", None), "dependencies", ()):
                self.app.dependency_overrides[dependency.call] = lambda: self.ingress

    def _ingress(self, served: type, models: Sequence[str]) -> Any:
        ingress = object.__new__(served)
        ingress._model_cards = {
            model: ModelCard(id=model, object="model", owned_by="t", permission=[], metadata={}) for model in models
        }
        ingress._default_serve_handles = dict.fromkeys(models, self.server)
        ingress._configured_serve_handles, ingress._lora_paths = {}, {}
        ingress._get_lora_model_metadata_func = None
        ingress._app_name, ingress._models = "headrace", {}
        ingress._controller = ingress._keeper = None
        ingress.desk, ingress._attempts, ingress._in_flight = self.desk, Attempts(), InFlight()
        judge = SettingsJudge({model: {} for model in models})
        ingress._office = SettingsOffice(FakeStore(), judge, lambda settings: None)
        asyncio.run(ingress._office.look())
        ingress.replica_watch = ReplicaWatch(dict, questions.ask_stats)
        return ingress

    async def call_replica(
        self, name: str, method: str, *, rank: int = 0, timeout_s: float = 1.0, **arguments: Any
    ) -> bytes:
        """As `replicas.actor_calls.call_replica`."""
        if method != "apply_thresholds":
            return answer_of(self.engine.stats() if method == "stats" else self.engine.report(**arguments))
        offer = read_question(arguments["offer"])
        assert isinstance(offer, Apply)
        return answer_of(self.engine.active.offer(offer))

    def stand_in(self, monkeypatch: Any) -> FakeApplication:
        """Replace the calls that need a cluster."""
        address = EngineAddress("a", model_id=MODEL)
        monkeypatch.setattr(questions, "call_replica", self.call_replica)
        monkeypatch.setattr(ingress_module, "engines_of", lambda *_: {"a": address})
        return self


def chat(**fields: Any) -> Mapping[str, Any]:
    """The body of a chat request."""
    return {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]} | fields
