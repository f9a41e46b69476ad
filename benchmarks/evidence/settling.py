"""How fast a controller settles after a change, and whether it swings afterwards, from the history that a run keeps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

SETTLED = 0.05
PARAMETERS = ("iteration_s", "prompt_flow_tokens", "queue_limit")
_WHOLE = ("queue_limit",)
"""Counts: one request more or less is rounding."""


class Settling(NamedTuple):
    """passes: of the controller, until every parameter stays close to its last value. swing: the largest relative
    change from pass to pass after that."""

    passes: int
    swing: float


def settling(
    history: Sequence[Mapping[str, Any]], from_s: float, to_s: float, parameters: Sequence[str] = PARAMETERS
) -> Settling:
    """How the thresholds settle after a change at `from_s`, the next one coming at `to_s`.

    history: rows of `Run.control()` of one replica. Close is within 5 % of the value at the last pass before `to_s`.
    Raises ValueError without a pass between the two.
    """
    passes = [row for row in history if from_s < row["at_s"] < to_s]
    if not passes:
        raise ValueError(f"the controller has not passed between {from_s:g} and {to_s:g} s")
    settled = 0
    for name in parameters:
        last = passes[-1][name]
        away = [place for place, row in enumerate(passes, 1) if not _close(name, row[name], last)]
        settled = max(settled, max(away, default=0) + 1)
    rest = passes[settled - 1 :]
    swings = [
        _distance(name, after[name], before[name])
        for name in parameters for before, after in pairwise(rest)
    ]
    return Settling(settled, max(swings, default=0.0))


def _close(name: str, value: float | None, last: float | None) -> bool:
    return _distance(name, value, last) <= SETTLED


def _distance(name: str, value: float | None, last: float | None) -> float:
    if value is None or last is None:
        return 0.0 if value is last else float("inf")
    apart = max(0.0, abs(value - last) - (name in _WHOLE))
    return apart / last if last else apart
