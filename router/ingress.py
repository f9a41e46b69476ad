"""`HeadraceIngress`: Ray's OpenAI ingress, and beside `/v1/*` the endpoints that show and set the thresholds.

    GET  /admin/state        every replica: active thresholds, iteration-time model, KV use, requests; the equilibrium
    GET  /admin/events       the latest changes of thresholds, with the old and the new values
    GET  /admin/thresholds   active thresholds by replica
    PUT  /admin/thresholds   set, `pin` or return to `auto`, on all replicas or one
    GET  /admin/settings     the settings in force by model: targets, policy, limits, controller
    PUT  /admin/settings     change some of them until the next deployment; nothing restarts
    and those of `router.dashboard.endpoints`
    GET  /healthz, /readyz   the ingress runs; at least one replica's engine answers
"""
# No `from __future__ import annotations` here: FastAPI reads these signatures.

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Iterable, Mapping
from contextlib import aclosing
from functools import partial
from typing import Any, Protocol

import ray
from fastapi import HTTPException, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from ray import serve
from ray.actor import ActorHandle
from ray.serve.context import _get_serve_request_context
from ray.serve.llm.ingress import OpenAiIngress

from replicas.actor_calls import ReplicaUnavailable, replicas_of
from replicas.cluster_store import ClusterStore
from replicas.live_settings import Settings
from replicas.logs import follow_serve
from replicas.measured import METER, keep_telling
from replicas.questions import (
    ANSWER_S,
    ask_all,
    ask_stats,
    ask_telemetry,
    ask_to_look_at_settings,
    offer_thresholds,
)
from replicas.ranks import EngineAddress, ServedModel
from replicas.ray_patches import listen_where_the_node_does, take_adapters_from_folders
from replicas.served import engines_of
from replicas.tracing import Tracing
from router.adapters import exists
from router.admin import AdminError, ThresholdsUpdate, plan_update
from router.admin_answers import refused, state_of
from router.asked import engine_requests
from router.attempts import Attempts, ending_at_an_error
from router.auth import ANONYMOUS, OPERATOR
from router.authors import author
from router.dashboard.endpoints import DASHBOARD_ENDPOINTS, DashboardEndpoints
from router.declared_length import move_declared_length
from router.gate import Desk, open_desk
from router.in_flight import InFlight
from router.limits import DEFAULT_LIMITS, MAX_WAIT_S, NO_OTHERS, Limits
from router.live_settings import Judge, SettingsOffice, SettingsUpdate, check_fits, settings_event
from router.outcomes import Outcomes
from router.output_bound import bound_output
from router.pins import NOT_KEPT, KeptPin, kept_pins
from router.replica_watch import ReplicaWatch, readiness
from router.rotation import ROTATION
from router.tenants import TenantConfig, is_signed, sign
from scheduler.messages import Ack, Telemetry
from scheduler.thresholds import Thresholds, thresholds_as_dict
from scheduler.wire import UnreadableMessage

NOT_TRACED: Mapping[str, Any] = {}
_CONTROLLER_ANSWER_S = 3.0
_SILENT_S = 1.0
"""What the state waits for a replica that the watch has not heard of lately."""
_RETRY_S = 0.5
_TRIES = 3
_ECHOED = 200  # characters of a client's input in an answer
_NO_CONTROLLER = "the controller does not answer; replicas keep their thresholds"
logger = logging.getLogger(__name__)


class Keeper(Protocol):
    """Starts the controller unless it runs (`cluster.keeper.ControllerKeeper`)."""

    models: Mapping[str, Any]

    def with_settings(self, settings: Mapping[str, Settings]) -> "Keeper": ...

    @property
    def check_every_s(self) -> float: ...

    def ensure(self, app_name: str) -> ActorHandle: ...


