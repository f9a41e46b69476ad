"""What the controller knows of one replica, and the thresholds that follow from it. No Ray, no vLLM, no clock.

Fed with telemetry, it keeps the service-time law (refined online from the profile's), the arrival rate over a window
and the lengths of finished requests; asked, it solves the fluid model and says what it would put in force, and why.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from dataclasses import dataclass, replace

from cluster.config import ControllerConfig
from scheduler.fit import OnlineLaw
from scheduler.fluid import FluidEquilibrium, solve_fluid
from scheduler.law import ServiceTimeLaw
from scheduler.messages import Arrival, Telemetry
from scheduler.mix import Lengths, RequestType, WorkloadMix
from scheduler.solver import Infeasible, nested_wait_thresholds, resident_cap, wait_thresholds
from scheduler.thresholds import UNKNOWN_TYPE, EngineLimits, SegmentThreshold, Thresholds, TypeThreshold

KEPT_LENGTHS = 2000
MOST_TYPES = 4
_MOST_SEGMENTS = 4
_SETTLED = 0.10
"""Thresholds closer than this (relatively) to those in force are left alone: estimates jitter, engines should not."""
_LENGTH_GRID = tuple(sorted(int(base * 2**power) for power in range(28) for base in (16, 24)))


@dataclass(frozen=True, slots=True)
class Proposal:
    """The thresholds a replica should run with, the equilibrium behind them (None: too little is known), and why."""

    thresholds: Thresholds
    equilibrium: FluidEquilibrium | None
    reason: str


class ReplicaModel:
    """Running estimates of one replica under the configured policy."""

    def __init__(self, config: ControllerConfig, law: ServiceTimeLaw, configured: Thresholds) -> None:
        self._config = config
        self._configured = configured
        self.law = OnlineLaw(law)
        self.cursor = 0
        self.telemetry: Telemetry | None = None
        self._engine_id = ""
        self._watched_since_s = 0.0
        self._arrivals: deque[Arrival] = deque()
        self._finished: deque[tuple[int, int]] = deque(maxlen=KEPT_LENGTHS)

    def observe(self, telemetry: Telemetry) -> None:
        """Take in one report. A report seen before changes nothing; a restarted engine starts the window anew."""
        if telemetry.engine_id != self._engine_id:
            self._engine_id, self.cursor = telemetry.engine_id, 0
            self._arrivals.clear()
            oldest = telemetry.arrivals[0].at_s if telemetry.arrivals else telemetry.clock_s
            self._watched_since_s = max(oldest, telemetry.clock_s - self._config.window_s)
        for iteration in telemetry.iterations:
            if iteration.seq > self.cursor:
                self.law.update(
                    iteration.prefill_tokens, iteration.decode_tokens, iteration.kv_tokens, iteration.seconds
                )
        self._arrivals.extend(arrival for arrival in telemetry.arrivals if arrival.seq > self.cursor)
        self._finished.extend(
            (done.prompt_tokens, done.output_tokens)
            for done in telemetry.finished
            if done.seq > self.cursor and not done.aborted and done.output_tokens > 0
        )
        while self._arrivals and self._arrivals[0].at_s < telemetry.clock_s - self._config.window_s:
            self._arrivals.popleft()
        self.cursor = max(self.cursor, telemetry.cursor)
        self.telemetry = telemetry

    @property
    def rate_rps(self) -> float:
        """Arrivals per second over the window (or since watching began, when that is shorter)."""
        if self.telemetry is None:
            return 0.0
        watched_s = min(self._config.window_s, self.telemetry.clock_s - self._watched_since_s)
        return len(self._arrivals) / max(watched_s, 1.0)

    @property
    def finished_seen(self) -> int:
        """Finished requests whose lengths are known."""
        return len(self._finished)

    def propose(self) -> Proposal:
        """The thresholds for what is known now; the configured ones while that is too little."""
        if self.telemetry is None:
            return Proposal(self._configured, None, "no telemetry yet: the configured thresholds")
        if len(self._finished) < self._config.min_finished:
            reason = (
                f"{len(self._finished)} finished requests seen, {self._config.min_finished} needed: "
                "the configured thresholds"
            )
            return Proposal(self._configured, None, reason)
        if not self._arrivals:
            reason = f"no arrivals in the last {self._config.window_s:g} s: the configured thresholds"
            return Proposal(self._configured, None, reason)
        limits = self.telemetry.limits
        mix = self._mix(limits.max_model_len)
        equilibrium = solve_fluid(mix, self.law.law, limits.kv_capacity_tokens)
        cap = self._cap(mix, limits)
        solved = self._solve_policy(mix, limits, replace(self._configured, types=(), segments=(), max_in_service=cap))
        reason = f"{_in_words(equilibrium, self.rate_rps)}; {solved.reason}; cap {cap} from memory"
        thresholds = replace(solved, valid_for_s=self._config.validity_s, reason=reason)
        return Proposal(thresholds, equilibrium, reason)

    def _cap(self, mix: WorkloadMix, limits: EngineLimits) -> int:
        cap = resident_cap(
            mix, limits.kv_capacity_tokens, overflow_probability=self._config.overflow_probability
        )
        return max(1, min(cap, limits.seats))

    def _mix(self, longest: int) -> WorkloadMix:
        """One type per group of declared lengths (policy `wait`), and one for all requests of unknown length.

        Clients may declare any length; none generates more than `longest`.
        """
        rate = self.rate_rps
        declared = [arrival for arrival in self._arrivals if arrival.known_output_tokens is not None]
        if self._configured.policy != "wait" or not declared:
            return WorkloadMix((RequestType(UNKNOWN_TYPE, rate, Lengths.from_pairs(self._finished)),))
        groups: dict[int, list[tuple[int, int]]] = {}
        outputs = [min(arrival.known_output_tokens or 1, longest) for arrival in declared]
        bounds = _group_bounds(outputs)
        for arrival, output in zip(declared, outputs, strict=True):
            bound = bounds[min(bisect_left(bounds, output), len(bounds) - 1)]
            groups.setdefault(bound, []).append((arrival.prompt_tokens, output))
        share = rate / len(self._arrivals)
        types = [
            RequestType(f"output<={bound}", share * len(pairs), Lengths.from_pairs(pairs))
            for bound, pairs in sorted(groups.items())
        ]
        unknown = len(self._arrivals) - len(declared)
        if unknown:
            types.append(RequestType(UNKNOWN_TYPE, share * unknown, Lengths.from_pairs(self._finished)))
        return WorkloadMix(tuple(types))

    def _solve_policy(self, mix: WorkloadMix, limits: EngineLimits, base: Thresholds) -> Thresholds:
        cap = base.max_in_service or limits.max_num_seqs
        if base.policy == "fcfs":
            return replace(base, reason="fcfs needs no thresholds")
        known = [t for t in mix.types if t.name != UNKNOWN_TYPE]
        types: tuple[TypeThreshold, ...] = ()
        reasons: list[str] = []
        if known:
            # The load of requests of unknown length counts in the rate conditions, though segments gate them.
            solution = wait_thresholds(mix, self.law.law, limits.kv_capacity_tokens)
            counts = [1] * len(mix.types) if isinstance(solution, Infeasible) else list(solution.n)
            types = tuple(
                TypeThreshold(name=t.name, n=min(n, cap), max_output_tokens=_bound_of(t, last=t is known[-1]))
                for t, n in zip(mix.types, counts, strict=True)
                if t.name != UNKNOWN_TYPE
            )
            reasons.append(_solution_in_words("WAIT", solution, [t.n for t in types]))
        segments: tuple[SegmentThreshold, ...] = ()
        unknown = tuple(t for t in mix.types if t.name == UNKNOWN_TYPE)
        if unknown:
            segments, reason = self._solve_segments(WorkloadMix(unknown), limits, cap)
            reasons.append(reason)
        return replace(base, types=types, segments=segments, reason="; ".join(reasons))

    def _solve_segments(
        self, mix: WorkloadMix, limits: EngineLimits, cap: int
    ) -> tuple[tuple[SegmentThreshold, ...], str]:
        lengths = mix.merged().lengths
        # Counts fall strictly from segment to segment, so m segments need n_1 >= m. With more segments than the fluid
        # has requests per stage, requests would be held for the sake of the chain and not of the load.
        inventory = sum(solve_fluid(mix, self.law.law, limits.kv_capacity_tokens).inventories)
        count = max(1, int(min(_MOST_SEGMENTS, inventory)))
        boundaries = sorted({_on_grid(lengths.output_quantile(part / count)) for part in range(1, count + 1)})
        solution = nested_wait_thresholds(
            mix, self.law.law, limits.kv_capacity_tokens,
            boundaries=boundaries, overflow_probability=self._config.overflow_probability,
        )
        if isinstance(solution, Infeasible):
            return (), _solution_in_words("Nested WAIT", solution, [])
        segments = tuple(
            SegmentThreshold(end_output_tokens=end, n=min(n, cap))
            for end, n in zip(solution.boundaries, solution.n, strict=True)
        )
        return segments, _solution_in_words("Nested WAIT", solution, [segment.n for segment in segments])


def materially_different(proposed: Thresholds, in_force: Thresholds) -> bool:
    """False when a change would be noise: the same rule, or every count within a tenth (or one) of what it is."""
    if proposed.same_rule(in_force):
        return False
    counts, current = _counts(proposed), _counts(in_force)
    without_counts = _without_counts(proposed).same_rule(_without_counts(in_force))
    if not without_counts or len(counts) != len(current):
        return True
    return any(abs(new - old) > max(1.0, _SETTLED * old) for new, old in zip(counts, current, strict=True))


def _counts(thresholds: Thresholds) -> list[int]:
    counts = [entry.n for entry in thresholds.types] + [segment.n for segment in thresholds.segments]
    return [*counts, thresholds.max_in_service or 0]


def _without_counts(thresholds: Thresholds) -> Thresholds:
    return replace(
        thresholds,
        types=tuple(replace(entry, n=1) for entry in thresholds.types),
        segments=tuple(replace(segment, n=1) for segment in thresholds.segments),
        max_in_service=None if thresholds.max_in_service is None else 1,
    )


def _on_grid(length: float) -> int:
    """The next length on a coarse grid, so that boundaries stay put while estimates move a little."""
    index = bisect_left(_LENGTH_GRID, length)
    return _LENGTH_GRID[min(index, len(_LENGTH_GRID) - 1)]


def _group_bounds(outputs: list[int]) -> list[int]:
    distinct = sorted(set(outputs))
    if len(distinct) <= MOST_TYPES:
        return distinct
    ordered = sorted(outputs)
    marks = [ordered[(len(ordered) - 1) * part // MOST_TYPES] for part in range(1, MOST_TYPES + 1)]
    return sorted({_on_grid(mark) for mark in marks})


def _bound_of(request_type: RequestType, *, last: bool) -> int | None:
    return None if last else int(request_type.name.removeprefix("output<="))


def _in_words(equilibrium: FluidEquilibrium, rate_rps: float) -> str:
    load = f"{rate_rps:.2f} requests/s, load {equilibrium.load:.2f}"
    return f"{load}, {equilibrium.reason}" if equilibrium.reason else load


def _solution_in_words(rule: str, solution: object, n: list[int]) -> str:
    if isinstance(solution, Infeasible):
        return f"{rule} is infeasible ({solution.reason}): the gates stay open"
    return f"{rule} n = {', '.join(str(count) for count in n)}"
