"""API keys as OpenAI clients send them: the operator's, and one for each tenant.

When `HEADRACE_API_KEY` is set, `/v1/*` and `/admin/*` ask for it. Tenants are configured by name, weight and the
environment variable that holds their key; a tenant's key is accepted on `/v1/*` only and gives a request its tenant.
With tenants, `/admin/*` answers 401 unless an operator's key is set.
"""

import hmac
import os
from collections.abc import Callable, Sequence
from typing import Any

from fastapi import Depends, FastAPI, HTTPException, Request

from router.tenants import TenantConfig

API_KEY_VARIABLE = "HEADRACE_API_KEY"

Endpoints = dict[str, Callable[[FastAPI], Callable[..., Any]]]


OPERATOR, ANONYMOUS = "operator key", "anonymous"
_followed: list[Sequence[TenantConfig]] = []


def follow_tenants(tenants: Sequence[TenantConfig]) -> None:
    """Other tenants from now on, for every keyring of this process."""
    _followed[:] = [tenants]


def key_of(request: Request) -> str:
    """With which key a request to `/admin` came, in words."""
    return OPERATOR if _same(_given(request), os.environ.get(API_KEY_VARIABLE, "")) else ANONYMOUS


class Keyring:
    """API keys and what each allows. Read from the environment at each request: keys change without a restart."""

    def __init__(self, tenants: Sequence[TenantConfig] = ()) -> None:
        self._configured = tenants

    @property
    def _tenants(self) -> Sequence[TenantConfig]:
        return _followed[0] if _followed else self._configured

    def require_operator(self, request: Request) -> None:
        """401 without the operator's key; every request passes when no key is configured."""
        expected = os.environ.get(API_KEY_VARIABLE)
        if expected or self._tenants:
            _require(bool(expected) and _same(_given(request), expected or ""))

    def require_user(self, request: Request) -> None:
        """401 for an unknown key; otherwise store the key's tenant on the request."""
        given, operator = _given(request), os.environ.get(API_KEY_VARIABLE)
        # All keys are compared, so that response times do not reveal a partial match.
        found = [tenant for tenant in self._tenants if _same(given, os.environ.get(tenant.api_key_env, ""))]
        is_operator = _same(given, operator or "")
        request.state.tenant = found[0] if found else None
        _require(bool(found) or is_operator or not (operator or self._tenants))


def guard(endpoints: Endpoints, check: Callable[[Request], None]) -> Endpoints:
    """The same endpoints, each behind `check`."""

    def behind_key(register: Callable[[FastAPI], Callable[..., Any]]) -> Callable[[FastAPI], Callable[..., Any]]:
        return lambda app: register(_Guarded(app, check))  # type: ignore[arg-type]  # has the app's route methods

    return {name: behind_key(register) for name, register in endpoints.items()}


class _Guarded:
    """A FastAPI app with a check on every route; Ray's endpoint maps call `app.get`, `app.post`, `app.put`."""

    def __init__(self, app: FastAPI, check: Callable[[Request], None]) -> None:
        self._app, self._check = app, check

    def __getattr__(self, method: str) -> Callable[..., Any]:
        add_route = getattr(self._app, method)

        def guarded(path: str, **options: Any) -> Any:
            return add_route(path, dependencies=[Depends(self._check)], **options)

        return guarded


def _given(request: Request) -> str:
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return given if scheme.lower() == "bearer" else ""


def _same(given: str, expected: str) -> bool:
    return bool(expected) and hmac.compare_digest(given.encode(), expected.encode())


def _require(allowed: bool) -> None:
    if not allowed:
        raise HTTPException(401, "invalid or missing API key; send it as 'Authorization: Bearer KEY'")
