"""The outermost layer of the ingress: what a request must pass before an endpoint sees it. Plain ASGI, no Ray.

In this order, the cheapest first: the path's characters, size of the headers, API key, requests under way, room at the
replicas, the body with its size, pace and form, what it asks for, and rates. A refusal is answered at once, and nothing
of it is logged.
"""

from __future__ import annotations

import re
import time
import uuid
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from functools import partial
from http import HTTPStatus
from typing import Any

from starlette._utils import get_route_path
from starlette.middleware.cors import CORSMiddleware

from router.auth import ANONYMOUS, Holder, Keyring
from router.dashboard.files import PATH as DASHBOARD
from router.front_door import FrontDoor, Reports, Tenant
from router.key_usage import KeyUsage
from router.limits import NO_OTHERS, Limits
from router.outcomes import Outcomes, Watched
from router.refusal import Refusal
from router.request_body import (
    Demand,
    Disconnected,
    apart,
    asked_for,
    asked_to_embed,
    parse,
    read_body,
    require_json,
)
from router.tenants import TenantConfig
from scheduler.metrics import UNKNOWN

ASGIApp = Callable[[Any, Any, Any], Awaitable[None]]
_CHAT = "/v1/chat/completions"
GENERATING = frozenset({_CHAT, "/v1/completions"})
_FORMS = frozenset({"/v1/audio/transcriptions"})
_NOT_SERVED = frozenset({HTTPStatus.TOO_MANY_REQUESTS, HTTPStatus.SERVICE_UNAVAILABLE})
_EMBEDDING = frozenset({"/v1/embeddings", "/v1/score"})
_OPEN = frozenset({"/healthz", "/readyz", DASHBOARD})
"""Paths without a key, beside the files of the dashboard, which hold no data; /admin asks for the operator's, all
others for a user's, known or not."""
_WITH_BODY = frozenset({"POST", "PUT", "PATCH"})
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
"""In no path of ours. Starlette's routes also match a path with a line feed at its end, which is not in the sets above.
"""


class Desk:
    """What the gate of one ingress knows: the keys, the limits and what is used of them, the room at the replicas.

    models: ids of the models served. outcomes: how requests end. `change` loses no count.
    """

    def __init__(
        self, keys: Keyring, front_door: FrontDoor, usage: KeyUsage, models: Collection[str], limits: Limits,
        model_limits: Mapping[str, Limits] = NO_OTHERS, outcomes: Outcomes | None = None,
    ) -> None:
        self.outcomes = outcomes or Outcomes()
        self.keys, self.front_door, self.usage, self._models = keys, front_door, usage, frozenset(models)
        self.limits, self._model_limits = limits, dict(model_limits)

    def change(self, tenants: Sequence[TenantConfig], limits: Limits, model_limits: Mapping[str, Limits]) -> None:
        """New tenants and limits, in force from the next request on."""
        self.keys, self.limits, self._model_limits = Keyring(tenants), limits, dict(model_limits)

    def limits_of(self, model: str | None) -> Limits:
        """The limits of a model's requests; those of the application where it has none of its own."""
        return self._model_limits.get(model or "", self.limits)

    def share_with(self, ingresses: int) -> int:
        """So many ingress replicas share the room and the limits of keys; at least this one, which may not be listed
        yet."""
        self.front_door.ingresses = self.usage.ingresses = max(1, ingresses)
        return self.usage.ingresses

    def turned_away(self, name: str | None, engine_requests: int = 1) -> int:
        """Requests for this model rejected here since the last call, for each of so many engine requests."""
        model = self.model_of(name)
        return self.front_door.take_turned_away(model, engine_requests) if model else 0

    def model_of(self, name: str | None) -> str | None:
        """The model that a request means, without an adapter's name; None if it is not served, or not said."""
        if name is None:
            return next(iter(self._models)) if len(self._models) == 1 else None
        base = name.partition(":")[0]
        return name if name in self._models else base if base in self._models else None


def open_desk(
    tenants: Sequence[TenantConfig], limits: Limits, model_limits: Mapping[str, Limits], reports: Reports,
    models: Collection[str], clock: Callable[[], float] = time.monotonic, outcomes: Outcomes | None = None,
) -> Desk:
    """A desk whose keys are in this process's environment."""
    return Desk(Keyring(tenants), FrontDoor(reports, clock), KeyUsage(clock), models, limits, model_limits, outcomes)


