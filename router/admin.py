"""The control endpoints' bodies, and what an update means for each replica. No HTTP and no Ray in here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

from pydantic import BaseModel, ConfigDict

from scheduler.messages import Telemetry
from scheduler.thresholds import InvalidThresholds, Thresholds, parse_thresholds, thresholds_as_dict


class AdminError(ValueError):
    """A control request that cannot be carried out, with the HTTP status that says so."""

    def __init__(self, status_code: int, message: str) -> None:
        super().__init__(message)
        self.status_code = status_code


class ThresholdsUpdate(BaseModel):
    """thresholds: the new ones, whole (a missing `version` means one more than in force); pin: stop automatic tuning
    (the default when thresholds are given); auto: resume it; replica: one replica's id, or all when missing."""

    model_config = ConfigDict(extra="forbid")

    replica: str | None = None
    thresholds: dict[str, Any] | None = None
    pin: bool | None = None
    auto: bool = False


def plan_update(update: ThresholdsUpdate, telemetry: Mapping[str, Telemetry | Exception]) -> dict[str, Thresholds]:
    """The thresholds each target is to get, checked against each target's engine.

    Raises:
        AdminError: 400 for values that cannot be, 404 for an unknown replica, 409 for an old version, 503 when a target
            does not answer. Nothing has been changed then.
    """
    if update.auto and (update.pin or update.thresholds is not None):
        raise AdminError(400, "auto = true resumes automatic tuning and goes with neither pin nor thresholds")
    if not update.auto and update.thresholds is None and update.pin is None:
        raise AdminError(400, "nothing to do: give thresholds, pin = true or auto = true")
    if update.replica is not None and update.replica not in telemetry:
        known = ", ".join(telemetry) or "none"
        raise AdminError(404, f"replica = {update.replica!r} does not exist; the replicas are {known}")
    if not telemetry:
        raise AdminError(503, "no replica is running yet; try again when /readyz answers 200")
    targets = telemetry if update.replica is None else {update.replica: telemetry[update.replica]}
    return {name: _planned(update, name, report) for name, report in targets.items()}


def _check_pace(thresholds: Thresholds) -> None:
    if thresholds.policy == "fluid" and thresholds.pace is None:
        raise AdminError(400, "thresholds.pace is missing: the controller solves it; send auto = true instead")


def _planned(update: ThresholdsUpdate, name: str, report: Telemetry | Exception) -> Thresholds:
    if not isinstance(report, Telemetry):
        raise AdminError(503, f"replica {name} does not answer: {report}")
    in_force = report.thresholds
    if update.thresholds is None:
        pinned = bool(update.pin) and not update.auto
        # A pin holds until it is lifted; what resumes tuning keeps the values until the controller speaks.
        return replace(in_force, pinned=pinned, valid_for_s=None, version=in_force.version + 1,
                       reason="pinned by an operator" if pinned else "automatic tuning resumed by an operator")
    try:
        wanted = parse_thresholds(update.thresholds)
        wanted.check_fits(report.limits)
        wanted.check_serves()
    except InvalidThresholds as error:
        raise AdminError(400, f"replica {name}: {error}") from error
    _check_pace(wanted)
    if "version" not in update.thresholds:
        wanted = wanted.with_version(in_force.version + 1)
    elif wanted.version <= in_force.version:
        raise AdminError(
            409, f"replica {name}: thresholds.version = {wanted.version} is not newer than version "
            f"{in_force.version}, which is in force; allowed: more than {in_force.version}, or leave it out",
        )
    pinned = True if update.pin is None else update.pin
    return replace(wanted, pinned=pinned, reason=wanted.reason or "set by an operator")


def telemetry_as_dict(report: Telemetry) -> dict[str, Any]:
    """One replica's own part of `/admin/state`: JSON-ready, without the records."""
    gauges, limits = asdict(report.gauges), asdict(report.limits)
    return {
        "engine_id": report.engine_id,
        "thresholds": thresholds_as_dict(report.thresholds),
        "from_config": report.from_config,
        **gauges,
        "kv_used_fraction": report.kv_used_fraction,
        "limits": limits,
        "counters": asdict(report.counters) | {"in_flight": report.counters.in_flight},
        "preemptions": report.counters.preemptions,
    }