class HeadraceIngress(DashboardEndpoints, OpenAiIngress):
    """OpenAI endpoints and the control endpoints of one application. models: what it serves, by deployment."""

    def __init__(
        self, *args: Any, models: Mapping[str, ServedModel], judge: Judge, keeper: Keeper | None = None,
        tracing: Mapping[str, Any] = NOT_TRACED, **kwargs: Any,
    ) -> None:
        follow_serve()
        listen_where_the_node_does()
        take_adapters_from_folders()
        super().__init__(*args, **kwargs)
        self._in_flight = InFlight()
        self._models = models
        self._attempts = Attempts(is_stopping=lambda: self._in_flight.is_closed)
        context = serve.get_replica_context()
        self._app_name, self._deployment = context.app_name, context.deployment
        self._keeper = keeper
        self._office = SettingsOffice(ClusterStore(self._app_name), judge, self._follow)
        self._untold = asyncio.Event()  # settings that the controller has not heard of
        self._controller: ActorHandle | None = None
        self._controller_since_unix_s = 0.0
        self.replica_watch = ReplicaWatch(self._look_around, ask_stats)
        self._tenants: tuple[TenantConfig, ...] = ()
        self._outcomes = Outcomes(METER, tracing=Tracing(
            tracing.get("otlp_endpoint"), service="headrace-ingress", instance=context.replica_tag,
            ratio=tracing.get("sampling_ratio", 1.0),
        ))
        self.desk = open_desk(
            self._tenants, DEFAULT_LIMITS, NO_OTHERS, self.replica_watch, self._model_cards, outcomes=self._outcomes
        )
        loop = asyncio.get_running_loop()
        self._watching = [
            loop.create_task(self.replica_watch.run()), loop.create_task(keep_telling(self._outcomes.tell))
        ]
        if keeper:
            self._watching.append(loop.create_task(self._watch_controller()))

    async def _watch_controller(self) -> None:
        assert self._keeper is not None
        while True:
            try:
                # Keep the handle: Ray ends an actor when its first handle is dropped.
                if self._controller is None or not await self._keeps_running(self._controller):
                    self._controller = await asyncio.to_thread(self._keeper.ensure, self._app_name)
            except Exception:  # requests are served without a controller too
                logger.exception("could not start the controller; trying again")
            if self._untold.is_set():
                await self._tell_controller(self._keeper)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._untold.wait(), self._keeper.check_every_s)

    async def _tell_controller(self, keeper: Keeper) -> None:
        self._untold.clear()
        try:
            await self._call_controller("configure", keeper.models)
        except Exception as error:
            logger.warning("the controller has not taken the settings, trying again: %r", error)
            await asyncio.sleep(_RETRY_S)
            self._untold.set()

    async def reconfigure(self, user_config: dict[str, Any]) -> None:
        """Take new settings; Serve calls it after the start and whenever others are deployed."""
        self._tenants = tuple(TenantConfig.model_validate(tenant) for tenant in user_config.get("tenants", ()))
        await self._office.deployed(user_config["models"])
        self._apply_here(self._office.settings)  # the tenants may be others although the settings are the same

    def _follow(self, settings: Mapping[str, Settings]) -> None:
        """The settings of the models are now these."""
        self._apply_here(settings)
        if self._keeper is not None:
            self._keeper = self._keeper.with_settings(settings)
            self._untold.set()

    def _apply_here(self, settings: Mapping[str, Settings]) -> None:
        """Tenants and limits of this ingress. Limits for all are the same in every model's settings."""
        limits = {name: Limits.model_validate(one.get("limits", {})) for name, one in settings.items()}
        self.desk.change(self._tenants, next(iter(limits.values()), DEFAULT_LIMITS), limits)

    async def _keeps_running(self, controller: ActorHandle) -> bool:
        """Start the controller's loop if needed; False when the actor has died for good, True while Ray restarts it."""
        answered = False
        try:
            asked = asyncio.wrap_future(controller.keep_running.remote().future())
            since_unix_s = await asyncio.wait_for(asked, _CONTROLLER_ANSWER_S)
            answered = True
            if since_unix_s != self._controller_since_unix_s and self._office.settings:
                self._untold.set()  # Ray restarts it with the settings that the first one began with
            self._controller_since_unix_s = since_unix_s
        except ray.exceptions.ActorUnavailableError:
            return True
        except ray.exceptions.ActorDiedError:
            return False
        except TimeoutError:
            return True
        finally:
            self._outcomes.controller_up = answered
        return True

    async def _get_model_id(self, model: str | None) -> str:
        model_id: str = await super()._get_model_id(model)
        if not await exists(model_id, self._lora_paths, self._get_lora_model_metadata_func):
            raise HTTPException(404, f"Could not find model with id {model_id[:_ECHOED]!r}.")
        return model_id

    async def model(self, model_id: str) -> Any:
        """Ray's card of a model or adapter; None when there is none."""
        there = await exists(model_id, self._lora_paths, self._get_lora_model_metadata_func)
        return await super().model(model_id) if there else None

    async def _get_response(
        self, *, body: Any, call_method: str, raw_request: Request | None = None
    ) -> AsyncGenerator[Any, None]:
        with self._in_flight.request(str(getattr(body, "request_id", ""))):
            move_declared_length(body)
            model = self.desk.model_of(body.model)
            bound_output(body, self.desk.limits_of(model).max_tokens)
            tenant = getattr(raw_request.state, "tenant", None) if raw_request is not None else None
            turned_away = self.desk.turned_away(body.model, engine_requests(body)) if is_signed(body) else 0
            if raw_request is not None:
                raw_request.state.is_valid = True
            respond = partial(super()._get_response, body=body, call_method=call_method, raw_request=raw_request)

            def send() -> AsyncGenerator[Any, None]:
                nonlocal turned_away
                sign(body, tenant, turned_away)
                turned_away = 0  # a second attempt does not count them again
                chunks: AsyncGenerator[Any, None] = respond()
                return chunks

            request_id = _get_serve_request_context()._internal_request_id
            most_wait_s = self._office.settings.get(model or "", {}).get("max_wait_s", MAX_WAIT_S)
            async with aclosing(self._attempts.answer(send, request_id, most_wait_s)) as chunks:
                async for chunk in chunks:
                    yield chunk

    async def stop_admitting(self) -> int:
        """Answer new requests with 503 from now on; returns how many are still in flight. For an operator's stop."""
        self._in_flight.close()
        return self._in_flight.count

    async def _process_llm_request(self, *args: Any, **kwargs: Any) -> Response:
        response: Response = await super()._process_llm_request(*args, **kwargs)
        if isinstance(response, StreamingResponse):
            response.body_iterator = ending_at_an_error(response.body_iterator)
        return response

    async def admin_state(self) -> Response:
        """The state of every replica and of the controller; unreachable replicas are listed with the reason."""
        return JSONResponse(await self._state("state"))

    async def _state(self, method: str) -> dict[str, Any]:
        engines = await self._engines()
        latest = self.replica_watch.latest()
        heard = {engines[name] for name, report in latest.items() if name in engines and report.is_ready}

        async def ask(engine: EngineAddress) -> Telemetry:
            return await _without_records(engine, timeout_s=ANSWER_S if engine in heard else _SILENT_S)

        telemetry, controller = await asyncio.gather(ask_all(engines, ask), self._ask_controller(method))
        return {"application": self._app_name} | state_of(
            engines, telemetry, latest, controller, self.desk.front_door
        )

    async def admin_events(self) -> Response:
        """The controller's latest changes of thresholds; empty while it does not answer, with the reason in
        `controller`."""
        controller = await self._ask_controller("events")
        return JSONResponse({"events": controller.pop("events", []), "controller": controller})

    async def get_thresholds(self) -> Response:
        """Active thresholds by replica."""
        telemetry = await ask_all(await self._engines(), _without_records)
        replicas = {
            name: thresholds_as_dict(report.thresholds) if isinstance(report, Telemetry) else {"error": str(report)}
            for name, report in telemetry.items()
        }
        return JSONResponse({"replicas": replicas})

    async def put_thresholds(self, body: ThresholdsUpdate) -> Response:
        """Set, pin or unpin thresholds. Values are checked against every engine before any is changed."""
        engines = await self._engines()
        has_version = "version" in (body.thresholds or {})
        for _ in range(_TRIES):
            try:
                planned = plan_update(body, await ask_all(engines, _without_records))
            except AdminError as error:
                return refused(error.status_code, str(error))
            answers = await asyncio.gather(*(_apply(engines[name], planned[name]) for name in planned))
            acks: dict[str, Ack] = dict(zip(planned, answers, strict=True))
            rejected = {name: ack.reason for name, ack in acks.items() if not ack.accepted}
            if has_version or "stale" not in {acks[name].code for name in rejected}:
                break  # else the controller has pushed a version meanwhile
        taken = {name: planned[name] for name in planned if name not in rejected}
        model_of = {name: engine.model_id for name, engine in engines.items()}
        by = author(body.by, self._key(), body.reason)
        kept = await self._keep_pins(kept_pins(body, taken, model_of, by))
        results = {
            name: {"accepted": ack.accepted, "version": ack.active_version, "reason": ack.reason}
            for name, ack in acks.items()
        }
        if rejected:
            codes = {ack.code for ack in acks.values() if not ack.accepted}
            status = 503 if "unavailable" in codes else 409 if "stale" in codes else 400
            return refused(status, f"rejected by {', '.join(rejected)}: {next(iter(rejected.values()))}", results)
        return JSONResponse({"replicas": results, "pin": kept})

    def _key(self) -> str:
        """With which key a request to /admin has come; the gate has let it through."""
        return ANONYMOUS if self.desk.keys.is_open else f"{OPERATOR} key"

    async def _keep_pins(self, calls: Iterable[KeptPin]) -> dict[str, Any]:
        """Have the controller keep what an operator did; {"kept"}, with the reason when it does not."""
        if self._keeper is None:
            return {"kept": False, "reason": "automatic tuning is off in the configuration"}
        try:
            for call in calls:
                await self._call_controller(call.method, call.pin, list(call.models), list(call.engines))
        except Exception as error:  # the engines have it; new replicas will not
            return {"kept": False, "reason": f"{NOT_KEPT} ({type(error).__name__})"}
        return {"kept": True}

    async def get_settings(self) -> Response:
        """The settings in force by model."""
        return JSONResponse({"models": self._office.shown()})

    async def put_settings(self, body: SettingsUpdate) -> Response:
        """Change settings of one model or all; they are checked as a configuration file is before any is changed."""
        engines = await self._engines()
        by = author(body.by, self._key(), body.reason)
        try:
            planned = self._office.planned(body, self.desk.keys.tenants)
            check_fits(planned, engines, await ask_all(engines, _without_records) if planned else {})
            changed = await self._office.keep(body, by, self.desk.keys.tenants)
        except AdminError as error:
            return refused(error.status_code, str(error))
        asked = {name: engine for name, engine in engines.items() if engine.model_id in changed}
        told = await ask_all(asked, ask_to_look_at_settings)
        with contextlib.suppress(Exception):  # then it is in no event; the log of this process has it
            for name, values in changed.items():
                logger.info("settings of %s changed by %s (%s): %s", name, by["by"], by["key"], values)
                await self._call_controller("settings_changed", settings_event(name, values, by))
        return JSONResponse({
            "models": {name: {key: list(pair) for key, pair in values.items()} for name, values in changed.items()},
            "replicas": {
                name: answer if isinstance(answer, dict) else {"accepted": None, "reason": str(answer)}
                for name, answer in told.items()
            },
        })

    async def healthz(self) -> Response:
        """The ingress runs."""
        return JSONResponse({"status": "ok"})

    async def readyz(self) -> Response:
        """At least one replica's engine has answered in the last few seconds; models without one are named."""
        if self._in_flight.is_closed:
            return refused(503, "the server is stopping")
        models = [model.model_id for model in self._models.values()]
        body = readiness(self.replica_watch.latest().values(), models)
        return JSONResponse(body, status_code=200 if body["ready"] else 503)

    async def _engines(self) -> dict[str, EngineAddress]:
        return await asyncio.to_thread(self._list_engines)

    def _look_around(self) -> dict[str, EngineAddress]:
        """The engines; and with how many other ingresses room and limits are shared."""
        ROTATION.ingresses = self.desk.share_with(replicas_of(self._app_name, self._deployment))
        return self._list_engines()

    def _list_engines(self) -> dict[str, EngineAddress]:
        return engines_of(self._app_name, self._models)

    async def _ask_controller(self, method: str, *args: Any) -> dict[str, Any]:
        if self._controller is None:
            reason = _NO_CONTROLLER if self._keeper else "automatic tuning is off in the configuration"
            return {"alive": False, "reason": reason}
        try:
            answer: dict[str, Any] = await self._call_controller(method, *args)
            return {"alive": True} | answer
        except Exception as error:  # gone, restarting or busy: replicas are still shown
            return {"alive": False, "reason": f"{_NO_CONTROLLER} ({type(error).__name__})"}

    async def _call_controller(self, method: str, *args: Any) -> Any:
        if self._controller is None:
            raise RuntimeError(_NO_CONTROLLER)
        reference = getattr(self._controller, method).remote(*args)
        return await asyncio.wait_for(asyncio.wrap_future(reference.future()), _CONTROLLER_ANSWER_S)


