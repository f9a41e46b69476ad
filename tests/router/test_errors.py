"""Errors as OpenAI clients read them, a rejection with `Retry-After`."""

from __future__ import annotations

import pytest
from fastapi import FastAPI, HTTPException
from fastapi.testclient import TestClient
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException

from router.errors import Unavailable, speak_openai
from scheduler.rejection import Kind, Rejection


@pytest.fixture
def app() -> FastAPI:
    return speak_openai(FastAPI())


def answer_to(app: FastAPI, error: Exception):
    @app.get("/")
    async def fail() -> None:
        raise error

    return TestClient(app).get("/")


def test_a_rejection_is_429_with_retry_after(app: FastAPI) -> None:
    rejection = Rejection("queue full: one more request could not meet its latency target", 4)
    error = OpenAIHTTPException(status_code=429, message=rejection.as_json(), type="Too Many Requests")
    response = answer_to(app, error)
    assert response.status_code == 429
    assert response.headers["retry-after"] == "4"
    assert response.json()["error"] == {
        "message": rejection.text, "type": "rate_limit_error", "param": None, "code": 429,
    }


@pytest.mark.parametrize("kind", [Kind.RECALLED, Kind.ENDED])
def test_what_a_stopping_server_turns_away_is_503_with_retry_after(app: FastAPI, kind: Kind) -> None:
    rejection = Rejection("the replica is stopping", 5, kind)
    response = answer_to(app, OpenAIHTTPException(status_code=503, message=rejection.as_json(), type=kind))
    assert (response.status_code, response.headers["retry-after"]) == (503, "5")
    assert response.json()["error"] == {
        "message": rejection.text, "type": "server_error", "param": None, "code": 503,
    }


def test_only_a_429_that_the_engine_marked_is_a_rejection() -> None:
    for status, message in ((400, Rejection("x", 9).as_json()), (429, "rejected: by the user; retry in 60 s")):
        error = OpenAIHTTPException(status_code=status, message=message, type="t")
        response = answer_to(speak_openai(FastAPI()), error)
        assert (response.status_code, response.json()["error"]["message"]) == (status, message)
        assert "retry-after" not in response.headers


def test_other_errors_of_the_engine_keep_their_status_words_and_type(app: FastAPI) -> None:
    error = OpenAIHTTPException(status_code=400, message="max_tokens is too large", type="BadRequestError")
    response = answer_to(app, error)
    assert response.status_code == 400 and "retry-after" not in response.headers
    assert response.json()["error"]["message"] == "max_tokens is too large"
    assert response.json()["error"]["type"] == "BadRequestError"


@pytest.mark.parametrize(("error", "after_s"), [
    (Unavailable("no replica", 7), "7"), (OpenAIHTTPException(status_code=408, message="too long", type="t"), "1"),
])
def test_a_wait_that_was_too_long_says_when_to_come_again(
    app: FastAPI, error: OpenAIHTTPException, after_s: str
) -> None:
    response = answer_to(app, error)
    assert (response.status_code, response.headers["retry-after"]) == (error.status_code, after_s)
    assert response.json()["error"]["message"] == error.message


def test_plain_http_errors_speak_openai_too(app: FastAPI) -> None:
    response = answer_to(app, HTTPException(404, "no such model"))
    assert response.json() == {
        "error": {"message": "no such model", "type": "invalid_request_error", "param": None, "code": 404},
    }
