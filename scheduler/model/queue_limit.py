"""How many waiting requests are of use: enough that the replica hardly ever runs short, and no more.

Source: the birth-death chain M/M(n)/1/K, whose service rate depends on how many are in service; counts that vary more
or less than Poisson's stretch the queue as in its diffusion limit (heavy traffic).
"""

from __future__ import annotations

import math

from scipy.stats import poisson

from scheduler.model.iteration_time import IterationTimeModel

_MOST_PLACES = 20_000


def queue_limit(
    *, rate_rps: float, capacity_rps: float, running: float, slowdown: float, variability: float,
    admitted_per_iteration: float, miss_probability: float, most_requests: float,
) -> int:
    """The fewest places in the queue with which the replica delivers all but `miss_probability` of its capacity.

    A replica with n of its `running` requests delivers (n/N)/(f + (1 − f) n/N) of `capacity_rps`, f = `slowdown`
    the share of a full iteration that does not shrink with its batch: those in service are a buffer too, and a queue
    has only to cover what they cannot. `variability` is the variance of arrivals and work over their mean (Poisson
    arrivals and exponential work: 1). Since requests enter once an iteration, the queue holds at least an iteration's
    admissions, but for `miss_probability`.

    Up to capacity no wait within the target does harm: the queue empties by itself, and refusing would turn away
    somebody who could be served. `most_requests` is what can wait within that target, and bounds the result (>= 1).
    """
    if most_requests <= 1 or rate_rps <= capacity_rps:
        return max(1, int(min(most_requests, _MOST_PLACES)))
    running, places = max(1, round(running)), int(min(most_requests, _MOST_PLACES))
    enough = 1 - (1 - miss_probability) * capacity_rps / rate_rps
    # Erlang's recursion for the share of arrivals that find every place taken, as one over it.
    one_over_blocked, needed = 1.0, math.inf
    for place in range(1, running + places + 1):
        served_rps = capacity_rps * _share_served(min(place / running, 1.0), slowdown)
        one_over_blocked = 1.0 + one_over_blocked * served_rps / rate_rps
        if place >= running and enough * one_over_blocked >= 1.0:
            needed = (place - running) * max(variability, 0.0)
            break
    at_once = float(poisson.ppf(1 - miss_probability, admitted_per_iteration))
    return max(1, math.ceil(min(max(needed, at_once), most_requests)))


def _share_served(occupied: float, slowdown: float) -> float:
    """Of its capacity, what a replica delivers with this share of its requests in service."""
    return occupied / (slowdown + (1 - slowdown) * occupied)


def fixed_share(time_model: IterationTimeModel, iteration_s: float) -> float:
    """The share of a full iteration that is left when its batch is empty."""
    return min(1.0, time_model.shortest_iteration_s / iteration_s)
