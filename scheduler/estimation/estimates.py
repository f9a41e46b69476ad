"""What a plan of `fluid` takes from the estimates of one engine, its own or those that it shares with its siblings."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass

from scheduler.estimation.arrival_rates import ArrivalRates
from scheduler.estimation.intervals import Estimate
from scheduler.estimation.iteration_time_error import IterationTimeError
from scheduler.model.fluid import PrefixReuse
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.steps import Steps
from scheduler.model.workload import Lengths


@dataclass(frozen=True, slots=True)
class Rates:
    """Arrival rates, requests/s: in all, and by type; unchanged for since_s seconds; dispersion of their counts."""

    total: Estimate
    by_type: dict[str, Estimate]
    since_s: float
    dispersion: float

    @classmethod
    def at(cls, rates: ArrivalRates, now_s: float) -> Rates:
        """As they are at a second of the engine's clock."""
        return cls(rates.total, rates.by_type, now_s - rates.since_s, rates.dispersion)


@dataclass(frozen=True, slots=True, kw_only=True)
class Estimates:
    """The estimates behind one plan.

    time_model, error: of iterations; iteration_s: mean and standard deviation of recent ones (None: too few).
    lengths: of new requests, from `samples` ended outputs, unchanged for lengths_since_s seconds (None: since the
    start); cold: they are (partly) a prior. margin: the TPOT margin that the latest requests would have needed.
    delivery_s: from a first token in the engine until it has left the replica. same_as: engines of equal value have
    equal estimates (None: the engine's own).
    """

    time_model: IterationTimeModel
    error: IterationTimeError
    iteration_s: tuple[float, float] | None
    rates: Rates
    lengths: Lengths
    samples: float
    lengths_since_s: float | None
    cold: bool
    reuse: PrefixReuse
    steps: Steps
    margin: float
    delivery_s: float
    same_as: Hashable = None
