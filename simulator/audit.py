"""Whether rejections were right: the run again, once for each of some rejected requests, with that one let in."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from simulator.config import SimulationConfig
from simulator.measure import good_requests, rejected_requests


def audit_rejections(
    requests: Path, config: SimulationConfig, goods_with: Callable[[int], frozenset[int]]
) -> dict[str, Any]:
    """Of `config.audit` of the window's rejections, drawn at random by the seed (all if there are fewer), the share
    that was wrong.

    requests: what happened. goods_with: the good requests of the same run when no rule may reject the one of that
    number.

    Keys: `wrong_rejection_fraction`, of those who would have met their targets and made the run better by a request;
    `rejected_individually_servable_fraction`, of those who would have met their targets, whatever that cost others.
    Both are None when nothing was rejected.
    """
    rejected = rejected_requests(requests, config.window)
    if not rejected:
        return {}
    rng = np.random.default_rng(config.workload.seed)
    drawn = rng.choice(rejected, size=min(config.audit, len(rejected)), replace=False)
    goods = len(good_requests(requests, config.window, config.slo.promised))
    servable = wrong = 0
    for number in sorted(drawn.tolist()):
        with_it = goods_with(number)
        servable += number in with_it
        wrong += number in with_it and len(with_it) > goods
    return {
        "wrong_rejection_fraction": wrong / len(drawn),
        "rejected_individually_servable_fraction": servable / len(drawn),
    }
