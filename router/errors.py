"""Errors in OpenAI's form, rejections (HTTP 429) included.

The fence around the non-public name of Ray Serve LLM that carries them.
"""

from __future__ import annotations

from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray.llm._internal.serve.core.configs.openai_api_models import OpenAIHTTPException
from starlette.exceptions import HTTPException

from scheduler.openai_error import error_body
from scheduler.rejection import Rejection


def bad_request(message: str) -> OpenAIHTTPException:
    """HTTP 400 with an OpenAI-style body, to be raised from an ingress method."""
    return OpenAIHTTPException(status_code=400, message=message, type="invalid_request_error")


def speak_openai(app: FastAPI) -> FastAPI:
    """Give all HTTP errors (unknown model or path, missing key, rejection) OpenAI's form."""
    app.add_exception_handler(HTTPException, _http_error)
    app.add_exception_handler(OpenAIHTTPException, _openai_error)
    return app


async def _http_error(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse(error_body(error.status_code, str(error.detail)), error.status_code, headers=error.headers)


async def _openai_error(request: Request, error: Exception) -> JSONResponse:
    """Ray's exception for an error response; a rejection gets `Retry-After`."""
    assert isinstance(error, OpenAIHTTPException)
    rejection = Rejection.from_json(error.message) if error.status_code == HTTPStatus.TOO_MANY_REQUESTS else None
    if rejection:
        body = error_body(error.status_code, rejection.text)
        return JSONResponse(body, error.status_code, headers={"Retry-After": str(rejection.retry_after_s)})
    body = error_body(error.status_code, error.message)
    body["error"]["type"] = error.type
    return JSONResponse(body, error.status_code)
