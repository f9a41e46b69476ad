"""`POST /admin/predict`: what the fluid model expects of other values, before they are applied. No HTTP and no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from router.admin import AdminError, ThresholdsUpdate, plan_update
from router.dashboard.overview import rate
from router.live_settings import SettingsOffice, SettingsUpdate
from router.refusal import LONGEST_MESSAGE
from scheduler.messages import Telemetry

_PREDICTED = frozenset({"targets"})
MOST_REPLICAS, MOST_RPS = 10_000, 1e6
_Name = Annotated[str, Field(max_length=LONGEST_MESSAGE)]


class PredictionRequest(BaseModel):
    """The values to plan for; what is missing stays as it is.

    model: may be missing where there is only one. settings: as in `PUT /admin/settings`, of which {"targets": {…}} are
    planned for. thresholds: as in `PUT /admin/thresholds`, of which max_running and token_budget are planned for; auto:
    without the pinned ones. replicas: engines that share the traffic. rate_rps: requests per second, in all.
    """

    model_config = ConfigDict(extra="forbid")

    model: _Name | None = None
    settings: dict[str, Any] | None = None
    thresholds: dict[str, Any] | None = None
    auto: bool = False
    replicas: Annotated[int, Field(ge=1, le=MOST_REPLICAS, strict=True)] | None = None
    rate_rps: Annotated[float, Field(gt=0, le=MOST_RPS, allow_inf_nan=False)] | None = None


def model_of(asked: PredictionRequest, models: list[str]) -> str:
    """The model that is asked about.

    Raises:
        AdminError: 404 for an unknown model, 400 when none is named and there are several.
    """
    known = ", ".join(models) or "none"
    if asked.model is None:
        if len(models) != 1:
            raise AdminError(400, f"model is missing; the models are {known}")
        return models[0]
    if asked.model not in models:
        raise AdminError(404, f"model = {asked.model!r} does not exist; the models are {known}")
    return asked.model


def values_of(
    asked: PredictionRequest, model: str, office: SettingsOffice, telemetry: Mapping[str, Telemetry | Exception]
) -> dict[str, Any]:
    """The values for the controller's `predict`, checked as if they were applied. telemetry: of the model's engines.

    Raises:
        AdminError: as `PUT /admin/settings` and `PUT /admin/thresholds` would; 400 for values that no plan depends on.
    """
    values: dict[str, Any] = {"replicas": asked.replicas, "rate_rps": asked.rate_rps, "released": asked.auto}
    if asked.settings:
        if others := asked.settings.keys() - _PREDICTED:
            raise AdminError(400, f"settings.{min(others)} cannot be predicted; allowed: {', '.join(_PREDICTED)}")
        update = SettingsUpdate(settings=asked.settings, model=model)
        values["targets"] = office.targets_after(update, model)
    if asked.thresholds is not None:
        if asked.auto:
            raise AdminError(400, "auto = true goes without thresholds; give one of them")
        for wanted in plan_update(ThresholdsUpdate(thresholds=asked.thresholds), telemetry).values():
            limits = next(one.limits for one in telemetry.values() if isinstance(one, Telemetry))
            values["max_running"] = wanted.max_running or limits.max_num_seqs
            values["token_budget"] = wanted.token_budget or limits.max_num_batched_tokens
            break
    return values


def in_words(now: Mapping[str, Any], then: Mapping[str, Any]) -> str:
    """The prediction in a few sentences."""
    if then["reason"]:
        return f"The TPOT target could not be met: {then['reason']}."
    moves = then["goodput_rps"] - now["goodput_rps"]
    offered = then["offered_rps"]
    if abs(moves) <= max(0.01 * offered, 0.005):
        said = f"At the present load nothing changes: {_good(then)}."
    else:
        direction = "More" if moves > 0 else "Fewer"
        said = f"{direction} requests would be in time: {_good(then)} (now {now['goodput_rps']:.3g})."
    if then["capacity_rps"] and now["capacity_rps"]:
        said += f" Capacity: {rate(then['capacity_rps'])} (now {now['capacity_rps']:.3g})."
    limits = now["limit"], then["limit"]
    if limits[0] != limits[1]:
        said += f" Limit: {limits[1]} (now {limits[0]})."
    return said + (" Output lengths are still guessed." if then["cold"] else "")


def _good(plan: Mapping[str, Any]) -> str:
    return f"{plan['goodput_rps']:.3g} of the {rate(plan['offered_rps'])} offered"
