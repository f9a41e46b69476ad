"""Sums over an engine's recent iterations from which several engines' iteration-time models are fitted together.

They are the normal equations of weighted least squares: each iteration is divided by its predicted seconds, so that
errors are relative. Old iterations are forgotten exponentially, as `OnlineIterationTimeModel` forgets them.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scheduler.digest import TimeSums
from scheduler.estimation.iteration_time_fit import TERMS, features_of

Floats = NDArray[np.float64]
_UPPER = np.triu_indices(len(TERMS))
_MOST_PENDING = 512


class IterationSums:
    """`TimeSums` of one engine."""

    def __init__(self, forgetting: float) -> None:
        self._forgetting = forgetting
        self._pending: list[tuple[float, float, float, bool, float, float]] = []
        self.restart()

    def observe(
        self, tokens: tuple[float, float, float], at_floor: bool, predicted_s: float, measured_s: float
    ) -> None:
        """One iteration: its prefill, decode and KV tokens, and its seconds, as predicted and as measured."""
        self._pending.append((*tokens, at_floor, predicted_s, measured_s))
        if len(self._pending) >= _MOST_PENDING:
            self._add_pending()

    def restart(self) -> None:
        """The engine's speed has changed: earlier iterations say nothing of the present one."""
        self._pending.clear()
        self._weight = self._square = 0.0
        self._features, self._product = np.zeros((len(TERMS), len(TERMS))), np.zeros(len(TERMS))

    @property
    def sums(self) -> TimeSums:
        """The sums, up to now."""
        self._add_pending()
        return TimeSums(
            weight=self._weight, features=tuple(self._features[_UPPER].tolist()),
            product=tuple(self._product.tolist()), square=self._square,
        )

    def _add_pending(self) -> None:
        if not self._pending:
            return
        prefill, decode, kv, at_floor, predicted_s, measured_s = np.array(self._pending, dtype=np.float64).T
        self._pending.clear()
        rows = features_of((prefill, decode, kv), at_floor > 0) / predicted_s[:, None]
        ratios, ages = measured_s / predicted_s, np.arange(len(rows))[::-1]
        weights = self._forgetting**ages
        kept = self._forgetting ** len(rows)
        self._weight = kept * self._weight + float(weights.sum())
        self._features = kept * self._features + (rows * weights[:, None]).T @ rows
        self._product = kept * self._product + (rows * weights[:, None]).T @ ratios
        self._square = kept * self._square + float(weights @ ratios**2)


def full(features: Floats) -> Floats:
    """The symmetric matrices of rows of upper triangles, (n, 15) to (n, 5, 5)."""
    matrices = np.zeros((len(features), len(TERMS), len(TERMS)))
    matrices[:, _UPPER[0], _UPPER[1]] = features
    matrices[:, _UPPER[1], _UPPER[0]] = features
    return matrices
