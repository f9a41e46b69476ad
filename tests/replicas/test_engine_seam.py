"""Refusals and early errors on their way through Ray's engine and vLLM's OpenAI layer, both of them not public."""

from __future__ import annotations

import asyncio
import inspect
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

import pytest
from ray.llm._internal.serve.core.configs.openai_api_models import ErrorResponse
from ray.llm._internal.serve.engines.vllm import vllm_engine
from vllm.entrypoints.openai.chat_completion import serving as chat_serving
from vllm.entrypoints.openai.completion import serving as completion_serving
from vllm.entrypoints.serve.exception_handling.error_response import create_error_response
from vllm.v1.engine.async_llm import AsyncLLM

from replicas.engine import HeadraceEngine, RequestRefused, errors_first, raising_refusals
from scheduler.refusal import Refusal

REFUSAL = Refusal("busy", 3)


def output(stop_reason: object = None) -> Any:
    return SimpleNamespace(outputs=[SimpleNamespace(stop_reason=stop_reason)])


async def given(*items: Any) -> Any:
    for item in items:
        yield item


async def collected(generator: Any) -> list[Any]:
    return [item async for item in generator]


def test_a_refusal_becomes_an_error_with_status_429_and_its_own_words() -> None:
    error = create_error_response(RequestRefused(REFUSAL)).error
    assert (error.code, error.message) == (HTTPStatus.TOO_MANY_REQUESTS, REFUSAL.text)
    assert Refusal.from_text(error.message) == REFUSAL


def test_generate_raises_what_the_engine_core_refused() -> None:
    generate = raising_refusals(lambda: given(output(REFUSAL.text)))
    with pytest.raises(RequestRefused, match="busy; retry in 3 s"):
        asyncio.run(collected(generate()))


def test_other_outputs_pass_and_nothing_is_cut_after_it_has_begun() -> None:
    outputs = [output(), output(128001), output("END"), output(REFUSAL.text)]
    assert asyncio.run(collected(raising_refusals(lambda: given(*outputs))())) == outputs


def test_a_stream_that_begins_with_an_error_is_that_error() -> None:
    event = 'data: {"error": {"message": "m", "type": "t", "param": null, "code": 429}}\n\n'
    (error,) = asyncio.run(collected(errors_first(given(event, "data: [DONE]\n\n"))))
    assert isinstance(error, ErrorResponse) and (error.error.code, error.error.message) == (429, "m")


def test_an_error_within_a_stream_stays_where_it_is() -> None:
    events = ['data: {"id": 1}\n\n', 'data: {"error": {"message": "m"}}\n\n']
    assert asyncio.run(collected(errors_first(given(*events)))) == events


def test_ray_starts_its_client_and_answers_errors_where_this_looks() -> None:
    assert "engine_client" in inspect.getsource(vllm_engine.VLLMEngine._start_async_llm_engine)
    for method in (vllm_engine.VLLMEngine.chat, vllm_engine.VLLMEngine.completions):
        assert "except (ValueError, VLLMClientError)" in inspect.getsource(method)
    assert issubclass(HeadraceEngine, vllm_engine.VLLMEngine)
    assert inspect.isasyncgenfunction(AsyncLLM.generate)


@pytest.mark.parametrize("serving", [chat_serving, completion_serving])
def test_vllms_streams_report_a_generation_error_first_and_without_a_traceback(serving: Any) -> None:
    source = inspect.getsource(serving)
    _, _, after = source.partition("except GenerationError as e:")
    assert after.lstrip().startswith('yield f"data: {self._convert_generation_error_to_streaming_response(e)}')
    assert "except Exception as e:" in after
