"""Projection of the admitted requests: expected memory and iteration time over the next iterations.

Output lengths are unknown, so a request with s tokens still runs h tokens later with probability S(s + h)/S(s), S the
survival of output lengths. Source: the survival probabilities of arXiv 2504.11320's Nested WAIT, over every stage
instead of a few segments.

Cost: requests are counted into buckets of stages, so that N requests take O(N) additions and some products of a
bucket-by-horizon table, whatever the longest output.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from scheduler.fluid_params import FluidParams
from scheduler.policies.base import NO_REQUESTS, RunningBatch, Waiting
from scheduler.survival import Survival

_HORIZON_RATIO, _STAGE_RATIO = 1.15, 1.05
"""Ratios of neighbouring horizons and of neighbouring stages, between which survival changes little."""
_LASTING = 0.43
"""Share of `overflow_z` kept free in time: long iterations cost a target only if they last for most of an output,
and the realised margin covers these (`docs/evidence/fluid-tried.md`)."""
_OVERRUN = 0.1
"""Probability that an output exceeds its declared expected length."""
Floats = NDArray[np.float64]


class Columns:
    """Requests as arrays: stage, KV tokens read, shared KV tokens, and declared lengths (output tokens)."""

    __slots__ = ("expected", "kv", "most", "shared", "stages")

    def __init__(self, requests: RunningBatch = NO_REQUESTS) -> None:
        self.stages = np.array(requests.stages(), dtype=np.int64)
        self.kv: Floats = np.array(requests.kv_tokens(), dtype=np.float64)
        self.shared: Floats = np.array(requests.shared_kv_tokens(), dtype=np.float64)
        self.expected: Floats = np.array(requests.expected_output_tokens(), dtype=np.float64)
        self.most: Floats = np.array(requests.most_output_tokens(), dtype=np.float64)

    def joined(self, other: Columns) -> Columns:
        """These requests followed by `other`."""
        both = Columns()
        for name in self.__slots__:
            setattr(both, name, np.concatenate([getattr(self, name), getattr(other, name)]))
        return both

    @property
    def some_declared(self) -> NDArray[np.bool_]:
        """Mask of the requests with a declared length."""
        return np.asarray(np.isfinite(self.expected) | np.isfinite(self.most))


class BatchProjection:
    """Requests, memory and iteration time at a grid of output tokens ahead: expected values and variances.

    `reset` takes all admitted requests, `fits` and `add` one new request at a time.
    """

    def __init__(self, params: FluidParams) -> None:
        self._params = params
        lengths = params.survival.tokens
        longest = max(2.0, float(lengths[-1]))
        self._ahead = _geometric(longest, _HORIZON_RATIO)
        self._steps = np.diff(self._ahead, append=self._ahead[-1])
        self._edges = np.unique(np.concatenate([_geometric(longest, _STAGE_RATIO), lengths]))
        self._stays = _staying(params.survival, self._edges, self._ahead)
        # Drafts take memory before they are accepted, in the iteration under way too.
        self._early_tokens = params.block_tokens + 2 * (params.computed_per_step - 1)
        model = params.time_model
        self._read_s = model.added_s(kv_tokens=1.0) / params.pipeline_depth
        self._step_s = model.added_s(decode_tokens=params.computed_per_step) / params.pipeline_depth
        self.reset(Columns(), 0.0)

    def reset(self, requests: Columns, shared_tokens: float) -> None:
        """Start from the admitted requests; shared_tokens: memory in shared blocks, counted for no single request."""
        self._shared_tokens = shared_tokens
        self._requests: Floats = np.zeros_like(self._ahead)
        self._memory, self._memory_variance = self._requests.copy(), self._requests.copy()
        self._read, self._time_variance = self._requests.copy(), self._requests.copy()
        place = np.searchsorted(self._edges, requests.stages, side="right") - 1
        declared = requests.some_declared
        if declared.any():
            self._add_each(
                self._declared_stays(
                    self._stays[place[declared]], requests.expected[declared] - requests.stages[declared],
                    requests.most[declared] - requests.stages[declared],
                ),
                requests.kv[declared], requests.kv[declared] - requests.shared[declared],
            )
            others = ~declared
            self._add_bucketed(place[others], requests.kv[others], requests.shared[others])
        else:
            self._add_bucketed(place, requests.kv, requests.shared)

    def survives(self, stages: NDArray[np.int64], tokens: Floats) -> Floats:
        """P(at least `tokens` more | `stages` so far) of each request, from the nearest stage and horizon."""
        place = np.searchsorted(self._edges, stages, side="right") - 1
        ahead = np.minimum(np.searchsorted(self._ahead, tokens), len(self._ahead) - 1)
        return np.asarray(self._stays[place, ahead], dtype=np.float64)

    def fits(self, waiting: Waiting, iteration_s: float | None) -> bool:
        """Whether memory stays within its limit and every iteration within `iteration_s` with one more request.

        Memory with the probability of `overflow_z`, time with a share of it. iteration_s: None means no limit.
        """
        params = self._params
        stays = self._newcomer(waiting)
        doubt = stays * (1 - stays)
        private, read = waiting.prompt_tokens - waiting.shared_tokens + self._ahead, waiting.prompt_tokens + self._ahead
        requests = self._requests + stays
        # Conservative between two horizons: no request ends, and each request has one extra block.
        memory = self._memory + stays * private + requests * (self._steps + self._early_tokens) + self._shared_tokens
        spread = np.sqrt(self._memory_variance + doubt * private**2)
        if float(np.max(memory + params.overflow_z * spread)) > params.kv_limit_tokens:
            return False
        if iteration_s is None:
            return True
        seconds = params.decode_iteration_s(requests, self._read + stays * read + requests * self._steps / 2)
        spread_s = np.sqrt(self._time_variance + doubt * (self._step_s + self._read_s * read) ** 2)
        return float(np.max(seconds + _LASTING * params.overflow_z * spread_s)) <= iteration_s

    def add(self, waiting: Waiting) -> None:
        """Admit one more request."""
        self._add_each(
            self._newcomer(waiting)[None, :], np.array([float(waiting.prompt_tokens)]),
            np.array([float(waiting.prompt_tokens - waiting.shared_tokens)]),
        )

    def _newcomer(self, waiting: Waiting) -> Floats:
        if math.isinf(waiting.expected_output_tokens) and math.isinf(waiting.most_output_tokens):
            return np.asarray(self._stays[0])
        return np.asarray(self._declared_stays(
            self._stays[:1], np.array([waiting.expected_output_tokens]), np.array([waiting.most_output_tokens])
        )[0])

    def _declared_stays(self, stays: Floats, expected: Floats, most: Floats) -> Floats:
        """Survival of requests with an expected length (which they may exceed) or a bound, in tokens from now on."""
        known = np.isfinite(expected)[:, None] & (expected[:, None] > 0)
        until = self._ahead < expected[:, None]
        stays = np.where(known, np.where(until, 1.0, _OVERRUN * stays), stays)
        return np.where(self._ahead < np.maximum(most, 1.0)[:, None], stays, 0.0)

    def _add_each(self, stays: Floats, kv: Floats, private: Floats) -> None:
        """Requests one by one: their survival (a row each), KV tokens read and private."""
        doubt = stays * (1 - stays)
        read, memory = kv[:, None] + self._ahead, private[:, None] + self._ahead
        self._requests = self._requests + stays.sum(axis=0)
        self._read = self._read + (stays * read).sum(axis=0)
        self._memory = self._memory + (stays * memory).sum(axis=0)
        self._memory_variance = self._memory_variance + (doubt * memory**2).sum(axis=0)
        self._time_variance = self._time_variance + (doubt * (self._step_s + self._read_s * read) ** 2).sum(axis=0)

    def _add_bucketed(self, place: NDArray[np.int64], kv: Floats, shared: Floats) -> None:
        """Requests by bucket of stages: the sums of `_add_each`, with powers of the KV tokens expanded."""
        if not place.size:
            return
        size, ahead, private = len(self._edges), self._ahead, kv - shared

        def sums(values: Floats | None) -> Floats:
            return np.bincount(place, values, minlength=size).astype(np.float64)

        count, kv_sum, private_sum, private_square = sums(None), sums(kv), sums(private), sums(private**2)
        work = self._step_s + self._read_s * kv
        work_sum, work_square = sums(work), sums(work**2)
        doubt = self._stays * (1 - self._stays)
        requests, doubted = count @ self._stays, count @ doubt
        self._requests = self._requests + requests
        self._read = self._read + kv_sum @ self._stays + requests * ahead
        self._memory = self._memory + private_sum @ self._stays + requests * ahead
        self._memory_variance = (
            self._memory_variance + private_square @ doubt + 2 * ahead * (private_sum @ doubt) + ahead**2 * doubted
        )
        step = self._read_s * ahead
        self._time_variance = (
            self._time_variance + work_square @ doubt + 2 * step * (work_sum @ doubt) + step**2 * doubted
        )


def _geometric(longest: float, ratio: float) -> Floats:
    """Whole numbers from 0 to `longest`, each at most `ratio` times the one before (or one more)."""
    steps = math.ceil(math.log(longest) / math.log(ratio)) + 1
    return np.unique(np.round(np.concatenate([[0.0], np.geomspace(1.0, longest, steps)])))


def _staying(survival: Survival, stages: Floats, ahead: Floats) -> Floats:
    """P(output > s + h | output > s), one row per stage s and one column per horizon h.

    A request longer than every observed output is assumed to end next.
    """
    later, now = survival.at(stages[:, None] + ahead), survival.at(stages)[:, None]
    stays = np.divide(later, now, out=np.zeros_like(later), where=now > 0)
    stays[:, 0] = 1.0
    return stays
