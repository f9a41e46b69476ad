"""A replica that is slow for a while: a neighbour on its device, a clock turned down, a failing link."""

from __future__ import annotations

import math
from dataclasses import dataclass

from scheduler.model.iteration_time import require_number
from simulator.workload.arrivals import named_numbers

_USAGE = "at=…,factor=…,[until=…]"


@dataclass(frozen=True, slots=True)
class Slowdown:
    """From `at_s` until `until_s` (virtual seconds) every iteration that starts takes `factor` times as long."""

    at_s: float
    factor: float
    until_s: float = math.inf

    def factor_at(self, now_s: float) -> float:
        """The factor on the modelled seconds of an iteration that starts now."""
        return self.factor if self.at_s <= now_s < self.until_s else 1.0


def parse_slowdown(text: str) -> Slowdown:
    """The slowdown that a text describes.

    at=60,factor=2              iterations that start at 60 s or later take twice as long
    at=60,until=180,factor=2    the same, only until 180 s

    Raises ValueError naming what is unknown, missing or out of range.
    """
    what = f"slowdown {text!r}"
    given = named_numbers(what, text.strip(), ("at", "factor"), ("until",), _USAGE)
    slowdown = Slowdown(given["at"], given["factor"], given.get("until", math.inf))
    try:
        require_number("at", slowdown.at_s)
        require_number("factor", slowdown.factor, allow_zero=False)
    except ValueError as error:
        raise ValueError(f"{what}: {error}") from None
    if not slowdown.until_s > slowdown.at_s:
        raise ValueError(f"{what}: until is {slowdown.until_s!r}; it must be > at, which is {slowdown.at_s!r}")
    return slowdown
