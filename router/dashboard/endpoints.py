"""The endpoints behind the dashboard, as a part of `HeadraceIngress`.

    GET  /admin/overview   health, load, limit, latest change and one replica more, in sentences; a row for each replica
    GET  /admin/history    the last quarter of an hour by replica, a point for each control cycle
    POST /admin/predict    the fluid model's plan for other targets, thresholds or replicas; changes nothing
"""
# No `from __future__ import annotations` here: FastAPI reads these signatures.

from typing import Annotated, Any

from fastapi import Query, Response
from fastapi.responses import JSONResponse

from replicas.questions import ask_all, ask_telemetry
from replicas.ranks import EngineAddress
from router.admin import AdminError
from router.admin_answers import refused
from router.dashboard.overview import overview
from router.dashboard.prediction import PredictionRequest, in_words, model_of, values_of
from router.live_settings import SettingsOffice
from scheduler.messages import Telemetry

After = Annotated[float, Query(allow_inf_nan=False)]


class DashboardEndpoints:
    """Needs of the ingress: the state, the engines, the settings, and the controller's answers."""

    _office: SettingsOffice

    async def _state(self, method: str) -> dict[str, Any]:
        """The state with the answer of this method of the controller."""
        raise NotImplementedError

    async def _engines(self) -> dict[str, EngineAddress]:
        raise NotImplementedError

    async def _ask_controller(self, method: str, *args: Any) -> dict[str, Any]:
        raise NotImplementedError

    async def admin_overview(self) -> Response:
        """What an operator wants to know first, in sentences."""
        state = await self._state("overview")
        models = {name: self._office.complete(name) for name in self._office.settings}
        return JSONResponse(overview(state | {"models": models}))

    async def admin_history(self, after: After = 0.0) -> Response:
        """The points newer than `after` (Unix seconds); none while the controller does not answer, with the reason."""
        answer = await self._ask_controller("history", after)
        replicas = answer.pop("replicas", {})
        return JSONResponse({"replicas": replicas, "controller": answer})

    async def admin_predict(self, body: PredictionRequest) -> Response:
        """What the fluid model expects of these values: `now`, `then`, and in a `sentence`. Nothing is changed."""
        try:
            model = model_of(body, list(self._office.settings))
            engines = {name: one for name, one in (await self._engines()).items() if one.model_id == model}
            asked = await ask_all(engines, _gauges) if body.thresholds is not None else {}
            values = values_of(body, model, self._office, asked)
        except AdminError as error:
            return refused(error.status_code, str(error))
        answer = await self._ask_controller("predict", model, values)
        if "now" not in answer:
            return refused(503 if not answer["alive"] else 409, answer["reason"])
        now, then = answer["now"], answer["then"]
        return JSONResponse({"model": model, "now": now, "then": then, "sentence": in_words(now, then)})


async def _gauges(engine: EngineAddress) -> Telemetry:
    return await ask_telemetry(engine, cursor=None)


DASHBOARD_ENDPOINTS = {
    "admin_overview": lambda app: app.get("/admin/overview"),
    "admin_history": lambda app: app.get("/admin/history"),
    "admin_predict": lambda app: app.post("/admin/predict"),
}
