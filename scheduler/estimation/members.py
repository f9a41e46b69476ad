"""The sums of every engine of a pool, a row each, so that a pool of thousands is a few array operations."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scheduler.digest import BUCKETS, Digest, LengthSums
from scheduler.estimation.iteration_sums import full
from scheduler.estimation.length_counts import CLASSES, PROMPT_BUCKETS, LengthCounts, class_of, prompt_bucket
from scheduler.estimation.speeds import Sums
from scheduler.model.iteration_time import IterationTimeModel

Rows = NDArray[np.int64]
Floats = NDArray[np.float64]
_ERRORS = 8
_ROW = np.dtype([
    ("weight", "f8"), ("features", "f8", 15), ("product", "f8", 5), ("square", "f8"), ("errors", "f8", _ERRORS),
    ("rate", "f8", 3), ("seconds", "f8"), ("arrivals", "f4", CLASSES), ("dispersion", "f8"),
    ("ended", "f4", (CLASSES, BUCKETS)), ("at_risk", "f4", (CLASSES, BUCKETS)), ("tokens", "f8", BUCKETS),
    ("running", "f4", BUCKETS), ("prompts", "f4", PROMPT_BUCKETS), ("prompt_tokens", "f8", PROMPT_BUCKETS),
    ("reuse", "f8", 3), ("steps", "f8", 4), ("margin", "f8"), ("delay_s", "f8"), ("heard_s", "f8"),
])
_COUNTS = ("ended", "at_risk", "tokens", "running", "prompts", "prompt_tokens")
_ADDITIVE = (*_COUNTS, "errors", "arrivals", "reuse")
_LEAST = {"features": -math.inf, "product": -math.inf, "errors": -math.inf}
_UNKNOWN = ("margin", "delay_s")
"""Fields that are not a number while nothing is known."""
_MOST = 1e18
PAST = 0
"""The row of the engines that are gone."""


class Members:
    """The engines of one pool by name. rows: all of them, the past first."""

    def __init__(self) -> None:
        self.rows = np.zeros(8, dtype=_ROW)
        self.place: dict[str, int] = {}
        self._free: list[int] = list(range(7, 0, -1))
        self.time_models: dict[str, IterationTimeModel] = {}

    def take(self, name: str, digest: Digest, now_s: float) -> None:
        """The latest digest of an engine.

        Raises:
            ValueError: values that no engine can have; what was known of it stays.
        """
        if digest.time_model is None:
            return
        with np.errstate(over="ignore"):  # what does not fit is found below
            row = self._row_of(digest)
        if not all(_plausible(row[name], _LEAST.get(name, 0.0), name in _UNKNOWN) for name in _ROW.names or ()):
            raise ValueError("a digest holds values that no engine can have")
        if (row["ended"] > 2 * row["at_risk"] + 10).any():  # rounded, and those seen in part count half
            raise ValueError("a digest holds more outputs that ended than there were")
        row["heard_s"] = now_s
        place = self._place_of(name)
        self.rows[place] = row
        self.time_models[name] = digest.time_model

    @staticmethod
    def _row_of(digest: Digest) -> Any:
        row = np.zeros((), dtype=_ROW)
        sums = digest.time_sums
        row["weight"], row["features"], row["product"] = sums.weight, sums.features, sums.product
        row["square"], row["errors"] = sums.square, digest.errors or (0.0,) * _ERRORS
        seconds = max(digest.rate_since_s, 1.0)
        row["rate"], row["seconds"], row["dispersion"] = digest.rate_rps, seconds, max(digest.dispersion, 1.0)
        for group, rate_rps in by_class(digest).items():
            row["arrivals"][group] += rate_rps * seconds
        _fill(row, digest.lengths)
        row["reuse"] = digest.prompt_tokens, digest.cached_tokens, digest.shared_tokens
        row["steps"] = digest.decode_steps, digest.tokens_step, digest.computed_step, digest.tokens_step_std
        row["margin"] = math.nan if digest.margin is None else digest.margin
        row["delay_s"] = math.nan if digest.delay_s is None else digest.delay_s
        return row

    def _place_of(self, name: str) -> int:
        if name not in self.place:
            if not self._free:
                size = len(self.rows)
                self.rows = np.concatenate([self.rows, np.zeros(size, dtype=_ROW)])
                self._free = list(range(2 * size - 1, size - 1, -1))
            self.place[name] = self._free.pop()
        return self.place[name]

    def leave(self, name: str, factor: float | None, most_outputs: float) -> None:
        """An engine is gone: its sums become part of the past (factor: its own of the iteration times), or are
        forgotten (None: it was unlike the others)."""
        place = self.place.pop(name)
        self.time_models.pop(name, None)
        self._free.append(place)
        if factor is None:
            return
        past, row = self.rows[PAST], self.rows[place]
        kept = min(1.0, most_outputs / max(1.0, float(past["ended"].sum() + row["ended"].sum())))
        for field in _ADDITIVE:
            past[field] = kept * (past[field] + row[field])
        steps, more = past["steps"][0], row["steps"][0]
        if more > 0:
            past["steps"][1:] = (steps * past["steps"][1:] + more * row["steps"][1:]) / (steps + more)
            past["steps"][0] = steps + more
        iterations = min(1.0, most_outputs / max(1.0, float(past["weight"] + row["weight"])))
        past["weight"] = iterations * (past["weight"] + row["weight"])
        past["square"] = iterations * (past["square"] + row["square"])
        past["features"] = iterations * (past["features"] + factor**2 * row["features"])
        past["product"] = iterations * (past["product"] + factor * row["product"])

    def fade(self, share: float) -> None:
        """Let the past count for this share of what it did."""
        past = self.rows[PAST]
        for field in (*_ADDITIVE, "weight", "features", "product", "square"):
            past[field] = share * past[field]
        past["steps"][0] *= share

    def counts(self, places: Rows, most_outputs: float) -> LengthCounts:
        """The sum over some rows, none of which counts for more than so many outputs."""
        some = self.rows[places]
        weights = np.minimum(1.0, most_outputs / np.maximum(some["ended"].sum(axis=(1, 2)), 1.0))
        summed = {field: np.tensordot(weights, some[field], axes=1).astype(np.float64) for field in _COUNTS}
        return LengthCounts(**summed)

    def counts_of(self, place: int) -> LengthCounts:
        """Those of one row."""
        row = self.rows[place]
        return LengthCounts(**{field: row[field].astype(np.float64) for field in _COUNTS})

    def time_sums(self, places: Rows, inflation: Floats) -> Sums:
        """For the comparison of speeds."""
        some = self.rows[places]
        return Sums(some["weight"], full(some["features"]), some["product"], some["square"], inflation)


def _plausible(values: Any, least: float, may_be_unknown: bool) -> bool:
    found = np.asarray(values, dtype=np.float64)
    sound = (found >= least) & (np.abs(found) <= _MOST)
    return bool((sound | np.isnan(found) if may_be_unknown else sound).all())


def _fill(row: Any, sums: LengthSums) -> None:
    """Write a message's counts of lengths into a row.

    Raises:
        ValueError: rows that are too long, or values that no counts can have.
    """
    for longest, ended, at_risk in zip(sums.classes, sums.ended, sums.at_risk, strict=True):
        group = _class_of(longest)
        row["ended"][group, : len(ended)] = ended
        row["at_risk"][group, : len(at_risk)] = at_risk
    for name in ("tokens", "running", "prompts", "prompt_tokens"):
        values = getattr(sums, name)
        row[name][: len(values)] = values
    for name in _COUNTS:
        lowest, highest = row[name].min(), row[name].max()
        if not (lowest >= 0 and highest < math.inf):
            raise ValueError(f"the counts of lengths hold {name} that are negative or not finite")


def by_class(digest: Digest) -> dict[int, float]:
    """Arrivals per second by class of prompt."""
    found: dict[int, float] = {}
    for name, (rate_rps, _, _) in digest.rates_by_type_rps.items():
        group = _class_in(name)
        found[group] = found.get(group, 0.0) + rate_rps
    return found


@lru_cache(maxsize=4096)
def _class_in(name: str) -> int:
    """The class of prompts in the name of a type of arrivals, `scheduler.estimation.traffic_monitor.type_of`."""
    return _class_of(int(name.removeprefix("prompt<=").partition(",")[0]))


@lru_cache(maxsize=64)
def _class_of(longest: int) -> int:
    return int(class_of(prompt_bucket(np.array([longest])))[0])