async def _without_records(engine: EngineAddress, *, timeout_s: float = ANSWER_S) -> Telemetry:
    return await ask_telemetry(engine, cursor=None, timeout_s=timeout_s)


async def _apply(engine: EngineAddress, thresholds: Thresholds) -> Ack:
    try:
        return await offer_thresholds(engine, thresholds, automatic=False)
    except (ReplicaUnavailable, UnreadableMessage) as error:
        return Ack.without_version(str(error))


def desk_of_this_ingress() -> Desk:
    """What the gate in this process knows; for `http_app`."""
    desk: Desk = serve.get_replica_context().servable_object.desk
    return desk


ADMIN_ENDPOINTS = {
    "admin_state": lambda app: app.get("/admin/state"),
    "admin_events": lambda app: app.get("/admin/events"),
    "get_thresholds": lambda app: app.get("/admin/thresholds"),
    "put_thresholds": lambda app: app.put("/admin/thresholds"),
    "get_settings": lambda app: app.get("/admin/settings"),
    "put_settings": lambda app: app.put("/admin/settings"),
    **DASHBOARD_ENDPOINTS,
}
HEALTH_ENDPOINTS = {
    "healthz": lambda app: app.api_route("/healthz", methods=["GET", "HEAD"]),
    "readyz": lambda app: app.api_route("/readyz", methods=["GET", "HEAD"]),
}
