"""The queue of a replica: how long it may be above capacity, and how often it is too long below.

Above: just long enough that the replica rarely runs below capacity.

Source: the birth-death chain M/M(n)/1/K, whose service rate depends on the number of running requests; variability
other than Poisson's scales the queue as in its diffusion limit (heavy traffic).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.stats import poisson

_MOST_PLACES = 20_000


@dataclass(frozen=True, slots=True, kw_only=True)
class FullReplica:
    """A replica at capacity: it serves `capacity_rps` requests per second with `running` of them at once.

    fixed_share: share of a full iteration's time that does not depend on its batch (0 to 1). admitted_per_iteration:
    mean requests admitted per iteration. dispersion: variance over mean of the arrivals (Poisson: 1). variability: the
    same of arrivals and work together (Poisson arrivals and exponential work: 1).
    """

    capacity_rps: float
    running: float
    fixed_share: float
    admitted_per_iteration: float
    dispersion: float = 1.0
    variability: float = 1.0

    def delivered_rps(self, running: float) -> float:
        """Requests per second with `running` requests, at most the full number."""
        occupied = min(running / max(1, round(self.running)), 1.0)
        return self.capacity_rps * (occupied / (self.fixed_share + (1 - self.fixed_share) * occupied))


def queue_limit(replica: FullReplica, rate_rps: float, *, miss_probability: float, most_requests: float) -> int:
    """The shortest queue with which the replica delivers all but `miss_probability` of its capacity, in requests >= 1.

    With n of N running requests a replica delivers (n/N)/(f + (1 − f) n/N) of its capacity, f its `fixed_share`: the
    running requests are a buffer too, and the queue covers the rest. Since requests enter once per iteration, the queue
    holds at least an iteration's admissions, but for `miss_probability`.

    Below capacity (`rate_rps` arrive) the queue drains, so nothing is rejected that can still meet its target.
    most_requests: requests that can wait within the target; the upper bound of the result.
    """
    if most_requests <= 1 or rate_rps <= replica.capacity_rps:
        return max(1, int(min(most_requests, _MOST_PLACES)))
    running, places = max(1, round(replica.running)), int(min(most_requests, _MOST_PLACES))
    enough = 1 - (1 - miss_probability) * replica.capacity_rps / rate_rps
    # Erlang's recursion for the reciprocal of the share of arrivals that find the queue full.
    one_over_blocked, needed = 1.0, math.inf
    for place in range(1, running + places + 1):
        one_over_blocked = 1.0 + one_over_blocked * replica.delivered_rps(place) / rate_rps
        if place >= running and enough * one_over_blocked >= 1.0:
            needed = (place - running) * max(replica.variability, 0.0)
            break
    at_once = float(poisson.ppf(1 - miss_probability, replica.admitted_per_iteration))
    return max(1, math.ceil(min(max(needed, at_once), most_requests)))


def waits_longer(replica: FullReplica, rate_rps: float, within_s: NDArray[np.float64]) -> NDArray[np.float64]:
    """P(a request waits longer than `within_s`) below capacity: the share that a burst makes late; 1 at capacity.

    In the chain without a limit, π_n of n requests falls geometrically beyond the N that run, by ρ = λ/μ. A request
    waits with probability P = π_N/(1 − ρ) / Σ π, then longer than t with probability exp(−(μ − λ) t). Arrivals that are
    no Poisson process, of dispersion D, change P as in Hayward's approximation, N/D places. How much the work of
    requests varies hardly does: while a place is free, it matters only by its mean. The variability z of both stretches
    the wait, t/z, as in heavy traffic. Source: Whitt, Approximations for the GI/G/m queue (1993).
    """
    if rate_rps >= replica.capacity_rps:
        return np.ones_like(within_s)
    running = max(1, round(min(replica.running / max(replica.dispersion, 1e-3), _MOST_PLACES)))
    occupied = np.arange(running, 0, -1) / running
    delivered_rps = replica.capacity_rps * occupied / (replica.fixed_share + (1 - replica.fixed_share) * occupied)
    with np.errstate(over="ignore"):  # π_n / π_N, downwards from N: too large for a number means that none waits
        total = float(np.cumprod(delivered_rps / rate_rps).sum())
    waiting = 1 / (1 - rate_rps / replica.capacity_rps)
    left_s = np.maximum(within_s, 0.0) / max(replica.variability, 1e-3)
    return np.asarray(waiting / (total + waiting) * np.exp(-(replica.capacity_rps - rate_rps) * left_s))


def waits_in_line(
    within_s: NDArray[np.float64], rate_rps: float, service_s: NDArray[np.float64], weights: NDArray[np.float64], *,
    dispersion: float = 1.0,
) -> NDArray[np.float64]:
    """P(a request waits longer than `within_s`) for one server, in the order of arrival: prompts that are computed.

    service_s: seconds of each kind of request, of which `weights` are the shares. ρ exp(−2 (1 − ρ) t / (s (D + c²))) of
    mean s and squared coefficient of variation c²: exact for Poisson arrivals (D = 1) with exponential times.
    """
    mean_s = float(weights @ service_s)
    busy = rate_rps * mean_s
    if busy >= 1:
        return np.ones_like(within_s)
    if mean_s <= 0:
        return np.zeros_like(within_s)
    variation = float(weights @ (service_s - mean_s) ** 2) / mean_s**2
    slope = 2 * (1 - busy) / (mean_s * max(dispersion + variation, 1e-3))
    return np.asarray(busy * np.exp(-slope * np.maximum(within_s, 0.0)))
