"""One engine's own estimates out of its digest, as its records would give them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from scheduler.digest import Digest
from scheduler.estimation.arrival_rates import ArrivalRates
from scheduler.estimation.error_statistics import ErrorStatistics
from scheduler.estimation.intervals import Estimate
from scheduler.estimation.length_counts import LengthCounts
from scheduler.estimation.measured_errors import MeasuredErrors
from scheduler.estimation.members import by_class
from scheduler.estimation.output_lengths import Answers
from scheduler.model.fluid import NO_REUSE, PrefixReuse
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.steps import Steps
from scheduler.model.workload import Lengths


@dataclass(frozen=True, slots=True)
class DigestedTimes(MeasuredErrors):
    """The iteration-time model of a digest; the names are those of `OnlineIterationTimeModel`."""

    time_model: IterationTimeModel
    records: int
    statistics: ErrorStatistics


@dataclass(frozen=True, slots=True)
class DigestedEngine:
    """A digest that came at `now_s` of the engine's clock; its `measuring` is empty."""

    digest: Digest
    now_s: float

    @property
    def time_model(self) -> DigestedTimes:
        """The iteration-time model and its errors."""
        assert self.digest.time_model is not None
        statistics = ErrorStatistics.of_sums(self.digest.errors) if self.digest.errors else ErrorStatistics()
        return DigestedTimes(self.digest.time_model, self.digest.records, statistics)

    @property
    def rates(self) -> ArrivalRates:
        """Arrival rates, in all and by type, with intervals."""
        by_type = {name: Estimate(*rate) for name, rate in self.digest.rates_by_type_rps.items()}
        since_s = self.now_s - self.digest.rate_since_s
        return ArrivalRates(Estimate(*self.digest.rate_rps), by_type, since_s, self.digest.dispersion)

    @property
    def steps(self) -> Steps:
        """Tokens gained and computed per step."""
        digest = self.digest
        return Steps(max(digest.tokens_step, 1.0), max(digest.computed_step, 1.0), tokens_std=digest.tokens_step_std)

    @property
    def prefix_reuse(self) -> PrefixReuse:
        """The effect of the prefix cache on the latest finished requests."""
        prompts, digest = self.digest.prompt_tokens, self.digest
        if not prompts:
            return NO_REUSE
        return PrefixReuse(computed=1 - digest.cached_tokens / prompts, private=1 - digest.shared_tokens / prompts)

    def lengths(self, longest: int, guesses: Sequence[tuple[int, int]]) -> tuple[Lengths, float]:
        """Of new requests, and the ended outputs behind them; `guesses` count as such."""
        counts = LengthCounts.read(self.digest.lengths)
        if guesses:
            counts = counts.plus(LengthCounts.of(Answers.of(guesses, [])))
        shares = LengthCounts.nothing().at_risk[:, 0]
        for group, rate_rps in by_class(self.digest).items():
            shares[group] += rate_rps
        return counts.lengths(shares, longest), counts.samples

    def margin(self, miss_probability: float) -> float:
        """The TPOT margin that the latest requests would have needed; the replica chose the probability."""
        return self.digest.margin or 0.0

    def delay_s(self, miss_probability: float) -> float | None:
        """From a first token in the engine until it has left the replica."""
        return self.digest.delay_s

    @property
    def lengths_since_s(self) -> float:
        """Time of the last change of output lengths; minus infinity: none yet."""
        since_s = self.digest.lengths_since_s
        return -math.inf if since_s is None else self.now_s - since_s
