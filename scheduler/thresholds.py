"""Thresholds: the object that the controller sends to a replica, and its validation.

A `Thresholds` value is immutable and versioned. It holds the policy, the counts at which it admits groups, the most
running requests, and the longest hold. The controller computes it or an operator sets it; an engine applies it between
two iterations.

Source: WAIT's n_j and Nested WAIT's n_k of arXiv 2504.11320; the cap, the token budget, the longest hold and the
validity are what serving live users adds to them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from typing import Annotated, Any, ClassVar

from pydantic import BeforeValidator, ConfigDict, Strict, TypeAdapter, ValidationError

from scheduler.config_errors import did_you_mean
from scheduler.fluid_params import FluidParams
from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.rotation import stage_lengths

POLICY_NAMES = ("fcfs", "wait", "nested_wait", "wait_cp", "fluid")
DEFAULT_POLICY = "fluid"
"""The policy where none is named; without fluid parameters it admits while a slot is free."""
MODES = ("serving", "strict")
LONGEST_HOLD_S = 60.0
"""No setting may hold a request longer than this: beyond a minute a hold is an outage."""

UNKNOWN_TYPE = "unknown"
"""The type of a request of undeclared output length."""
_LONGEST_SHOWN = 200
_NO_SUCH_FIELD = ("unexpected_keyword_argument", "extra_forbidden")
_MISSING = ("missing", "missing_argument", "missing_keyword_only_argument")

# Types are strict: "8" or true in place of a number is an error.
Count = Annotated[int, Strict()]
Seconds = Annotated[float, Strict()]
Flag = Annotated[bool, Strict()]
PolicyName = Annotated[str, BeforeValidator(lambda name: name.replace("-", "_") if isinstance(name, str) else name)]


class InvalidThresholds(ValueError):
    """A threshold value that cannot be used: names the field, the value given and what is allowed."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(f"thresholds.{field} = {shortened(value)} is not allowed; allowed: {allowed}")
        self.field = field
        self.value = value
        self.allowed = allowed


