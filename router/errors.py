"""Errors in OpenAI's form, rejections (HTTP 429) included.

The fence around the non-public name of Ray Serve LLM that carries them.
"""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from starlette.exceptions import HTTPException

from scheduler.rejection import Rejection

_RETRY_AFTER_S = 1


def bad_request(message: str) -> OpenAIHTTPException:
    """HTTP 400 with an OpenAI-style body, to be raised from an ingress method."""
    return OpenAIHTTPException(status_code=400, message=message, type="invalid_request_error")


class Unavailable(OpenAIHTTPException):
    """HTTP 503: no replica can take the request now. retry_after_s: seconds, a whole number."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(status_code=int(HTTPStatus.SERVICE_UNAVAILABLE), message=message, type="server_error")
        self.retry_after_s = retry_after_s


def failed_request(message: str) -> OpenAIHTTPException:
    """HTTP 500 with an OpenAI-style body, to be raised from an ingress method."""
    return OpenAIHTTPException(
        status_code=int(HTTPStatus.INTERNAL_SERVER_ERROR), message=message, type="server_error"
    )


def error_body(status_code: int, message: str) -> dict[str, dict[str, object]]:
    """The body of an error as OpenAI clients read it."""
    kind = "invalid_request_error" if status_code < 500 else "server_error"
    if status_code == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status_code}}


def speak_openai(app: FastAPI) -> FastAPI:
    """Give all HTTP errors (unknown model or path, missing key, rejection) OpenAI's form."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OpenAIHTTPException, _openai_error)
    return app


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, headers=error.headers)


async def _openai_error(request: Request, error: Exception) -> JSONResponse:
    """Ray's exception for an error response; a request that was turned away, or waited too long, gets `Retry-After`."""
    assert isinstance(error, OpenAIHTTPException)
    rejection = Rejection.from_json(error.message)
    if rejection and error.status_code == rejection.kind.http_status:
        body = error_body(error.status_code, rejection.text)
        return JSONResponse(body, error.status_code, headers={"Retry-After": str(rejection.retry_after_s)})
    body = error_body(error.status_code, error.message)
    body["error"]["type"] = error.type
    headers = None
    if error.status_code in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.SERVICE_UNAVAILABLE):
        headers = {"Retry-After": str(getattr(error, "retry_after_s", _RETRY_AFTER_S))}
    return JSONResponse(body, error.status_code, headers=headers)
