"""A first iteration-time model from an engine's first iterations, where no profile of it is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from scheduler.estimation.iteration_time_fit import MIN_RECORDS, FitRejected, fit_iteration_time
from scheduler.messages import Iteration
from scheduler.model.iteration_time import IterationTimeModel

_OUTLIER = 4.0
"""Times the fitted time from which an iteration counts as disturbed (compilation, first touch of memory)."""


def first_time_model(iterations: Sequence[Iteration]) -> IterationTimeModel | FitRejected:
    """The model of these iterations; `OnlineIterationTimeModel` refines it from the next ones on.

    The very first iteration, which may compile, is left out. Few and similar iterations do not tell prompt from decode
    tokens, so both have one price (as on a GPU, where they pass through the same layers); if the price of reading the
    KV cache cannot be told either, it is 0 at first.
    """
    table = np.array([[one.prefill_tokens + one.decode_tokens, one.kv_tokens, one.seconds] for one in iterations[1:]])
    if len(table) < MIN_RECORDS:
        return FitRejected(f"{len(table)} iterations measured, {MIN_RECORDS} needed", len(table))
    found = _fitted(table)
    if isinstance(found, IterationTimeModel):
        undisturbed = table[table[:, 2] < _OUTLIER * found.iteration_s(table[:, 0], 0.0, table[:, 1])]
        if MIN_RECORDS <= len(undisturbed) < len(table):
            again = _fitted(undisturbed)
            found = again if isinstance(again, IterationTimeModel) else found
    return found


def _fitted(table: np.ndarray) -> IterationTimeModel | FitRejected:
    computed, kv_tokens, seconds = table.T
    nothing = np.zeros(len(table))
    fit = fit_iteration_time(computed, nothing, kv_tokens, seconds)
    if isinstance(fit, FitRejected):
        fit = fit_iteration_time(computed, nothing, nothing, seconds)
    if isinstance(fit, FitRejected):
        return fit
    return replace(fit.time_model, d3_s_per_decode_token=fit.time_model.d2_s_per_prefill_token)
