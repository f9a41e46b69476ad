"""What an engine's records come to: the sums that replicas of one kind share, in place of the records themselves.

A replica makes it (`scheduler.estimation.engine_records`) and the controller pools it (`scheduler.estimation.pool`).
Its size does not grow with the number of requests: lengths are counted in `BUCKETS` buckets.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from scheduler.model.iteration_time import IterationTimeModel

BUCKETS = 64
"""Buckets of output lengths; see `scheduler.estimation.length_counts`."""
Interval = tuple[float, float, float]
"""An estimate: its value and the bounds of its interval."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeSums:
    """Normal equations of the iteration-time model over recent iterations, each divided by its predicted seconds.

    weight: effective number of iterations. features: Σ x xᵀ, its upper triangle by rows, for the features x of
    `scheduler.estimation.iteration_time_fit.TERMS`. product: Σ x y with the measured seconds y; square: Σ y².
    """

    weight: float = 0.0
    features: tuple[float, ...] = (0.0,) * 15
    product: tuple[float, ...] = (0.0,) * 5
    square: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LengthSums:
    """Output lengths since their last change, as counts by class of prompt and bucket of output length.

    classes: the longest prompt of each class. ended: outputs that ended in each bucket, a row for each class, without
    the zeros at its end; at_risk: outputs that could have ended there (half of those seen for a part of the bucket).
    tokens: sum of the output tokens of those that ended, by bucket; running: outputs that go on, by the bucket they are
    in. prompts: requests by bucket of the prompt; prompt_tokens: the sums of their prompts.
    """

    classes: tuple[int, ...] = ()
    ended: tuple[tuple[int, ...], ...] = ()
    at_risk: tuple[tuple[float, ...], ...] = ()
    tokens: tuple[int, ...] = ()
    running: tuple[int, ...] = ()
    prompts: tuple[int, ...] = ()
    prompt_tokens: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Period:
    """What the records since the last digest say of themselves, for the controller's history; seconds.

    ttft_s, tpot_s: medians of completed requests; *_slow_s: their 0.95 quantiles; iteration_s, predicted_s: mean
    iteration, as measured and as the model said before. None: no such record.
    """

    ttft_s: float | None = None
    ttft_slow_s: float | None = None
    tpot_s: float | None = None
    tpot_slow_s: float | None = None
    iteration_s: float | None = None
    predicted_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Digest:
    """The present estimates of one engine.

    measuring: why there is no iteration-time model yet, and nothing else is known; empty: there is one.
    records: iterations behind it. errors: the sums of `scheduler.estimation.error_statistics.ErrorStatistics`.
    rate_rps, rates_by_type_rps: arrivals in all and by type, unchanged for rate_since_s seconds; dispersion of their
    counts. finished_seen: outputs that ended since lengths changed, lengths_since_s seconds ago (None: never).
    prompt_tokens, cached_tokens, shared_tokens: of the latest finished requests. decode_steps: steps behind
    tokens_step, computed_step and tokens_step_std, output tokens gained and tokens computed in one. margin: the TPOT
    margin that the latest requests would have needed; delay_s: from a first token in the engine until it left the
    replica (None: too few requests).
    """

    measuring: str = ""
    time_model: IterationTimeModel | None = None
    records: int = 0
    time_sums: TimeSums = field(default_factory=TimeSums)
    errors: tuple[float, ...] = ()
    rate_rps: Interval = (0.0, 0.0, 0.0)
    rates_by_type_rps: dict[str, Interval] = field(default_factory=dict)
    rate_since_s: float = 1.0
    dispersion: float = 1.0
    lengths: LengthSums = field(default_factory=LengthSums)
    finished_seen: int = 0
    lengths_since_s: float | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0
    shared_tokens: int = 0
    decode_steps: int = 0
    tokens_step: float = 1.0
    computed_step: float = 1.0
    tokens_step_std: float = 0.0
    margin: float | None = None
    delay_s: float | None = None
    period: Period = field(default_factory=Period)
