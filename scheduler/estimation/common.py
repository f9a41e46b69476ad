"""What a pool's engines have in common as of one moment, and from that each engine's estimates."""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.estimation.error_statistics import ErrorStatistics
from scheduler.estimation.estimates import Estimates, Rates
from scheduler.estimation.intervals import CONFIDENCE, Estimate, rate_estimate
from scheduler.estimation.iteration_time_error import IterationTimeError
from scheduler.estimation.length_counts import CLASSES, LengthCounts
from scheduler.estimation.members import PAST, Members
from scheduler.estimation.siblings import other_lengths, other_mix, other_rate, past_lengths_differ
from scheduler.estimation.speeds import compare
from scheduler.model.fluid import PrefixReuse
from scheduler.model.steps import Steps
from scheduler.model.workload import Lengths

PRIOR_OUTPUTS = 50.0
"""Outputs for which the pool's lengths count in the estimate of an engine that has its own."""
_REUSE_MATTERS, _REUSE_PRIOR, _REUSE_GRID = 0.05, 50.0, 0.02
_STEP_MATTERS, _LEAST_STEPS, _STEP_GRID = 0.1, 1000.0, 0.02
_MARGIN_MATTERS, _MARGIN_GRID = 0.05, 0.01
_DELAY_MATTERS, _DELAY_MATTERS_S, _DELAY_GRID_S = 0.2, 0.02, 0.01
_RATE_GRID, _LEAST_RATE_RPS = 0.05, 1e-3
_LEAST_WEIGHT, _MOST_OFTEN = 1e-3, 4.0
Floats = NDArray[np.float64]


