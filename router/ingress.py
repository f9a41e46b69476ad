"""`HeadraceIngress`: Ray's OpenAI ingress, and beside `/v1/*` the endpoints that show and set the thresholds.

    GET  /admin/state        every replica: active thresholds, iteration-time model, KV use, requests; the equilibrium
    GET  /admin/events       the latest changes of thresholds, with the old and the new values
    GET  /admin/thresholds   active thresholds by replica
    PUT  /admin/thresholds   set, `pin` or return to `auto`, on all replicas or one
    GET  /healthz, /readyz   the ingress runs; at least one replica's engine answers
"""
# No `from __future__ import annotations` here: FastAPI reads these signatures.

import asyncio
import logging
import time
from collections.abc import AsyncGenerator
from typing import Any, Protocol

import ray
from fastapi import Request, Response
from fastapi.responses import JSONResponse
from ray import serve
from ray.actor import ActorHandle
from ray.serve.llm.ingress import OpenAiIngress

from replicas.actor_calls import ReplicaUnavailable, replica_ids
from replicas.questions import Unanswered, ask_all, ask_stats, ask_telemetry, offer_thresholds
from replicas.ranks import EngineAddress, engine_addresses
from replicas.ray_patches import listen_where_the_node_does
from router.admin import AdminError, ThresholdsUpdate, plan_update, readiness
from router.declared_length import move_declared_length
from router.tenants import sign
from scheduler.messages import Ack, Telemetry
from scheduler.openai_error import error_body
from scheduler.thresholds import Thresholds, thresholds_as_dict
from scheduler.wire import UnreadableMessage

_CONTROLLER_ANSWER_S = 3.0
_NO_CONTROLLER = "the controller does not answer; replicas keep their thresholds"
logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """Starts the controller unless it runs (`cluster.controller.ControllerKeeper`)."""

    @property
    def check_every_s(self) -> float: ...

    def ensure(self, app_name: str) -> ActorHandle: ...


