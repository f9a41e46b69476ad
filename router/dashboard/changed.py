"""An event of `/admin/events` in one sentence: what changed, from what to what, by what or which operator, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from router.live_settings import changes

_MOST_SHOWN = 3
_WORDS = {
    "max_running": ("most running", ""), "token_budget": ("token budget", ""), "policy": ("policy", ""),
    "fluid.queue_limit": ("longest queue", ""), "fluid.iteration_s": ("longest iteration", "ms"),
    "fluid.ttft_s": ("TTFT target", "s"), "fluid.tpot_s": ("TPOT target", "ms"),
    "fluid.latency_s": ("latency target", "s"), "fluid.capacity_rps": ("capacity", "requests/s"),
    "max_hold_s": ("longest hold", "s"),
}
"""Fields of thresholds that mean something to an operator, in the order of their interest."""


def change_in_words(event: Mapping[str, Any], now_unix_s: float) -> dict[str, Any]:
    """headline: what kind of change; sentence: the whole; with at_unix_s, age_s and kind."""
    about = f"replica {event['replica']}" if event["replica"] else event["model"] or "all models"
    by = event["by"] or "an operator"
    kind, reason = event["kind"], event["reason"]
    why = f" Reason: {reason}." if reason else ""
    values = _values(event["old"], event["new"])
    if kind == "settings":
        headline, sentence = "settings", f"{by} changed settings of {about}: {reason}."
    elif kind == "release":
        headline, sentence = "pin released", f"{by} resumed automatic tuning of {about}.{why}"
    elif kind == "pin":
        headline, sentence = "pinned", f"{by} pinned the thresholds of {about}.{why}"
    elif kind == "speed":
        headline, sentence = "speed", f"{about[0].upper()}{about[1:]} {reason}."
    else:
        headline = "thresholds"
        sentence = f"The controller changed the thresholds of {about}{f': {values}' if values else ''}.{why}"
    if not event["accepted"]:
        headline, sentence = f"{headline}: not taken", f"A change of {about} was not taken: {reason}."
    return {
        "headline": headline, "sentence": sentence, "at_unix_s": event["at_unix_s"],
        "age_s": max(0.0, now_unix_s - event["at_unix_s"]), "kind": kind,
    }


def _values(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    changed = changes(old, new)
    if old.get("fluid") is None and new.get("fluid") is not None:
        return "the first ones from the fluid model"
    shown = [f"{words} {_value(changed[key][0], unit)} → {_value(changed[key][1], unit)}"
             for key, (words, unit) in _WORDS.items() if key in changed]
    return ", ".join(shown[:_MOST_SHOWN])


def _value(value: Any, unit: str) -> str:
    if value is None:
        return "none"
    if unit == "ms":
        return f"{1000 * value:.3g} ms"
    shown = f"{value:.3g}" if isinstance(value, float) else str(value)
    return f"{shown} {unit}" if unit else shown
