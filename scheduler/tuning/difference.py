"""Whether proposed thresholds differ from the active ones by more than the noise of the estimates behind them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache

import numpy as np

from scheduler.fluid_params import FluidParams
from scheduler.thresholds import Thresholds

_SETTLED = 0.10
"""Smallest relative change of thresholds that is sent: estimates jitter, engines should not."""
_PROMPT_TOKENS = 2048.0
"""Prompt tokens at which iteration times are compared when the prompt flow is not known."""


@dataclass(frozen=True, slots=True)
class Tolerance:
    """Largest insignificant change of a field: `share` of its value, or `least` if that is more; by default none."""

    share: float = 0.0
    least: float = 0.0

    def covers(self, new: float | None, old: float | None) -> bool:
        """Whether a change is too small to matter; a number and None always differ."""
        if new is None or old is None:
            return new is old
        return abs(new - old) <= max(self.least, self.share * old)


_EXACT, _TIME, _ESTIMATE = Tolerance(), Tolerance(0.05), Tolerance(_SETTLED)
FLUID_TOLERANCES: Mapping[str, Tolerance] = {
    # Set by the operator or the engine, or derived from such fields alone.
    **dict.fromkeys(("kv_limit_tokens", "block_tokens", "overflow_z", "miss_probability"), _EXACT),
    **dict.fromkeys(("tpot_s", "ttft_s", "latency_s", "pipeline_depth", "cold"), _EXACT),
    # Limits of the engine's iterations. The model is compared by its iteration times.
    **dict.fromkeys(("time_model", "iteration_s", "tokens_per_step", "computed_per_step"), _TIME),
    "survival": Tolerance(least=0.05),
    # Derived from estimates of arrivals, which vary most.
    **dict.fromkeys(("prompt_flow_tokens", "capacity_rps", "steady_s", "variability"), _ESTIMATE),
    "first_token_within_s": _ESTIMATE,
    "delivery_s": Tolerance(_SETTLED, 0.05),
    "queue_limit": Tolerance(_SETTLED, 1.0),
}
"""For each field of the fluid parameters, the largest insignificant change."""


def materially_different(proposed: Thresholds, active: Thresholds) -> bool:
    """False when the change is noise: the same rule, or every count within a tenth (or one) of its active value."""
    if proposed.same_rule(active):
        return False
    if proposed.fluid and active.fluid:
        return _fluid_differs(proposed.fluid, active.fluid)
    counts, current = _counts(proposed), _counts(active)
    last = _last_end(proposed, active)
    without_counts = _without_counts(proposed, last).same_rule(_without_counts(active, last))
    if not without_counts or len(counts) != len(current):
        return True
    return any(abs(new - old) > max(1.0, _SETTLED * old) for new, old in zip(counts, current, strict=True))


_FIELDS = tuple(field.name for field in fields(FluidParams))


@lru_cache(maxsize=256)
def _fluid_differs(new: FluidParams, old: FluidParams) -> bool:
    """Engines that are alike ask this alike."""
    return any(_differs(name, new, old) for name in _FIELDS)


def _differs(name: str, new: FluidParams, old: FluidParams) -> bool:
    """Whether this field has changed by more than its tolerance (by default 0)."""
    tolerance = FLUID_TOLERANCES.get(name, _EXACT)
    if name == "survival":
        at = [x for x, _ in (*new.survival.points, *old.survival.points)]
        return float(np.max(np.abs(new.survival.at(at) - old.survival.at(at)))) > tolerance.least
    if name == "time_model":
        with_prompts = old.full_batch._replace(prefill_tokens=old.prompt_flow_tokens or _PROMPT_TOKENS)
        return not all(
            tolerance.covers(new.time_model.iteration_s(*batch), old.time_model.iteration_s(*batch))
            for batch in (with_prompts, with_prompts._replace(prefill_tokens=0.0))
        )
    return not tolerance.covers(getattr(new, name), getattr(old, name))


def _counts(thresholds: Thresholds) -> list[int]:
    counts = [entry.n or 0 for entry in thresholds.types] + [segment.total for segment in thresholds.segments]
    return [*counts, thresholds.max_running or 0]


def _last_end(new: Thresholds, old: Thresholds) -> int | None:
    """The end of both last segments if it differs by noise: no request waits there, and every record moves it."""
    if not new.segments or not old.segments:
        return None
    ends = sorted(value.segments[-1].end_output_tokens for value in (new, old))
    return ends[1] if ends[1] <= (1 + _SETTLED) * ends[0] else None


def _without_counts(thresholds: Thresholds, last_end: int | None) -> Thresholds:
    segments = tuple(replace(segment, total=1) for segment in thresholds.segments)
    if last_end is not None:
        segments = (*segments[:-1], replace(segments[-1], end_output_tokens=last_end))
    return replace(
        thresholds,
        types=tuple(replace(entry, n=entry.n and 1) for entry in thresholds.types),  # no count differs from any count
        segments=segments,
        max_running=None if thresholds.max_running is None else 1,
    )
