"""Worst windows of varying arrival rates, which replace λ and p_k in the conditions of the thresholds.

Source: arXiv 2504.11320, appendix A.1. With A_j(t, h) = ∫ λ_j over (t, t + h], WAIT needs A_j(t, ΔT(n)) <= n_j, and
Nested WAIT Σ_j A_j(t, ΔT(n)) < n_1 and p_k(t, h) < n_k/n_{k−1} < 1 for all t and h <= ΔT(n), where p_k(t, h) is the
share of the window's arrivals with l'_j > l'_{k−2} that have l'_j > l'_{k−1}; its buffer then takes the largest p_k.
The paper's bound on delays also assumes that there is no lull, so that groups keep forming; that is not checked here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from scheduler.model.iteration_time import require_number
from scheduler.model.workload import Lengths, WorkloadMix


@dataclass(frozen=True, slots=True)
class Stretch:
    """A period of `seconds` with the rates of `mix`; types of one name are the same in every stretch."""

    seconds: float
    mix: WorkloadMix

    def __post_init__(self) -> None:
        require_number("seconds", self.seconds, allow_zero=False)


class WorstWindows:
    """The worst windows over consecutive stretches; the first and the last rate extend indefinitely.

    Raises ValueError without a stretch.
    """

    def __init__(self, stretches: Sequence[Stretch]) -> None:
        if not stretches:
            raise ValueError("stretches is empty; there must be at least one")
        self._mixes = tuple(stretch.mix for stretch in stretches)
        self._edges_s = np.concatenate([[0.0], np.cumsum([stretch.seconds for stretch in stretches])])
        self._rates_of: dict[str | None, NDArray[np.float64]] = {}

    def arrivals(self, window_s: float, name: str | None = None) -> float:
        """Expected arrivals (of one type, or of all) in the worst window of `window_s` seconds."""
        rates_rps = self._rates(name)
        if len(rates_rps) == 1:
            return float(rates_rps[0]) * window_s
        inner = self._edges_s[1:-1]  # where the rate changes; a worst window begins or ends there, or sees no change
        begin_s = np.concatenate([inner, inner - window_s])
        counts = self._until(begin_s + window_s, rates_rps) - self._until(begin_s, rates_rps)
        return float(max(counts.max(), rates_rps[0] * window_s, rates_rps[-1] * window_s))

    def survival(self, before: int, after: int) -> float:
        """The largest P(output > after | output > before) of any window; a single moment's, since pooling averages."""
        shares = []
        for mix in self._merged:
            reached = mix.survival(before)
            shares.append(mix.survival(after) / reached if reached else 0.0)
        return max(shares, default=0.0)

    @cached_property
    def _merged(self) -> list[Lengths]:
        return [mix.merged().lengths for mix in self._mixes if mix.rate_rps > 0]

    def _rates(self, name: str | None) -> NDArray[np.float64]:
        if name not in self._rates_of:
            self._rates_of[name] = np.array([
                mix.rate_rps if name is None else sum(t.rate_rps for t in mix.types if t.name == name)
                for mix in self._mixes
            ])
        return self._rates_of[name]

    def _until(self, at_s: NDArray[np.float64], rates_rps: NDArray[np.float64]) -> NDArray[np.float64]:
        """Expected arrivals from the first edge until each time (negative before it)."""
        place = np.clip(np.searchsorted(self._edges_s, at_s, side="right") - 1, 0, len(rates_rps) - 1)
        whole = np.concatenate([[0.0], np.cumsum(np.diff(self._edges_s) * rates_rps)])
        return np.asarray(whole[place] + (at_s - self._edges_s[place]) * rates_rps[place])
