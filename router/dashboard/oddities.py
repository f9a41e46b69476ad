"""What is odd about a replica, as an operator names it. From the state of `/admin/state`; pure."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import median_low
from typing import Any, NamedTuple

from scheduler.model.iteration_time import IterationTimeModel

STILL_SHARE = 0.5
"""An engine is called frozen after this share of the `engine_timeout_s` after which it is replaced."""
SLOW = 1.5
POOR_FIT, BAD_FIT = 0.25, 0.5
_TYPICAL_RUNNING, _TYPICAL_TOKENS = 16, 512.0
Replica = Mapping[str, Any]


class Oddity(NamedTuple):
    """name: silent, frozen, slow, fast, cold, pinned, draining, not tuned, poor fit; level: bad, warning or note; text:
    one sentence without the replica's name."""

    name: str
    level: str
    text: str


def oddities_of(replicas: Mapping[str, Replica], timeout_s: float) -> dict[str, list[Oddity]]:
    """The oddities of every replica of one model, the worst first. timeout_s: the model's `engine_timeout_s`."""
    paces = {name: seconds for name, one in replicas.items() if (seconds := _pace_s(one)) is not None}
    usual_s = median_low(paces.values()) if paces else None
    return {name: _of(one, paces.get(name), usual_s, timeout_s) for name, one in replicas.items()}


def _of(one: Replica, pace_s: float | None, usual_s: float | None, timeout_s: float) -> list[Oddity]:
    if not one["reachable"]:
        age_s = one.get("last_answer_age_s")
        since = "it has not answered yet" if age_s is None else f"its last answer came {seconds(age_s)} ago"
        return [Oddity("silent", "bad", f"It does not answer; {since}.")]
    found = []
    still_s = one.get("still_s") or 0.0
    if still_s >= STILL_SHARE * timeout_s:
        requests = _count(one["running"], "running request")
        text = f"It has {requests} and no iteration for {seconds(still_s)}; it is replaced after {timeout_s:g} s."
        found.append(Oddity("frozen", "bad", text))
    if str(one.get("decision", "")).startswith("not tuned"):
        found.append(Oddity("not tuned", "warning", f"The controller cannot tune it ({one['decision']})."))
    deviation = one.get("deviation")
    if deviation is not None:
        level = "warning" if deviation["factor"] > 1 else "note"
        found.append(Oddity("slow" if deviation["factor"] > 1 else "fast", level, f"It {deviation['text']}."))
    elif pace_s is not None and usual_s is not None and pace_s > SLOW * usual_s:
        found.append(Oddity("slow", "warning", f"Its iterations take {pace_s / usual_s:.1f} times as long as others'."))
    fit = one.get("time_model") or {}
    if (mape := fit.get("mape") or 0.0) > POOR_FIT:
        level = "warning" if mape > BAD_FIT else "note"
        found.append(Oddity("poor fit", level, f"Its iteration times are {mape:.0%} off the model's."))
    if one.get("draining"):
        found.append(Oddity("draining", "note", "It finishes its requests and takes no new ones."))
    if one["thresholds"]["pinned"]:
        found.append(Oddity("pinned", "note", _pinned(one)))
    if (one.get("forecast") or {}).get("cold"):
        seen = one.get("finished_seen", 0)
        found.append(Oddity("cold", "note", f"{_count(seen, 'request')} finished so far: output lengths are guessed."))
    return found


def _pace_s(one: Replica) -> float | None:
    """Seconds of the same iteration on every replica, by each one's own iteration-time model."""
    fit = one.get("time_model")
    if not one["reachable"] or not fit:
        return None
    model = IterationTimeModel(**{name: fit[name] for name in IterationTimeModel.__dataclass_fields__ if name in fit})
    return model.iteration_s(0.0, _TYPICAL_RUNNING, _TYPICAL_RUNNING * _TYPICAL_TOKENS)


def _pinned(one: Replica) -> str:
    pin = one.get("pin")
    if not pin:
        return "Its thresholds are pinned: automatic tuning leaves them alone."
    why = f" ({pin['reason']})" if pin["reason"] else ""
    return f"Its thresholds are pinned by {pin['by'] or 'an operator'}{why}: automatic tuning leaves them alone."


def seconds(value: float) -> str:
    """A time span as people say it: 0.4 s, 12 s, 3 min, 2 h."""
    if value < 1:
        return f"{value:.1f} s"
    if value < 100:
        return f"{value:.0f} s"
    return f"{value / 60:.0f} min" if value < 7200 else f"{value / 3600:.0f} h"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
