"""The API key: when `HEADRACE_API_KEY` is set, `/v1/*` and `/admin/*` ask for it as OpenAI clients send it."""

import hmac
import os
from collections.abc import Callable
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request

API_KEY_VARIABLE = "HEADRACE_API_KEY"

Endpoints = dict[str, Callable[[FastAPI], Callable[..., Any]]]


def require_api_key(request: Request) -> None:
    """Refuse a request without `Authorization: Bearer <key>` (HTTP 401); no key configured means no check."""
    expected = os.environ.get(API_KEY_VARIABLE)
    if not expected:
        return
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), expected.encode()):
        raise HTTPException(401, "invalid or missing API key; send it as 'Authorization: Bearer KEY'")


class _Guarded:
    """A FastAPI app whose routes all check the key; Ray's endpoint maps call `app.get`, `app.post`, `app.put`."""

    def __init__(self, app: FastAPI) -> None:
        self._app = app

    def __getattr__(self, method: str) -> Callable[..., Any]:
        add_route = getattr(self._app, method)

        def guarded(path: str, **options: Any) -> Any:
            return add_route(path, dependencies=[Depends(require_api_key)], **options)

        return guarded


def guard(endpoints: Endpoints) -> Endpoints:
    """The same endpoints, each behind the API key."""

    def behind_key(register: Callable[[FastAPI], Callable[..., Any]]) -> Callable[[FastAPI], Callable[..., Any]]:
        return lambda app: register(_Guarded(app))  # type: ignore[arg-type]  # quacks like the app for routes

    return {name: behind_key(register) for name, register in endpoints.items()}