class Gate:
    """ASGI middleware. desk: what it knows, asked for at each request."""

    def __init__(self, app: ASGIApp, desk: Callable[[], Desk]) -> None:
        self._app, self._desk = app, desk
        self._cors: tuple[tuple[str, ...], ASGIApp] = ((), self._pass)

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Refuse the request, or hand it to the app with its body read."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        if _CONTROL.search(scope["path"]):
            await Refusal(404, "the path has a control character; there is no such path").send(send)
            return
        origins = self._desk().limits.cors_origins
        if origins and get_route_path(scope).startswith("/v1/"):
            if self._cors[0] != origins:
                self._cors = origins, CORSMiddleware(
                    self._pass, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"]
                )
            await self._cors[1](scope, receive, send)
        else:
            await self._pass(scope, receive, send)

    async def _pass(self, scope: Any, receive: Any, send: Any) -> None:
        desk, path = self._desk(), get_route_path(scope)
        if path not in GENERATING or scope["method"] != "POST":
            await self._answer(_Visit(desk, path, scope), receive, send)
            return
        state = scope.setdefault("state", {})
        with desk.outcomes.tracing.route(scope) as note, Watched(desk.outcomes, state, note) as watched:
            visit = _Visit(desk, path, scope, watched)
            await self._answer(visit, watched.hearing(receive), watched.noting(send))

    async def _answer(self, visit: _Visit, receive: Any, send: Any) -> None:
        try:
            await self._check(visit, receive, send)
        except Refusal as refusal:
            visit.watched.reason = refusal.reason
            await refusal.send(send)
        except Disconnected:
            return

    async def _check(self, visit: _Visit, receive: Any, send: Any) -> None:
        desk, path, scope = visit.desk, visit.path, visit.scope
        if sum(len(name) + len(value) for name, value in scope["headers"]) > desk.limits.header_bytes:
            raise Refusal(431, f"the headers are larger than {desk.limits.header_bytes} bytes", closes=True)
        if path in _OPEN or path.startswith(DASHBOARD + "/"):
            await self._app(scope, receive, send)
        elif path == "/admin" or path.startswith("/admin/"):
            await self._operator(desk, scope, visit.headers, receive, send)
        else:
            await self._user(desk, visit, receive, send)

    async def _operator(self, desk: Desk, scope: Any, headers: Mapping[bytes, bytes], receive: Any, send: Any) -> None:
        desk.keys.require_operator(headers)
        if scope["method"] in _WITH_BODY:
            body = await read_body(headers, receive, desk.limits)
            require_json(headers)
            await apart(body, partial(parse, body, desk.limits))
            receive = replayed(body, receive)
        await self._app(scope, receive, send)

    async def _user(self, desk: Desk, visit: _Visit, receive: Any, send: Any) -> None:
        holder = visit.identify()
        if not visit.has_body:
            await self._app(visit.scope, receive, send)
            return
        desk.usage.enter(holder.name, desk.limits.of_key(holder.name))
        try:
            await visit.serve(self._app, receive, send)
        finally:
            desk.usage.leave(holder.name)


class _Visit:
    """One request. watched: how it ends, for the metrics."""

    def __init__(self, desk: Desk, path: str, scope: Any, watched: Watched | None = None) -> None:
        self.desk, self.path, self.scope, self.headers = desk, path, scope, dict(scope["headers"])
        self.watched = watched or Watched(desk.outcomes, {})
        self._generates = path in GENERATING
        self.has_body = scope["method"] in _WITH_BODY
        self._request_id = self.headers.get(b"x-request-id", b"").decode("latin-1") or uuid.uuid4().hex
        self._holder, self._tenant = Holder(ANONYMOUS), Tenant()
        self._status = 0

    def identify(self) -> Holder:
        """Whose request it is; the endpoints find its tenant in `request.state`. 401 for an unknown key."""
        self._holder = self.desk.keys.require_user(self.headers)
        tenant = self._holder.tenant
        self.watched.tenant = tenant.name if tenant else UNKNOWN
        self.scope.setdefault("state", {})["tenant"] = tenant
        if tenant:
            self._tenant = Tenant(tenant.name, tenant.weight)
        return self._holder

    async def serve(self, app: ASGIApp, receive: Any, send: Any) -> None:
        """Check the body and what it asks for, and call the app; a place is taken from before to after."""
        desk, holder = self.desk, self._holder.name
        model = self._of_model(desk.model_of(None) if self._generates else None)
        if model is not None:
            self._require_room(model, 1)  # before the body: with one model nothing of it needs to be known
        body = await read_body(self.headers, receive, desk.limits)
        asked, model = await apart(body, partial(self._checked, body))
        desk.usage.take(holder, desk.limits.of_key(holder), asked.tokens, self._request_id)
        if model is None:
            await app(self.scope, replayed(body, receive), send)
            return
        try:
            self._require_room(model, asked.requests)
        except Refusal:
            desk.usage.give_back(holder, asked.tokens)
            raise
        desk.front_door.sent(model, asked.requests, self._tenant)
        try:
            await app(self.scope, replayed(body, receive), self._noting_status(send))
        finally:
            if self._status in _NOT_SERVED:
                desk.usage.give_back(holder, asked.tokens)
            if self._status != HTTPStatus.TOO_MANY_REQUESTS:
                desk.front_door.ended(model, asked.requests)

    def _require_room(self, model: str, requests: int) -> None:
        desk = self.desk
        if not desk.limits_of(model).front_door:
            return
        rejection = desk.front_door.full(model, self._request_id, requests, self._tenant)
        if rejection:
            raise Refusal(429, rejection.text, retry_after_s=rejection.retry_after_s, reason="front_door")

    def _checked(self, body: bytes) -> tuple[Demand, str | None]:
        """What the body asks for, and of which model if it generates."""
        if self.path in _FORMS:
            return Demand(), None
        require_json(self.headers)
        found = parse(body, self.desk.limits)
        if not self._generates:
            return asked_to_embed(found) if self.path in _EMBEDDING else Demand(), None
        name = found.get("model")
        model = self.desk.model_of(name if isinstance(name, str) else None)
        demand = asked_for(found, self.desk.limits_of(model), is_chat=self.path == _CHAT)
        return demand, self._of_model(model)

    def _of_model(self, model: str | None) -> str | None:
        self.watched.model = model or UNKNOWN
        return model

    def _noting_status(self, send: Any) -> Any:
        async def noting(message: Any) -> None:
            if message["type"] == "http.response.start":
                self._status = message["status"]
            await send(message)

        return noting


def replayed(body: bytes, receive: Any) -> Any:
    """An ASGI `receive` that gives the body once more, and then what comes after it."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
