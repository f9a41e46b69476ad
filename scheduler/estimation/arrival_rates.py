"""Arrival rates of one replica by request type, with intervals and change detection.

Sources: a quasi-Poisson dispersion for bursts, and the likelihood-ratio test for a change point of a Poisson process (a
scan over all splits, with Bonferroni's correction).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from scheduler.estimation.intervals import CONFIDENCE, FALSE_ALARM, Estimate, rate_estimate

_BIN_S = 1.0
_LEAST_EXPECTED = 5.0
"""Fewest expected events on either side of a split for χ² to hold (the usual rule)."""
Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class ArrivalRates:
    """Arrival rates of one replica: requests/s in all and by type.

    since_s: time of the latest change of rate (the engine's clock). dispersion: variance over mean of the counts per
    second, at least 1 (Poisson arrivals).
    """

    total: Estimate
    by_type: dict[str, Estimate]
    since_s: float
    dispersion: float

    def still_holds(self, newer: ArrivalRates) -> bool:
        """Whether these rates are well within the intervals of a newer estimate."""
        return self.by_type.keys() == newer.by_type.keys() and newer.total.is_near(self.total.value) and all(
            newer.by_type[name].covers(old.value) for name, old in self.by_type.items()
        )


def arrival_rates(at_s: Sequence[float], types: Sequence[str], start_s: float, now_s: float) -> ArrivalRates:
    """The rates of the arrivals `at_s` of these `types`, all between start_s and now_s (at least 1 s is assumed).

    When the later part is inconsistent with the earlier one, only the later counts: see `changed_at`.
    """
    times, names = np.asarray(at_s, dtype=np.float64), sorted(set(types))
    kinds = np.searchsorted(names, types) if names else np.zeros(0, dtype=np.int64)
    since_s = changed_at(times, kinds, start_s, now_s) or start_s
    recent = times >= since_s
    seconds = max(now_s - since_s, 1.0)
    counts = np.bincount(kinds[recent], minlength=len(names))
    dispersion = _dispersion(_binned(times[recent], np.zeros(int(recent.sum()), dtype=np.int64), 1, since_s, now_s)[0])
    confidence = 1 - (1 - CONFIDENCE) / max(1, len(names))
    return ArrivalRates(
        rate_estimate(int(counts.sum()), seconds, dispersion=dispersion),
        {
            name: rate_estimate(int(count), seconds, dispersion=dispersion, confidence=confidence)
            for name, count in zip(names, counts, strict=True) if count
        },
        since_s, dispersion,
    )


def changed_at(at_s: Floats, kinds: NDArray[np.int64], start_s: float, now_s: float) -> float | None:
    """The time of a change in the rates of any kind; None if none is significant.

    The likelihood ratio of two Poisson vectors against one, χ² with as many degrees of freedom as there are kinds,
    divided by the dispersion of the better fit, so that bursts do not count as changes.
    """
    number = int(kinds.max()) + 1 if kinds.size else 0
    counts = _binned(at_s, kinds, number, start_s, now_s)
    bins = counts.shape[1]
    if not number or bins < 2:
        return None
    before = np.cumsum(counts, axis=1)[:, :-1]
    after = counts.sum(axis=1, keepdims=True) - before
    share = np.arange(1, bins) / bins
    events = counts.sum()
    usable = np.minimum(share, 1 - share) * events >= _LEAST_EXPECTED
    if not usable.any():
        return None
    whole = counts.sum(axis=1, keepdims=True)
    ratio = 2 * (_log_gain(before, whole * share) + _log_gain(after, whole * (1 - share))).sum(axis=0)
    split = int(np.argmax(np.where(usable, ratio, -np.inf)))
    totals = counts.sum(axis=0)
    dispersion = max(_dispersion(totals[: split + 1]), _dispersion(totals[split + 1 :]))
    critical = float(chdtri(number, FALSE_ALARM / int(usable.sum())))
    if ratio[split] / dispersion <= critical:
        return None
    return float(now_s - (bins - 1 - split) * _BIN_S)


def _log_gain(seen: Floats, expected: Floats) -> Floats:
    safe = np.where(seen > 0, seen, 1.0)
    return np.where(seen > 0, seen * np.log(safe / np.where(expected > 0, expected, 1.0)), 0.0)


def _binned(at_s: Floats, kinds: NDArray[np.int64], number: int, start_s: float, now_s: float) -> Floats:
    """Counts per kind and whole second, the last bin ending now."""
    bins = int((now_s - start_s) / _BIN_S)
    index = bins - 1 - np.floor((now_s - at_s) / _BIN_S).astype(np.int64)
    inside = (index >= 0) & (index < bins)
    counts = np.zeros((number, max(bins, 0)))
    np.add.at(counts, (kinds[inside], index[inside]), 1.0)
    return counts


def _dispersion(counts: Floats) -> float:
    if counts.size < 2 or counts.sum() == 0:
        return 1.0
    mean = float(counts.mean())
    observed = float(counts.var(ddof=1)) / mean
    # Below this a Poisson process' own counts can seem bursty: its dispersion is χ²/(bins − 1).
    return observed if observed > float(chdtri(counts.size - 1, 0.05)) / (counts.size - 1) else 1.0