class HeadraceIngress(OpenAiIngress):
    """OpenAI endpoints and the control endpoints of one application."""

    def __init__(self, *args: Any, keeper: Keeper | None = None, ranks: int = 1, **kwargs: Any) -> None:
        listen_where_the_node_does()
        super().__init__(*args, **kwargs)
        self._ranks = ranks
        self._app_name = serve.get_replica_context().app_name
        self._keeper = keeper
        self._controller: ActorHandle | None = None
        self._watch = asyncio.get_running_loop().create_task(self._watch_controller()) if keeper else None

    async def _watch_controller(self) -> None:
        assert self._keeper is not None
        while True:
            try:
                # Keep the handle: Ray ends an actor when its first handle is dropped.
                if self._controller is None or not await self._keeps_running(self._controller):
                    self._controller = await asyncio.to_thread(self._keeper.ensure, self._app_name)
            except Exception:  # requests are served without a controller too
                logger.exception("could not start the controller; trying again")
            await asyncio.sleep(self._keeper.check_every_s)

    async def _keeps_running(self, controller: ActorHandle) -> bool:
        """Start the controller's loop if needed; False when the actor has died for good, True while Ray restarts it."""
        try:
            await asyncio.wait_for(asyncio.wrap_future(controller.keep_running.remote().future()), _CONTROLLER_ANSWER_S)
        except ray.exceptions.ActorUnavailableError:
            return True
        except ray.exceptions.ActorDiedError:
            return False
        except TimeoutError:
            return True
        return True

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncGenerator[Any, None]:
        move_declared_length(body)
        sign(body, getattr(raw_request.state, "tenant", None) if raw_request is not None else None)
        async for response in super()._get_response(body=body, call_method=call_method, raw_request=raw_request):
            yield response

    async def admin_state(self) -> Response:
        """The state of every replica and of the controller; unreachable replicas are listed with the reason."""
        telemetry, controller = await asyncio.gather(self._telemetry(), self._ask_controller("state"))
        known = controller.get("replicas", {})
        replicas = {}
        for name, report in telemetry.items():
            if isinstance(report, Telemetry):
                unknown: dict[str, Any] = dict.fromkeys(("time_model", "fluid", "forecast"))
                empty = unknown | {"decision": controller.get("reason", "not seen yet")}
                replicas[name] = {"reachable": True} | report.shown() | known.get(name, empty)
            else:
                replicas[name] = {"reachable": False, "reason": str(report)}
        state = {
            "application": self._app_name,
            "at_unix_s": time.time(),
            "replicas": replicas,
            "controller": {key: value for key, value in controller.items() if key != "replicas"},
        }
        return JSONResponse(state)

    async def admin_events(self) -> Response:
        """The controller's latest changes of thresholds; empty while it does not answer, with the reason in
        `controller`."""
        controller = await self._ask_controller("events")
        return JSONResponse({"events": controller.pop("events", []), "controller": controller})

    async def get_thresholds(self) -> Response:
        """Active thresholds by replica."""
        telemetry = await self._telemetry()
        replicas = {
            name: thresholds_as_dict(report.thresholds) if isinstance(report, Telemetry) else {"error": str(report)}
            for name, report in telemetry.items()
        }
        return JSONResponse({"replicas": replicas})

    async def put_thresholds(self, body: ThresholdsUpdate) -> Response:
        """Set, pin or unpin thresholds. Values are checked against every engine before any is changed."""
        engines = await self._engines()
        try:
            planned = plan_update(body, await ask_all(engines, _without_records))
        except AdminError as error:
            return _error(error.status_code, str(error))
        answers = await asyncio.gather(*(_apply(engines[name], planned[name]) for name in planned))
        acks: dict[str, Ack] = dict(zip(planned, answers, strict=True))
        rejected = {name: ack.reason for name, ack in acks.items() if not ack.accepted}
        results = {
            name: {"accepted": ack.accepted, "version": ack.active_version, "reason": ack.reason}
            for name, ack in acks.items()
        }
        if rejected:
            codes = {ack.code for ack in acks.values() if not ack.accepted}
            status = 503 if "unavailable" in codes else 409 if "stale" in codes else 400
            return _error(status, f"rejected by {', '.join(rejected)}: {next(iter(rejected.values()))}", results)
        return JSONResponse({"replicas": results})

    async def healthz(self) -> Response:
        """The ingress runs."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """At least one replica's engine answers."""
        body = readiness(await ask_all(await self._engines(), ask_stats))
        return JSONResponse(body, status_code=200 if body["ready"] else 503)

    async def _telemetry(self) -> dict[str, Telemetry | Unanswered]:
        return await ask_all(await self._engines(), _without_records)

    async def _engines(self) -> dict[str, EngineAddress]:
        return engine_addresses(await asyncio.to_thread(replica_ids, self._app_name), self._ranks)

    async def _ask_controller(self, method: str) -> dict[str, Any]:
        if self._controller is None:
            reason = _NO_CONTROLLER if self._keeper else "automatic tuning is off in the configuration"
            return {"alive": False, "reason": reason}
        try:
            reference = getattr(self._controller, method).remote()
            answer: dict[str, Any] = await asyncio.wait_for(
                asyncio.wrap_future(reference.future()), _CONTROLLER_ANSWER_S
            )
            return {"alive": True} | answer
        except Exception as error:  # gone, restarting or busy: replicas are still shown
            return {"alive": False, "reason": f"{_NO_CONTROLLER} ({type(error).__name__})"}


async def _without_records(engine: EngineAddress) -> Telemetry:
    return await ask_telemetry(engine, cursor=None)


async def _apply(engine: EngineAddress, thresholds: Thresholds) -> Ack:
    try:
        return await offer_thresholds(engine, thresholds, automatic=False)
    except (ReplicaUnavailable, UnreadableMessage) as error:
        return Ack.without_version(str(error))


ADMIN_ENDPOINTS = {
    "admin_state": lambda app: app.get("/admin/state"),
    "admin_events": lambda app: app.get("/admin/events"),
    "get_thresholds": lambda app: app.get("/admin/thresholds"),
    "put_thresholds": lambda app: app.put("/admin/thresholds"),
}
HEALTH_ENDPOINTS = {
    "healthz": lambda app: app.get("/healthz"),
    "readyz": lambda app: app.get("/readyz"),
}


def _error(status_code: int, message: str, results: dict[str, Any] | None = None) -> JSONResponse:
    body: dict[str, Any] = error_body(status_code, message)
    if results is not None:
        body["replicas"] = results
    return JSONResponse(body, status_code=status_code)