class Settled:
    """The engines of a pool compared; the past is number 0. numbers: of the others, by name."""

    def __init__(self, members: Members, longest: int, most_outputs: float) -> None:
        names = list(members.place)
        self._places = np.array([PAST, *members.place.values()], dtype=np.int64)
        self.numbers = {name: at for at, name in enumerate(names, start=1)}
        self._members, self._longest = members, longest
        self._rows = rows = members.rows[self._places]
        outputs = rows["ended"].sum(axis=(1, 2))
        usual = float(np.median(outputs[outputs > 0])) if outputs.any() else 0.0
        most_outputs = min(most_outputs, max(_MOST_OFTEN * usual, 1.0))
        self._errors = [_statistics(row) for row in rows["errors"]]
        inflation = np.array([one.error.inflation for one in self._errors])
        start = max(names, key=lambda name: members.rows[members.place[name]]["weight"])
        self.speeds = compare(members.time_sums(self._places, inflation), members.time_models[start])
        weights = np.minimum(1.0, most_outputs / np.maximum(outputs, 1.0)).astype(np.float64)
        living = other_lengths(rows["ended"][1:], rows["at_risk"][1:], weights[1:])
        past = past_lengths_differ(rows["ended"], rows["at_risk"], weights, living)
        self.lengths_apart = np.concatenate([[past], living])
        self._mix_apart = other_mix(rows["arrivals"], np.maximum(rows["dispersion"], 1.0))
        self._rate_apart, self._rate_rps = other_rate(rows["rate"][1:], rows["seconds"][1:])
        self._counts = members.counts(self._places[~self.lengths_apart], most_outputs)
        self._mix = rows["arrivals"][~self._mix_apart].sum(axis=0).astype(np.float64)
        self._pool()
        self._cache: dict[Hashable, Estimates] = {}

    @property
    def samples(self) -> float:
        """Ended outputs behind the common lengths."""
        return self._counts.samples

    def _pool(self) -> None:
        rows, usual = self._rows, self.speeds.usual
        usual = usual if usual.any() else np.ones(len(rows), dtype=bool)
        together = _statistics(rows["errors"][usual].sum(axis=0))
        weight = rows["weight"][usual]
        std = math.sqrt(float(np.average(self.speeds.error_std[usual] ** 2, weights=weight + _LEAST_WEIGHT)))
        self._error = IterationTimeError(0.0, std, together.error.correlation, float(weight.sum()))
        self._iteration_s = together.iteration_time_s if together.weight >= 1 else None
        others = rows[1:]
        steady = ~self._rate_apart if not self._rate_apart.all() else np.ones(len(others), dtype=bool)
        self._dispersion = float(np.average(np.maximum(others["dispersion"][steady], 1.0)))
        self._since_s = float(np.median(others["seconds"]))
        self._seconds = float(others["seconds"][steady].sum())
        self._reuse = _usual_shares(rows["reuse"])
        steps = rows["steps"]
        behind = steps[:, 0]
        self._steps = Steps()
        if behind.sum() > 0:
            tokens, computed, std = np.average(steps[:, 1:], axis=0, weights=behind).tolist()
            self._steps = Steps(max(tokens, 1.0), max(computed, 1.0), tokens_std=std)
        self._margin, self._delay_s = _median(others["margin"]), _median(others["delay_s"])

    def estimates(self, at: int) -> Estimates:
        """Those of one engine; engines of equal estimates get the same object."""
        row = self._rows[at]
        own_lengths = bool(self.lengths_apart[at] or self._mix_apart[at])
        key = (
            at if at in self.speeds.own else -1, self.speeds.steps(at), at if own_lengths else -1, self._rate_of(at),
            self._reuse_of(row), self._steps_of(row), self._margin_of(row), self._delay_of(row),
        )
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = self._made(at, key)
        return found

    def _made(self, at: int, key: tuple[object, ...]) -> Estimates:
        row = self._rows[at]
        counts, shares = self._counts, self._mix
        if self.lengths_apart[at]:
            weight = min(1.0, PRIOR_OUTPUTS / max(1.0, counts.samples))
            counts = self._members.counts_of(int(self._places[at])).plus(counts, weight)
        if self._mix_apart[at]:
            shares = row["arrivals"] + PRIOR_OUTPUTS * self._mix / max(1.0, float(self._mix.sum()))
        apart = at in self.speeds.own or self.speeds.apart[at]
        return Estimates(
            time_model=self.speeds.model(at), error=self._own_error(at) if apart else self._error,
            iteration_s=self._errors[at].iteration_time_s if apart and row["weight"] >= 1 else self._iteration_s,
            rates=self._rates(at, shares), lengths=self._lengths(counts, shares), samples=counts.samples,
            lengths_since_s=None, cold=False, reuse=self._reuse_of(row), steps=self._steps_of(row),
            margin=self._margin_of(row), delivery_s=self._delay_of(row), same_as=key,
        )

    def _own_error(self, at: int) -> IterationTimeError:
        own = self._errors[at].error if self._errors[at].weight else self._error
        weight = float(self._rows[at]["weight"])
        return IterationTimeError(0.0, float(self.speeds.error_std[at]), own.correlation, weight)

    def _lengths(self, counts: LengthCounts, shares: Floats) -> Lengths:
        return counts.lengths(shares, self._longest)

    def _rate_of(self, at: int) -> float:
        if at == PAST or not self._rate_apart[at - 1]:
            return self._rate_rps
        rate_rps = max(float(self._rows[at]["rate"][0]), _LEAST_RATE_RPS)
        return math.exp(_RATE_GRID * round(math.log(rate_rps) / _RATE_GRID))

    def _rates(self, at: int, shares: Floats) -> Rates:
        rate_rps = self._rate_of(at)
        apart = rate_rps != self._rate_rps
        seconds = float(self._rows[at]["seconds"]) if apart else self._seconds
        dispersion = max(1.0, float(self._rows[at]["dispersion"])) if apart else self._dispersion
        total = float(shares.sum()) or 1.0
        confidence = 1 - (1 - CONFIDENCE) / max(1, int((shares > 0).sum()))

        def estimate(share: float, confidence: float) -> Estimate:
            return rate_estimate(share * rate_rps * seconds, seconds, dispersion=dispersion, confidence=confidence)

        by_type = {
            f"prompt<={4**group}": estimate(float(shares[group]) / total, confidence)
            for group in range(CLASSES) if shares[group] > 0
        }
        return Rates(estimate(1.0, CONFIDENCE), by_type, self._since_s, dispersion)

    def _reuse_of(self, row: Any) -> PrefixReuse:
        shares = self._reuse
        prompts, cached, shared = row["reuse"].tolist()
        if prompts:
            worth = _REUSE_PRIOR * prompts / max(1.0, float(row["prompts"].sum()))
            hit, common = ((part + worth * usual) / (prompts + worth) for part, usual in
                           zip((cached, shared), shares, strict=True))
            if max(abs(hit - shares[0]), abs(common - shares[1])) > _REUSE_MATTERS:
                hit, common = (_REUSE_GRID * math.floor(one / _REUSE_GRID) for one in (hit, common))
                shares = hit, common
        return PrefixReuse(computed=1 - min(shares[0], 1.0), private=1 - min(shares[1], 1.0))

    def _steps_of(self, row: Any) -> Steps:
        behind, tokens, computed, std = row["steps"].tolist()
        if behind < _LEAST_STEPS or abs(math.log(max(tokens, 1.0) / self._steps.tokens)) <= _STEP_MATTERS:
            return self._steps
        tokens, computed, std = (_STEP_GRID * round(value / _STEP_GRID) for value in (tokens, computed, std))
        return Steps(max(tokens, 1.0), max(computed, 1.0), tokens_std=std)

    def _margin_of(self, row: Any) -> float:
        """The median's, or a larger own one: a smaller one is mostly chance."""
        own = float(row["margin"])
        if own > self._margin + _MARGIN_MATTERS:
            return _MARGIN_GRID * math.ceil(own / _MARGIN_GRID)
        return self._margin

    def _delay_of(self, row: Any) -> float:
        own = float(row["delay_s"])
        if own > self._delay_s + max(_DELAY_MATTERS_S, _DELAY_MATTERS * self._delay_s):
            return _DELAY_GRID_S * math.ceil(own / _DELAY_GRID_S)
        return self._delay_s


def _statistics(sums: Floats) -> ErrorStatistics:
    return ErrorStatistics.of_sums(tuple(sums.tolist()))


def _usual_shares(reuse: Floats) -> tuple[float, float]:
    """Of (prompt, cached, shared) tokens of each engine: the shares cached and shared, of engines near the median."""
    seen = reuse[(reuse[:, 0] > 0) & (reuse[:, 1:] <= reuse[:, :1]).all(axis=1) & (reuse[:, 1:] >= 0).all(axis=1)]
    if not len(seen):
        return 0.0, 0.0
    weights = np.minimum(seen[:, 0], _MOST_OFTEN * np.median(seen[:, 0]))
    shares = seen[:, 1:] / seen[:, :1]
    near = (np.abs(shares - np.median(shares, axis=0)) <= _REUSE_MATTERS).all(axis=1)
    near = near if near.any() else np.ones(len(seen), dtype=bool)
    cached, shared = np.average(shares[near], axis=0, weights=weights[near]).tolist()
    return cached, shared


def _median(values: Floats) -> float:
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else 0.0
