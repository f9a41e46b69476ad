"""A small Serve application: the real ingress and the real request router over replicas without an engine.

`behave` tells one replica how to answer from now on; each way is one that a replica can fail.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import AsyncGenerator
from typing import Any

from ray import serve
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorInfo, ErrorResponse
from ray.serve.llm.ingress import make_fastapi_ingress

from cluster.live import SettingsJudge
from replicas.engine_health import RECALLED, REPLICA_FAILED
from replicas.ranks import ServedModel
from replicas.routing_stats import RoutingStats
from router.http_app import http_app
from router.ingress import ADMIN_ENDPOINTS, HEALTH_ENDPOINTS, HeadraceIngress, desk_of_this_ingress
from router.request_router import FluidRouter
from router.rotation import ROTATION
from scheduler.messages import Ack, Stats
from scheduler.wire import answer_of

MODEL = "fake"
CHUNKS = 20
EVERY_S = 0.06
OUT_FOR_S = 2.0


def event(**fields: Any) -> str:
    """One event of a stream."""
    return f"data: {json.dumps(fields)}\n\n"


def text_of(number: int, request: Any, finish_reason: str | None = None) -> str:
    """A chunk of a chat or of a completion."""
    is_chat = hasattr(request, "messages")
    said: dict[str, Any] = {"delta": {"content": f"w{number} "}} if is_chat else {"text": f"w{number} "}
    kind = "chat.completion.chunk" if is_chat else "text_completion"
    return event(id="r", object=kind, created=1, model=MODEL, choices=[
        {"index": 0, "finish_reason": finish_reason, "logprobs": None} | said
    ])


def error(kind: str, code: int) -> ErrorResponse:
    return ErrorResponse(error=ErrorInfo(message=f"{kind} at /root/secret/path.py", type=kind, code=code))


class Ingress(HeadraceIngress):
    """Ours, with a short memory of failures, so that tests follow each other."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ROTATION.out_for_s = OUT_FOR_S


class FakeServer:
    """Answers with words, or fails in the way that it was told."""

    def __init__(self) -> None:
        self._way = "words"
        self._answered = 0

    async def behave(self, way: str) -> int:
        """How to answer from now on; returns the number of requests that came before."""
        self._way = way
        before, self._answered = self._answered, 0
        return before

    async def chat(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._answer(request)

    async def completions(self, request: Any, raw_request_info: Any = None) -> AsyncGenerator[Any, None]:
        return self._answer(request)

    async def _answer(self, request: Any) -> AsyncGenerator[Any, None]:
        self._answered += 1
        way = self._way
        if way == "raises":
            raise RuntimeError("at /root/secret/path.py")
        if way in ("dies", "dies at once"):
            os._exit(1)
        refusals = {
            "failed": error(REPLICA_FAILED, 503), "leaves": error(RECALLED, 503), "server error": error("oops", 500),
            "rejects": error("rate_limit_error", 429), "client error": error("invalid_request_error", 400),
        }
        if way in refusals:
            yield [refusals[way]] if request.stream else refusals[way]
            return
        if not request.stream:
            await asyncio.sleep(CHUNKS * EVERY_S)
            await self._until_told()
            if self._way == "dies later":
                os._exit(1)
            yield self._whole(request)
            return
        for number in range(CHUNKS):
            if self._way == "dies later":
                os._exit(1)
            if self._way == "raises later":
                raise RuntimeError("at /root/secret/path.py")
            if self._way == "error event":
                yield [event(error={"message": "m", "type": REPLICA_FAILED, "param": None, "code": 503})]
                return
            yield [text_of(number, request)]
            await asyncio.sleep(EVERY_S)
            await self._until_told()
        yield [text_of(CHUNKS, request, "stop"), "data: [DONE]\n\n"]

    async def _until_told(self) -> None:
        while self._way == "holds":
            await asyncio.sleep(0.01)

    def _whole(self, request: Any) -> Any:
        from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionResponse, CompletionResponse

        if hasattr(request, "messages"):
            return ChatCompletionResponse(id="r", model=MODEL, usage={}, choices=[
                {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": "w0"}}
            ])
        return CompletionResponse(id="r", model=MODEL, usage={}, choices=[
            {"index": 0, "finish_reason": "stop", "text": "w0"}
        ])

    async def stats(self, rank: int = 0) -> bytes:
        if self._way == "silent engine":
            await asyncio.sleep(4)
            return answer_of(Ack.without_version("the engine did not answer"))
        return answer_of(Stats(
            engine_id="e", slots=64, running=0, waiting=0, kv_used_tokens=0, kv_capacity_tokens=1000,
            thresholds_version=0,
        ))

    async def telemetry(self, cursor: int | None = 0, rank: int = 0) -> bytes:
        if self._way == "silent engine":
            await asyncio.sleep(4)
        return answer_of(Ack.without_version("no telemetry here"))

    async def record_routing_stats(self) -> dict[str, Any]:
        return RoutingStats(slots=64, occupied=0, kv_used_fraction=0.0, at_s=time.time()).as_dict()

    async def check_health(self) -> None: ...


def application(replicas: int = 2, models: tuple[str, ...] = (MODEL,)) -> Any:
    """The application, as `cluster.app` builds it."""
    from ray.llm._internal.serve.core.configs.openai_api_models import ModelCard
    from ray.llm._internal.serve.core.ingress.ingress import DEFAULT_ENDPOINTS

    ingress = make_fastapi_ingress(Ingress, endpoint_map={
        **HEALTH_ENDPOINTS, **ADMIN_ENDPOINTS, **DEFAULT_ENDPOINTS,
    }, app=http_app(desk_of_this_ingress))
    servers = {model: serve.deployment(
        FakeServer, name=f"HeadraceServer:{model}", num_replicas=replicas, max_ongoing_requests=64,
        health_check_period_s=1.0, graceful_shutdown_timeout_s=1.0, ray_actor_options={"num_cpus": 0},
        request_router_config={"request_router_class": FluidRouter, "request_routing_stats_period_s": 1.0},
    ).bind() for model in models}
    options = {"max_ongoing_requests": 256, "ray_actor_options": {"num_cpus": 0}, "graceful_shutdown_timeout_s": 1.0}
    told = {"tenants": [], "models": {model: {} for model in models}}
    return serve.deployment(ingress, user_config=told, **options).bind(
        llm_deployments=servers, lora_paths={}, judge=SettingsJudge({model: {} for model in models}),
        models={f"HeadraceServer:{model}": ServedModel(model) for model in models},
        model_cards={model: ModelCard(id=model, object="model", owned_by="us", permission=[], metadata={})
                     for model in models},
    )
