"""Safety margin on the TPOT target for iteration-time prediction error.

A request's time per output token is the mean of its iterations, so errors average out, less so with a positive
correlation between successive errors. Source: the variance of the mean of a first-order autoregressive process.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import ndtr

from scheduler.estimation.iteration_time_error import IterationTimeError
from scheduler.model.steps import ONE_TOKEN_A_STEP, Steps
from scheduler.model.workload import Lengths

_MOST_FOR_STEPS = 1.0
"""The largest margin for steps of several tokens."""


def tpot_margin(
    lengths: Lengths, error: IterationTimeError, miss_probability: float, steps: Steps = ONE_TOKEN_A_STEP
) -> float:
    """The relative margin m >= 0 such that iterations of target/(1 + m) keep all but `miss_probability` of requests.

    A request of l' tokens has l' − 1 iterations between its first token and its last; with one token it has no time
    per token and cannot miss. Solves Σ P(l') P(mean error of l' − 1 iterations > m) = miss_probability for normal
    errors. A negative mean error (engine faster than predicted) does not reduce the margin. With several tokens per
    step, iterations of target·(tokens per step)/(1 + m): a request that gains few tokens by chance misses.
    """
    shift = max(0.0, error.mean)
    if error.std == 0 and steps.tokens_std == 0:
        return shift
    outputs, index = np.unique(lengths.output_tokens, return_inverse=True)
    mass = np.bincount(index, lengths.weights)
    several = outputs > 1
    if float(mass[several].sum()) <= miss_probability:
        return shift
    further, mass = outputs[several].astype(np.float64) - 1.0, mass[several]
    std = error.std_of_mean(np.maximum(further / steps.tokens, 1.0))

    def missing_too_many(margin: float) -> float:
        if steps.tokens_std:
            return float(mass @ _late_by_steps(further, margin, error, steps)) - miss_probability
        return float(mass @ ndtr(-margin / std)) - miss_probability

    if missing_too_many(0.0) <= 0:
        return shift
    most = _MOST_FOR_STEPS if steps.tokens_std else 10 * float(std.max())
    if missing_too_many(most) > 0:
        return shift + most
    return shift + float(brentq(missing_too_many, 0.0, most, xtol=1e-6))


def _late_by_steps(
    further: NDArray[np.float64], margin: float, error: IterationTimeError, steps: Steps
) -> NDArray[np.float64]:
    """P(`further` tokens after the first take more whole steps than the target allows)."""
    expected = further / steps.tokens
    # One standard deviation of iteration error is kept for the last step in time.
    kept = error.std_of_mean(np.maximum(expected, 1.0)) if error.std else 0.0
    in_time = np.floor(expected * (1 + margin) / (1 + kept) + 1e-9)
    gained, number = in_time * steps.tokens, np.maximum(in_time, 1.0)
    spread = np.sqrt(number * steps.tokens_std**2 + (error.std_of_mean(number) * gained) ** 2)
    # Continuity correction of the normal approximation: half a token.
    late = ndtr((further - 0.5 - gained) / np.maximum(spread, 1e-9))
    return np.asarray(np.where(in_time > 0, late, 1.0), dtype=np.float64)
