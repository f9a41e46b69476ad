"""The control endpoints' bodies, and the thresholds that follow for each replica. No HTTP and no Ray."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from replicas.ranks import named_by
from router.authors import Name, Reason
from router.refusal import LONGEST_MESSAGE
from scheduler.messages import Telemetry
from scheduler.thresholds import InvalidThresholds, Thresholds, parse_thresholds, thresholds_as_dict
from scheduler.wire import UnreadableMessage

_LARGEST_VERSION = 2**31 - 1
_OF_ONE_UPDATE = ("version", "valid_for_s", "pinned", "reason")
"""Fields about how thresholds became active, not about scheduling."""


_WHY = {True: "pinned by an operator", False: "automatic tuning resumed by an operator"}


class AdminError(ValueError):
    """An invalid control request, with its HTTP status."""

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(message)
        self.status_code = status_code


class ThresholdsUpdate(BaseModel):
    """thresholds: the new ones, whole when they name a policy, else a change of the fields they name (a missing
    `version` means the active one plus 1); keep_others: they are a change of the fields they name also with a policy;
    pin: stop automatic tuning (the default when thresholds are given); auto: resume it; replica: one replica's id, one
    of its engines as `state` names it, or all when missing, new ones too; by: the operator's name for itself; reason:
    why. What is kept and shown is bounded: `version` below 2³¹, `reason` and `replica` to 200 characters."""

    model_config = ConfigDict(extra="forbid")

    replica: Annotated[str, Field(max_length=LONGEST_MESSAGE)] | None = None
    thresholds: dict[str, Any] | None = None
    keep_others: bool = False
    pin: bool | None = None
    auto: bool = False
    by: Name = ""
    reason: Reason = ""

    @field_validator("thresholds")
    @classmethod
    def _bounded(cls, thresholds: dict[str, Any] | None) -> dict[str, Any] | None:
        given = thresholds or {}
        version, reason = given.get("version"), given.get("reason")
        if isinstance(version, int) and not 0 <= version <= _LARGEST_VERSION:
            raise ValueError(f"version is not allowed; allowed: an integer from 0 to {_LARGEST_VERSION}")
        if isinstance(reason, str) and len(reason) > LONGEST_MESSAGE:
            raise ValueError(f"reason has {len(reason)} characters; allowed: at most {LONGEST_MESSAGE}")
        return thresholds


def plan_update(update: ThresholdsUpdate, telemetry: Mapping[str, Telemetry | Exception]) -> dict[str, Thresholds]:
    """The new thresholds of each engine named, checked against that engine's limits.

    Raises:
        AdminError: 400 for an invalid value, 404 for an unknown replica, 409 for an old version, 503 when an engine
            does not answer. No replica has been changed then.
    """
    if update.auto and (update.pin or update.thresholds is not None):
        raise AdminError(400, "auto = true resumes automatic tuning and goes with neither pin nor thresholds")
    if not update.auto and update.thresholds is None and update.pin is None:
        raise AdminError(400, "nothing to do: give thresholds, pin = true or auto = true")
    named = named_by(telemetry, update.replica)
    if update.replica is not None and not named:
        known = ", ".join(telemetry) or "none"
        raise AdminError(404, f"replica = {update.replica!r} does not exist; the replicas are {known}")
    if not telemetry:
        raise AdminError(503, "no replica is running yet; try again when /readyz answers 200")
    return {name: _planned(update, name, telemetry[name]) for name in named}


def _check_params(name: str, thresholds: Thresholds) -> None:
    if thresholds.policy == "fluid" and thresholds.fluid is None:
        raise AdminError(
            400, f"replica {name}: thresholds.fluid is missing: the controller solves it; send auto = true instead"
        )


def _planned(update: ThresholdsUpdate, name: str, report: Telemetry | Exception) -> Thresholds:
    if isinstance(report, UnreadableMessage):
        raise AdminError(503, f"replica {name} cannot be set from here: {report}")
    if not isinstance(report, Telemetry):
        raise AdminError(503, f"replica {name} does not answer: {report}")
    active = report.thresholds
    if update.thresholds is None:
        pinned = bool(update.pin) and not update.auto
        # A pin holds until it is lifted; resuming keeps the values until the controller pushes its own.
        return replace(active, pinned=pinned, valid_for_s=None, version=active.version + 1,
                       reason=update.reason or _WHY[pinned])
    given = update.thresholds
    if update.keep_others or "policy" not in given:
        active_values = thresholds_as_dict(active)
        given = {field: value for field, value in active_values.items() if field not in _OF_ONE_UPDATE} | given
    try:
        wanted = parse_thresholds(given)
        wanted.check_fits(report.limits)
        wanted.check_serves()
    except InvalidThresholds as error:
        raise AdminError(400, f"replica {name}: {error}") from error
    _check_params(name, wanted)
    if "version" not in update.thresholds:
        wanted = wanted.with_version(active.version + 1)
    elif wanted.version <= active.version:
        raise AdminError(
            409, f"replica {name}: thresholds.version = {wanted.version} is not newer than version "
            f"{active.version}, which is active; allowed: more than {active.version}, or leave it out",
        )
    pinned = True if update.pin is None else update.pin
    return replace(wanted, pinned=pinned, reason=update.reason or wanted.reason or "set by an operator")
