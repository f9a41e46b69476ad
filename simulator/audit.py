"""Whether rejections were right: the same run again, with some of the rejected requests admitted."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student_t

from simulator.config import SimulationConfig
from simulator.output.metrics import good_requests, rejected_requests

ADMITTED_SHARE = 0.05
"""Of the rejections, the share that a replay admits: enough to tell a gain from chance, too few to change the load."""
_CONFIDENCE = 0.95


def audit_rejections(
    requests: Path, config: SimulationConfig, goods_with: Callable[[Collection[int]], frozenset[int]]
) -> dict[str, Any]:
    """The result of `config.audit` replays, each with another 5 % of the window's rejections admitted (seeded).

    requests: the run's requests file. goods_with: the good requests of the same run when no rule may reject those of
    these numbers.

    Keys: `wrong_rejection_fraction`, the good requests that a run gains for each one admitted: a request served
    at the cost of another was rejected rightly; `wrong_rejection_low`, `wrong_rejection_high`: its 95 % interval over
    the replays (None for a single one); all three between 0 and 1. `rejected_individually_servable_fraction`, of those
    admitted, the share that met its own targets, whatever that cost others. Empty when no request was rejected.
    """
    rejected = rejected_requests(requests, config.window)
    if not rejected:
        return {}
    rng = np.random.default_rng(config.workload.seed)
    goods = len(good_requests(requests, config.window, config.slo))
    admitted = max(1, round(ADMITTED_SHARE * len(rejected)))
    gains, servable = [], 0
    for _ in range(config.audit):
        drawn = rng.choice(rejected, size=admitted, replace=False).tolist()
        goods_now = goods_with(drawn)
        servable += len(goods_now.intersection(drawn))
        gains.append((len(goods_now) - goods) / admitted)
    wrong, radius = float(np.mean(gains)), _radius(gains)
    return {
        "wrong_rejection_fraction": _fraction(wrong),
        "wrong_rejection_low": None if radius is None else _fraction(wrong - radius),
        "wrong_rejection_high": None if radius is None else _fraction(wrong + radius),
        "rejected_individually_servable_fraction": servable / (admitted * config.audit),
    }


def _radius(values: list[float]) -> float | None:
    if len(values) < 2:
        return None
    quantile = float(student_t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1))
    return quantile * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def _fraction(value: float) -> float:
    return min(1.0, max(0.0, value))
