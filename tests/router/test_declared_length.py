"""A declared output length reaches the place that vLLM hands to its scheduler, or is rejected."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("ray.llm", reason="Ray Serve LLM is not installed")
pytest.importorskip("vllm", reason="vLLM is not installed")

from router.declared_length import move_declared_length  # imports Ray Serve LLM
from router.errors import OpenAIHTTPException
from scheduler.settings import EXPECTED_OUTPUT_TOKENS


def body(extra: dict[str, Any] | None = None, xargs: dict[str, Any] | None = None) -> SimpleNamespace:
    return SimpleNamespace(model_extra=extra, vllm_xargs=xargs)


def test_it_moves_to_vllm_s_arguments() -> None:
    request = body(extra={EXPECTED_OUTPUT_TOKENS: 50, "other": 1})
    move_declared_length(request)
    assert request.vllm_xargs == {EXPECTED_OUTPUT_TOKENS: 50}


def test_other_arguments_stay() -> None:
    request = body(extra={EXPECTED_OUTPUT_TOKENS: 50}, xargs={"mine": 3})
    move_declared_length(request)
    assert request.vllm_xargs == {"mine": 3, EXPECTED_OUTPUT_TOKENS: 50}


def test_it_may_be_in_vllm_s_arguments_already() -> None:
    request = body(xargs={EXPECTED_OUTPUT_TOKENS: 50})
    move_declared_length(request)
    assert request.vllm_xargs == {EXPECTED_OUTPUT_TOKENS: 50}


@pytest.mark.parametrize("place", ["extra", "xargs"])
@pytest.mark.parametrize("declared", [0, -1, 1.5, 50.0, "50", True, False, None, [50]])
def test_what_is_no_count_of_tokens_is_400(place: str, declared: Any) -> None:
    request = body(**{place: {EXPECTED_OUTPUT_TOKENS: declared}})
    with pytest.raises(OpenAIHTTPException) as error:
        move_declared_length(request)
    assert error.value.status_code == 400
    assert error.value.type == "invalid_request_error"
    message = error.value.message
    assert f"expected_output_tokens = {declared!r}" in message
    assert "a whole number of tokens >= 1" in message


@pytest.mark.parametrize(
    "untouched",
    [
        SimpleNamespace(model_extra={EXPECTED_OUTPUT_TOKENS: 0}), body(), body(extra={"other": 1}),
        body(xargs={"mine": 3}),
    ],
    ids=["embeddings", "plain", "other-extra", "other-argument"],
)
def test_bodies_that_declare_nothing_are_left_alone(untouched: SimpleNamespace) -> None:
    before = dict(vars(untouched))
    move_declared_length(untouched)
    assert vars(untouched) == before


def test_a_real_chat_request_carries_it_into_its_sampling_parameters() -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import ChatCompletionRequest

    request = ChatCompletionRequest.model_validate(
        {"model": "m", "messages": [{"role": "user", "content": "hi"}], EXPECTED_OUTPUT_TOKENS: 50}
    )
    move_declared_length(request)
    sampling = request.to_sampling_params(max_tokens=200, default_sampling_params={})
    assert sampling.extra_args is not None
    assert sampling.extra_args[EXPECTED_OUTPUT_TOKENS] == 50


def test_a_real_completion_request_carries_it_too() -> None:
    from ray.llm._internal.serve.core.configs.openai_api_models import CompletionRequest

    request = CompletionRequest.model_validate({"model": "m", "prompt": "hi", EXPECTED_OUTPUT_TOKENS: 50})
    move_declared_length(request)
    assert request.vllm_xargs == {EXPECTED_OUTPUT_TOKENS: 50}
