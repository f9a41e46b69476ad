"""Errors in OpenAI's form, as the ingress and the middleware without a cluster answer them."""

from __future__ import annotations

from http import HTTPStatus


def error_body(status_code: int, message: str) -> dict[str, dict[str, object]]:
    """The body of an error as OpenAI clients read it."""
    kind = "invalid_request_error" if status_code < HTTPStatus.INTERNAL_SERVER_ERROR else "server_error"
    if status_code == HTTPStatus.TOO_MANY_REQUESTS:
        kind = "rate_limit_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status_code}}
