"""Errors in OpenAI's form, rejections (HTTP 429) included; nothing of the server's insides reaches a client.

The fence around the non-public names of Ray Serve LLM that carry them.
"""

from __future__ import annotations

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import ValidationError
from ray.llm._internal.common.errors import VLLM_CLIENT_ERRORS
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from starlette.exceptions import HTTPException

from router.refusal import shortened
from scheduler.openai_error import error_body
from scheduler.rejection import Rejection

_FAILED = "the server failed on this request"
_OF_A_WRONG_SHAPE = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
_RETRY_AFTER_S = 1
_OURS = "server_error"
logger = logging.getLogger(__name__)


def bad_request(message: str) -> OpenAIHTTPException:
    """HTTP 400 with an OpenAI-style body, to be raised from an ingress method."""
    return OpenAIHTTPException(status_code=400, message=shortened(message), type="invalid_request_error")


class Unavailable(OpenAIHTTPException):
    """HTTP 503: no replica can take the request now. retry_after_s: seconds, a whole number."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(status_code=int(HTTPStatus.SERVICE_UNAVAILABLE), message=message, type=_OURS)
        self.retry_after_s = retry_after_s


def failed_request(message: str) -> OpenAIHTTPException:
    """HTTP 500 with an OpenAI-style body, to be raised from an ingress method."""
    return OpenAIHTTPException(
        status_code=int(HTTPStatus.INTERNAL_SERVER_ERROR), message=message, type=_OURS
    )


def speak_openai(app: FastAPI) -> FastAPI:
    """Give all HTTP errors (unknown model or path, invalid body, rejection) OpenAI's form."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OpenAIHTTPException, _openai_error)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_middleware(Failures)
    return app


class Failures:
    """ASGI middleware: an exception becomes one answer, 400 where a client caused it, else 500.

    vLLM's request models raise what they stumble over in a body of the wrong shape: whatever is raised before a body
    has become a request (`state.is_valid`) is the client's. A response that has begun can only end; the exception
    closes its connection.
    """

    def __init__(self, app: Any) -> None:
        self._app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer in place of an exception."""
        begun = False

        async def noting(message: Any) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            await self._app(scope, receive, noting)
        except Exception as error:
            if begun or scope["type"] != "http":
                raise
            is_valid = scope["method"] != "POST" or scope.get("state", {}).get("is_valid", False)
            request_id = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
            await _answer_to(error, request_id, is_valid)(scope, receive, send)


def _answer_to(error: Exception, request_id: str, is_valid: bool) -> JSONResponse:
    if not is_valid and isinstance(error, _OF_A_WRONG_SHAPE):
        return _response(400, "the body has a field of the wrong type or with a value that is not allowed")
    if type(error) is ValueError and isinstance(error.__cause__, ValidationError):  # Ray's, of a message's content
        return _response(400, "messages have content of the wrong type")
    if isinstance(error, (*VLLM_CLIENT_ERRORS, ValidationError)):
        first = str(error).strip().splitlines()[-1:] or [""]  # of a Ray error: what follows the traceback
        return _response(400, f"the engine does not accept this request: {first[0]}")
    logger.error("request %s failed", request_id, exc_info=error)
    return _response(500, f"{_FAILED} (request {request_id[:64]})" if request_id else _FAILED)


def _response(status_code: int, message: str, headers: Any = None) -> JSONResponse:
    return JSONResponse(error_body(status_code, shortened(message)), status_code, headers=headers)


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return _response(error.status_code, str(error.detail), error.headers)


async def _invalid(request: Request, error: Exception) -> JSONResponse:
    """The first field that is wrong; its value is not repeated."""
    assert isinstance(error, RequestValidationError)
    first = next(iter(error.errors()), {"loc": ("body",), "msg": "it cannot be read"})
    field = ".".join(str(part)[:40] for part in first["loc"] if part != "body")[:80] or "the body"
    return _response(400, f"{field}: {first['msg']}")


async def _openai_error(request: Request, error: Exception) -> JSONResponse:
    """Ray's exception for an error response; a request that was turned away, or waited too long, gets `Retry-After`."""
    assert isinstance(error, OpenAIHTTPException)
    rejection = Rejection.from_json(error.message)
    if rejection and error.status_code == rejection.kind.http_status:
        request.state.reason = rejection.word  # for `router.outcomes`
        return _response(error.status_code, rejection.text, {"Retry-After": str(rejection.retry_after_s)})
    if error.status_code == HTTPStatus.INTERNAL_SERVER_ERROR and error.type != _OURS:  # Ray's own may say anything
        return _response(error.status_code, _FAILED)
    body = error_body(error.status_code, shortened(error.message))
    body["error"]["type"] = error.type
    headers = None
    if error.status_code in (HTTPStatus.REQUEST_TIMEOUT, HTTPStatus.SERVICE_UNAVAILABLE):
        headers = {"Retry-After": str(getattr(error, "retry_after_s", _RETRY_AFTER_S))}
    return JSONResponse(body, error.status_code, headers=headers)
