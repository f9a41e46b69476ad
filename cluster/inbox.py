"""What replicas have reported since it was last read, and when they are to report next."""

from __future__ import annotations

import math
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict
from typing import Any

from cluster.tuned import TunedModel

_NOT_TUNED_S = _UNLISTED_S = 30.0
_LEAD_S, _A_SECOND = 0.1, 500.0
"""Reports come this early before a pass, and so many replicas may report in a second."""
_LATEST_SHARE = 0.5
"""The first reports for a pass come at most this share of a period before it."""
LARGEST_REPORT_BYTES = 8 << 20


class Inbox:
    """The latest report of each engine by name; a later one replaces an earlier one, read or not."""

    def __init__(self) -> None:
        self._unread: dict[str, bytes] = {}
        self._heard_s: dict[str, float] = {}

    def take(self, reports: Mapping[str, bytes], now_s: float) -> None:
        """Store reports; what is too large to be one is left out."""
        for name, report in reports.items():
            if len(report) <= LARGEST_REPORT_BYTES:
                self._unread[name], self._heard_s[name] = report, now_s

    def fresh(self, names: Collection[str]) -> dict[str, bytes]:
        """The unread reports of these engines, which are read now."""
        return {name: self._unread.pop(name) for name in sorted(names) if name in self._unread}

    def heard_s(self, name: str) -> float:
        """When an engine last reported; minus infinity: never."""
        return self._heard_s.get(name, -math.inf)

    def keep_only(self, names: Collection[str], now_s: float) -> None:
        """Forget engines of other names, after a while: a new replica may report before it is listed."""
        for name in self._heard_s.keys() - set(names):
            if self._heard_s[name] < now_s - _UNLISTED_S:
                del self._heard_s[name]
                self._unread.pop(name, None)


def digesting(model: TunedModel) -> dict[str, Any]:
    """How the replicas of a model are to digest what their engines have seen, JSON-ready.

    tuning: fields of `TuningSettings`; profile: those of `IterationTimeModel` (None: the engine's own estimate).
    """
    controller, law = model.settings.controller, model.time_model
    names = ("window_s", "min_finished", "overflow_probability")
    return {
        "tuning": {name: getattr(controller, name) for name in names}, "profile": None if law is None else asdict(law),
    }


NOT_TUNED: Mapping[str, Any] = {"next_s": _NOT_TUNED_S, "tuning": {}, "profile": None, "cursors": {}}
"""The answer to replicas of a model that is not tuned."""


def next_report_s(name: str, period_s: float, replicas: int, until_pass_s: float) -> float:
    """Seconds until the next report of the replica with this engine: some time before a pass, so that not all come at
    once, and not for the same pass again. until_pass_s: seconds until the next pass."""
    lead_s = min(_LATEST_SHARE * period_s, _LEAD_S + _place_of(name) * replicas / _A_SECOND)
    until_s = max(until_pass_s, 0.0) - lead_s
    return until_s if until_s >= (1 - _LATEST_SHARE) * period_s / 2 else until_s + period_s


def _place_of(name: str) -> float:
    """A number from 0 to 1, always the same for a name."""
    return zlib.crc32(name.encode()) / 2**32
