"""Whether the traffic of an engine differs from that of its siblings, significantly and by what matters.

Source: the log-rank test, stratified by class of prompts, of each engine against the others; Pearson's χ² for the mix
of classes; Bonferroni's correction over the engines, so that equal ones are hardly ever told apart.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.special import chdtri

from scheduler.estimation.intervals import CONFIDENCE, FALSE_ALARM

Floats = NDArray[np.float64]
Flags = NDArray[np.bool_]
MATTERS = 0.1
"""Smallest relative difference of the rate at which outputs end, and of a mix (total variation), that counts."""
_RATE_MATTERS = 0.05
_LEAST_EVENTS, LEAST_SECONDS = 20.0, 10.0
_ROUNDS = 3
_PRECISE = 64
"""Up to so many engines, each is compared with the others alone; beyond, with all."""


def other_lengths(ended: Floats, at_risk: Floats, weights: Floats) -> Flags:
    """Which engines have other output lengths than most: from counts by class of prompt and bucket, (n, C, B), and the
    weight that those of each engine have, (n)."""
    usual = np.ones(len(ended), dtype=bool)
    for _ in range(_ROUNDS):
        found = _ends_otherwise(ended, at_risk, weights, usual)
        usual = ~found if (~found).sum() * 2 >= len(found) else np.ones(len(found), dtype=bool)
    return found


def past_lengths_differ(ended: Floats, at_risk: Floats, weights: Floats, apart: Flags) -> bool:
    """Whether the engines that are gone, the first row, had other output lengths than those that are there (apart: but
    for these). The past is compared with the present, never the other way round."""
    counting = np.where(apart, 0.0, weights[1:])
    others, exposed = (np.tensordot(counting, counts[1:], axes=1) for counts in (ended, at_risk))
    known, hazards = _hazards(others, exposed)
    expected, counted = (weights[0] * float((one[0] * by).sum()) for one, by in ((at_risk, hazards), (ended, known)))
    return bool(_differ(np.array([counted]), np.array([expected]), others.sum(), 1)[0])


def _hazards(ended: Floats, at_risk: Floats) -> tuple[Floats, Floats]:
    """Where enough outputs were at risk of ending, and the share of them that ended there."""
    known = at_risk > 0.5
    hazards = np.divide(ended, np.maximum(at_risk, ended), out=np.zeros_like(ended), where=known)
    return known.astype(np.float64), hazards


def _differ(counted: Floats, expected: Floats, behind: Floats, compared: int) -> Flags:
    """Which counts of ended outputs differ, significantly and by what matters, from what is expected after `behind`
    others; compared: engines in all."""
    enough = (expected >= _LEAST_EVENTS) & (behind >= _LEAST_EVENTS)
    variance = expected + expected**2 / np.maximum(behind, 1.0)
    critical = float(chdtri(1, FALSE_ALARM / max(1, compared)))
    matters = np.abs(np.log((counted + 0.5) / (expected + 0.5))) > MATTERS
    return np.asarray(enough & matters & ((counted - expected) ** 2 > critical * np.maximum(variance, 1e-9)))


def _ends_otherwise(ended: Floats, at_risk: Floats, weights: Floats, usual: Flags) -> Flags:
    counting = np.where(usual, weights, 0.0)
    others, exposed = (np.tensordot(counting, counts, axes=1) for counts in (ended, at_risk))
    shape = "cb"
    if len(ended) <= _PRECISE:  # without itself
        own, shape = counting[:, None, None], "ncb"
        others, exposed = others - own * ended, exposed - own * at_risk
    known, hazards = _hazards(others, exposed)
    # Summed by einsum, which makes no array of the size of all counts.
    expected = weights * np.einsum(f"ncb,{shape}->n", at_risk, hazards)
    counted = weights * np.einsum(f"ncb,{shape}->n", ended, known)
    behind = np.broadcast_to(others.sum(axis=(-2, -1)), expected.shape)
    enough = (expected >= _LEAST_EVENTS) & (behind >= _LEAST_EVENTS)
    if enough.any():  # beside the median engine, so that one odd engine does not make all others seem odd
        expected = expected * float(np.median(counted[enough] / expected[enough]))
    return _differ(counted, expected, behind, len(ended))


def other_mix(arrivals: Floats, dispersion: Floats) -> Flags:
    """Which engines get another mix of classes of prompts: from arrivals by class, (n, C)."""
    usual = np.ones(len(arrivals), dtype=bool)
    total = arrivals.sum(axis=1)
    for _ in range(_ROUNDS):
        summed = arrivals[usual].sum(axis=0)
        if not summed.any():
            return np.zeros(len(arrivals), dtype=bool)
        seen = summed > 0
        shares = summed[seen] / summed.sum()
        expected = total[:, None] * shares
        own = arrivals[:, seen]
        chi2 = np.divide((own - expected) ** 2, expected, out=np.zeros_like(expected), where=expected > 0).sum(axis=1)
        variation = np.abs(own / np.maximum(total, 1.0)[:, None] - shares).sum(axis=1) / 2
        critical = float(chdtri(max(1, seen.sum() - 1), FALSE_ALARM / max(1, len(total)))) * dispersion
        found = (total >= _LEAST_EVENTS) & (variation > MATTERS) & (chi2 > critical)
        usual = ~found if (~found).sum() * 2 >= len(found) else np.ones(len(found), dtype=bool)
    return np.asarray(found)


def other_rate(rates: Floats, seconds: Floats) -> tuple[Flags, float]:
    """Which engines get another rate than the mean of the rest, and that mean; rates: (value, low, high) of each, over
    `seconds`. A rate over less than `LEAST_SECONDS` is that of an engine that has just begun."""
    value = rates[:, 0]
    wider = float(np.sqrt(chdtri(1, FALSE_ALARM / max(1, len(value))) / chdtri(1, 1 - CONFIDENCE)))
    low, high = (value + wider * (bound - value) for bound in rates[:, 1:].T)
    steady = seconds >= LEAST_SECONDS
    steady = steady if steady.any() else np.ones(len(value), dtype=bool)
    mean = float(np.median(value[steady]))
    for _ in range(_ROUNDS):
        apart = ((low > mean) | (high < mean)) & (np.abs(value - mean) > _RATE_MATTERS * mean)
        usual = steady & ~apart
        usual = usual if usual.any() else steady
        mean = float(np.average(value[usual], weights=seconds[usual]))
    return np.asarray(steady & apart), mean