class MissingField(InvalidThresholds):
    """A threshold object without a field that has no default."""

    def __init__(self, field: str, value: object, allowed: str) -> None:
        super().__init__(field, value, allowed)
        self.args = (f"thresholds.{field} is missing in {shortened(value)}; allowed: {allowed}",)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLimits:
    """The limits of one engine, within which thresholds must fit.

    kv_capacity_tokens: size of the KV cache. block_tokens: size of one of its blocks. max_num_seqs: most running
    requests. max_num_batched_tokens: most tokens computed in an iteration. max_model_len: most tokens of prompt and
    output together. speculative_tokens: most drafts of a request in an iteration;
    pipeline_depth: iterations from one step of a request to the next. Source: vLLM's CacheConfig, SchedulerConfig,
    SpeculativeConfig and ParallelConfig.
    """

    kv_capacity_tokens: int
    block_tokens: int
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    speculative_tokens: int = 0
    pipeline_depth: int = 1

    @property
    def slots(self) -> int:
        """Most requests that may run: with drafts, no more than one iteration advances."""
        if not self.speculative_tokens:
            return self.max_num_seqs
        return max(1, min(self.max_num_seqs, self.max_num_batched_tokens // (1 + self.speculative_tokens)))

    @property
    def longest_request(self) -> int:
        """Most tokens of prompt and output that a request can come to; vLLM keeps one block of the KV cache empty."""
        return max(1, min(self.max_model_len, self.kv_capacity_tokens - self.block_tokens))

    @property
    def most_running(self) -> int:
        """Most requests that can run at once, with one KV block each (the best case)."""
        return min(self.slots, self.kv_capacity_tokens // self.block_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeThreshold:
    """WAIT's n_j for one type: requests whose lengths lie within both (inclusive) bounds; None means no bound.

    name: of the type, as status shows it. n: requests that enter together; None admits every request at once.
    max_prompt_tokens: longest prompt of the type. max_output_tokens: longest output, as the client declares it.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    name: str
    n: Count | None
    max_prompt_tokens: Count | None = None
    max_output_tokens: Count | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentThreshold:
    """Nested WAIT's threshold for the decode stages up to and including `end_output_tokens` (the paper's l'_k).

    end_output_tokens: the last stage of the segment, above that of the segment before.
    total: requests in all stages of the segment together, the paper's B_k = n_k δ_k with δ_k = l'_k − l'_{k−1}; an
    engine's prefill yields the first token, so that segment 1 has no stage more. Per stage it may be less than one. An
    engine goes by n_k = total/δ_k per iteration; steps of several tokens (speculative decoding) leave that as it is,
    and so many times fewer requests are in the segment.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    end_output_tokens: Count
    total: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class Thresholds:
    """The thresholds of one engine's scheduler.

    version: strictly increasing per replica; an engine rejects a version that is not newer than the active one.
    policy: fcfs, wait, nested_wait, wait_cp or fluid; mode: "serving" (holds are bounded) or "strict" (the paper's).
    types: WAIT's thresholds, first match wins; segments: Nested WAIT's, by increasing boundary, with totals that per
    stage never grow.
    max_running: most running requests (None: the engine's own max_num_seqs).
    token_budget: most tokens computed in one iteration (None: the engine's own max_num_batched_tokens).
    prefill_chunk_tokens: most tokens of one prompt in one iteration (None: the engine's own
    long_prefill_token_threshold); wait_gate: whether `wait_cp` waits for a group at a segment's entry.
    fluid: the parameters of `fluid`, which the controller solves; not for operators.
    max_hold_s: seconds for which a threshold may hold a request, from 0 to 60.
    valid_for_s: seconds after which the replica returns to its configured thresholds unless renewed (None: never).
    pinned: set by an operator; automatic updates are rejected until it is lifted.
    reason: why these values, in words.
    """

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid")

    version: Count = 0
    policy: PolicyName = DEFAULT_POLICY
    mode: str = "serving"
    types: tuple[TypeThreshold, ...] = ()
    segments: tuple[SegmentThreshold, ...] = ()
    max_running: Count | None = None
    token_budget: Count | None = None
    prefill_chunk_tokens: Count | None = None
    wait_gate: Flag = True
    fluid: FluidParams | None = None
    max_hold_s: Seconds = 0.25
    valid_for_s: Seconds | None = None
    pinned: Flag = False
    reason: str = ""

    def __post_init__(self) -> None:
        _require(self.version >= 0, "version", self.version, "an integer >= 0")
        _require(self.policy in POLICY_NAMES, "policy", self.policy, f"one of {', '.join(POLICY_NAMES)}")
        _require(self.mode in MODES, "mode", self.mode, f"one of {', '.join(MODES)}")
        _require(
            math.isfinite(self.max_hold_s) and 0 <= self.max_hold_s <= LONGEST_HOLD_S,
            "max_hold_s", self.max_hold_s, f"seconds from 0 to {LONGEST_HOLD_S:g}",
        )
        if self.valid_for_s is not None:
            finite = math.isfinite(self.valid_for_s) and self.valid_for_s > 0
            _require(finite, "valid_for_s", self.valid_for_s, "seconds > 0, or null for no end")
        for field in ("max_running", "token_budget", "prefill_chunk_tokens"):
            value = getattr(self, field)
            _require(value is None or value >= 1, field, value, "an integer >= 1, or null for the engine's own limit")
        self._check_types()
        self._check_segments()

    def _check_types(self) -> None:
        names = [entry.name for entry in self.types]
        _require(len(set(names)) == len(names), "types", names, "distinct names")
        for index, entry in enumerate(self.types):
            usable = entry.name not in ("", UNKNOWN_TYPE)
            _require(usable, f"types[{index}].name", entry.name, f"a non-empty name other than {UNKNOWN_TYPE!r}")
            if entry.n is not None:
                self._check_count(f"types[{index}].n", entry.n)
            for field in ("max_prompt_tokens", "max_output_tokens"):
                value = getattr(entry, field)
                _require(value is None or value >= 1, f"types[{index}].{field}", value, "an integer >= 1, or null")

    def _check_segments(self) -> None:
        previous_end, per_stage = 0, math.inf
        for index, segment in enumerate(self.segments):
            _require(
                segment.end_output_tokens > previous_end,
                f"segments[{index}].end_output_tokens", segment.end_output_tokens, f"an integer > {previous_end}",
            )
            stages = segment.end_output_tokens - previous_end
            self._check_count(f"segments[{index}].total", segment.total, stages)
            if index:  # p_k < n_k / n_{k-1} < 1: a later segment never waits for more, but for rounding
                most = math.ceil(per_stage * stages - 1e-9)
                allowed = f"an integer from 1 to {most}, as many per stage as in the segment before it"
                _require(segment.total <= most, f"segments[{index}].total", segment.total, allowed)
            previous_end, per_stage = segment.end_output_tokens, segment.total / stages

    def _check_count(self, field: str, n: int, stages: int = 1) -> None:
        """Check that a group, one stage's share of n, can run at once."""
        _require(n >= 1, field, n, "an integer >= 1")
        if self.max_running is not None:
            times = f"{stages} stages times " if stages > 1 else ""
            allowed = f"an integer from 1 to {times}max_running = {self.max_running}"
            _require(n <= stages * self.max_running, field, n, allowed)

    def check_fits(self, limits: EngineLimits) -> None:
        """Raise InvalidThresholds when these values can never be met on an engine with `limits`.

        Memory is judged for the best case, one-token prompts of one KV block each: only the impossible is rejected.
        """
        slots = limits.most_running
        slots_in_words = (
            f"the engine has slots for max_num_seqs = {limits.max_num_seqs} requests and its KV cache holds "
            f"{limits.kv_capacity_tokens} tokens in blocks of {limits.block_tokens}"
        )
        counts = [(f"types[{i}].n", entry.n) for i, entry in enumerate(self.types) if entry.n is not None]
        if self.max_running is not None:
            counts.append(("max_running", self.max_running))
        for field, n in counts:
            _require(n <= slots, field, n, f"an integer from 1 to {slots}: {slots_in_words}")
        stages = stage_lengths(tuple(entry.end_output_tokens for entry in self.segments))
        for index, (entry, length) in enumerate(zip(self.segments, stages, strict=True)):
            allowed = f"an integer from 1 to {length} stages times {slots}: {slots_in_words}"
            _require(entry.total <= length * slots, f"segments[{index}].total", entry.total, allowed)
        if self.token_budget is not None:
            most = limits.max_num_batched_tokens
            allowed = f"an integer from 1 to max_num_batched_tokens = {most}"
            _require(self.token_budget <= most, "token_budget", self.token_budget, allowed)

    def check_serves(self) -> None:
        """Raise InvalidThresholds when these are for simulation only."""
        _require(
            self.mode != "strict", "mode", self.mode,
            "serving; strict mode may starve requests and is for simulation only",
        )

    def with_version(self, version: int) -> Thresholds:
        """The same thresholds under another version."""
        return replace(self, version=version)

    def same_rule(self, other: Thresholds) -> bool:
        """True when both lead to the same decisions, whatever their version, validity and reason."""
        def rule(value: Thresholds) -> Thresholds:
            return replace(value, version=0, reason="", valid_for_s=None, pinned=False)

        return rule(self) == rule(other)

    def classifies_like(self, other: Thresholds) -> bool:
        """True when both give every request the same type, so that no waiting request changes its queue."""
        return (self.policy, self.types, self.segments) == (other.policy, other.types, other.segments)


_ADAPTER: TypeAdapter[Thresholds] = TypeAdapter(Thresholds)


def parse_thresholds(data: dict[str, Any] | str | bytes) -> Thresholds:
    """Thresholds from JSON text or a decoded object.

    Raises:
        InvalidThresholds: naming the first field that is unknown, of the wrong type or out of range.
    """
    try:
        if isinstance(data, str | bytes):
            return _ADAPTER.validate_json(data, strict=False)
        return _ADAPTER.validate_python(data)
    except ValidationError as error:
        raise _as_invalid(error) from error


def thresholds_as_dict(thresholds: Thresholds) -> dict[str, Any]:
    """The JSON object form, the inverse of `parse_thresholds`."""
    dumped: dict[str, Any] = _ADAPTER.dump_python(thresholds, mode="json")
    return dumped


def _require(condition: bool, field: str, value: object, allowed: str) -> None:
    if not condition:
        raise InvalidThresholds(field, value, allowed)


def shortened(value: object) -> str:
    """The value as errors show it: at most 200 characters."""
    shown = repr(value)
    return shown if len(shown) <= _LONGEST_SHOWN else f"{shown[:_LONGEST_SHOWN]}…"


_HOLDERS: dict[object, type] = {
    "types": TypeThreshold, "segments": SegmentThreshold, "fluid": FluidParams, "time_model": IterationTimeModel,
}
"""By the key under which it stands: what the object is."""
_HINTS: dict[tuple[type, object], str] = {
    (SegmentThreshold, "n"): (
        "; did you mean total? total = n × stages, the stages being the segment's output tokens: its end_output_tokens "
        "less those of the segment before it"
    ),
}
_ABOUT_MISSING: dict[tuple[type, object], str] = {
    (TypeThreshold, "n"): "an integer >= 1, or null for a type whose requests are never held",
    (SegmentThreshold, "total"): "an integer >= 1, the requests in all stages of the segment together",
}


def _as_invalid(error: ValidationError) -> InvalidThresholds:
    errors = error.errors(include_url=False)
    first = next((one for one in errors if one["type"] in _NO_SUCH_FIELD), errors[0])
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InvalidThresholds):
        return cause
    path = first["loc"]
    field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    holder = next((_HOLDERS[part] for part in reversed(path[:-1]) if part in _HOLDERS), Thresholds)
    if first["type"] in _NO_SUCH_FIELD:
        return InvalidThresholds(field, first["input"], _known_fields(holder, path[-1]))
    if first["type"] in _MISSING:
        allowed = _ABOUT_MISSING.get((holder, path[-1]), "a value; the field has no default")
        return MissingField(field, first["input"], allowed)
    return InvalidThresholds(field or "(body)", first["input"], first["msg"])


def _known_fields(holder: type, unknown: object) -> str:
    known = [known_field.name for known_field in fields(holder)]
    hint = _HINTS.get((holder, unknown)) or did_you_mean(str(unknown), known)
    return f"no such field; the fields are {', '.join(known)}{hint}"
