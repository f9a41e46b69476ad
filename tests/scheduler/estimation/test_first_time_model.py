"""The first iteration-time model of an engine without a profile."""

from __future__ import annotations

import numpy as np
import pytest

from scheduler.estimation.first_time_model import first_time_model
from scheduler.estimation.iteration_time_fit import FitRejected
from scheduler.messages import Iteration
from scheduler.model.iteration_time import IterationTimeModel

TRUE = IterationTimeModel(
    d0_s=0.01, d1_s_per_kv_token=4e-7, d2_s_per_prefill_token=1e-4, d3_s_per_decode_token=1e-4
)


def iterations(batches: list[tuple[int, int, int]], noise: float = 0.0) -> list[Iteration]:
    """Batches (prefill, decode, KV tokens) with their true seconds, after a first iteration of ten seconds."""
    rng = np.random.default_rng(3)
    records = [Iteration(1, 0.0, 10.0, 64, 0, 64, 1)]
    for prefill, decode, kv in batches:
        seconds = TRUE.iteration_s(float(prefill), float(decode), float(kv)) * (1 + noise * rng.standard_normal())
        records.append(Iteration(len(records) + 1, 0.0, seconds, prefill, decode, kv, decode + 1))
    return records


BURST = [(128 if step % 6 == 0 else 0, 4 + step % 9, 500 + 300 * step) for step in range(48)]
ALONE = [(58, 0, 58), *((0, 1, 58 + step) for step in range(1, 40))]


def test_a_burst_is_enough() -> None:
    found = first_time_model(iterations(BURST, noise=0.02))
    assert isinstance(found, IterationTimeModel)
    for batch in ((0.0, 1.0, 100.0), (256.0, 20.0, 9000.0), (0.0, 64.0, 40_000.0)):
        assert found.iteration_s(*batch) == pytest.approx(TRUE.iteration_s(*batch), rel=0.2)


def test_one_request_alone_tells_the_price_of_a_prompt() -> None:
    found = first_time_model(iterations(ALONE))
    assert isinstance(found, IterationTimeModel)
    assert found.iteration_s(58.0, 0.0, 58.0) == pytest.approx(TRUE.iteration_s(58.0, 0.0, 58.0), rel=0.05)
    assert found.d3_s_per_decode_token == found.d2_s_per_prefill_token > 0


def test_a_disturbed_iteration_counts_no_more_than_the_first() -> None:
    records = iterations(BURST)
    records[20] = records[20]._replace(seconds=2.0)
    found = first_time_model(records)
    assert isinstance(found, IterationTimeModel)
    assert found.iteration_s(0.0, 10.0, 5000.0) == pytest.approx(TRUE.iteration_s(0.0, 10.0, 5000.0), rel=0.1)


def test_too_few_iterations_are_no_model() -> None:
    found = first_time_model(iterations(BURST[:31]))
    assert isinstance(found, FitRejected) and found.reason == "31 iterations measured, 32 needed"
    assert isinstance(first_time_model([]), FitRejected)


def test_iterations_that_are_all_alike_are_no_model() -> None:
    """Nothing would be known of prompts."""
    found = first_time_model(iterations([(0, 4, 100)] * 40))
    assert isinstance(found, FitRejected) and "do not vary enough" in found.reason
