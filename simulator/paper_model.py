"""The paper's own model, without an engine, to check its theory: FCFS, WAIT and Nested WAIT to the letter.

Source: arXiv 2504.11320, the model, Algorithm 1 (WAIT) and Algorithm 2 (Nested WAIT). An iteration that processes a
prompt of type j at stage s = 0..l'_j reads its l_j + s tokens and moves it one stage on; stage 0 is the prefill, and
before it a prompt waits without KV. Prompts of one type and stage differ only in age, so the state is counts, and many
independent replications run side by side, each with a clock of its own: arrays have the shape (rows, types, stages).
"""

import math
from typing import Protocol, cast

import numpy as np
from numpy.typing import NDArray

from scheduler.model.iteration_time import IterationTimeModel
from scheduler.model.rotation import stage_lengths, stage_limit
from scheduler.model.workload import WorkloadMix

IntArray = NDArray[np.int64]
FloatArray = NDArray[np.float64]


class PaperModel:
    """What arrives and what it costs, as arrays over (types, stages).

    Every type has one prompt length. Output lengths may vary within a type: they are then unknown ahead, and a prompt
    that was processed at stage s is finished with probability P(l' = s | l' >= s).
    Raises ValueError for a type with several prompt lengths and for a time model with more than d0 and d1.
    """

    def __init__(self, mix: WorkloadMix, time_model: IterationTimeModel) -> None:
        if not time_model.is_the_papers:
            raise ValueError(f"time_model is {time_model}; the paper's has only d0 and d1")
        for t in mix.types:
            if np.unique(t.lengths.prompt_tokens).size > 1:
                raise ValueError(f"type {t.name!r} has several prompt lengths; every type must have one")
        self.time_model = time_model
        self.rates_rps: FloatArray = np.array([t.rate_rps for t in mix.types])
        self.prompt_tokens: IntArray = np.array([t.lengths.prompt_tokens[0] for t in mix.types])
        longest = max(int(t.lengths.output_tokens.max()) for t in mix.types)
        self.stages: IntArray = np.arange(longest + 1)
        self.tokens: IntArray = self.prompt_tokens[:, None] + self.stages
        survival = np.array([[t.lengths.survival(s) for s in range(-1, longest + 1)] for t in mix.types])
        reached = np.where(survival[:, :-1] > 0, survival[:, :-1], 1.0)
        self.finish_probability: FloatArray = 1 - survival[:, 1:] / reached


class PaperPolicy(Protocol):
    """Chooses how many prompts of each type to process from each stage, the waiting ones (stage 0) included."""

    def batch(self, counts: IntArray) -> IntArray:
        """A new array of the shape of `counts` (rows, types, stages), nowhere above it."""
        ...


class PaperFcfs:
    """All running prompts are processed; waiting prompts are admitted while they fit."""

    def batch(self, counts: IntArray) -> IntArray:
        return counts.copy()


class PaperWait:
    """Algorithm 1. Type j is eligible when >= n_j of its prompts wait; then at most n_j move on from every stage."""

    def __init__(self, n: tuple[int, ...]) -> None:
        self._n: IntArray = np.array(n)

    def batch(self, counts: IntArray) -> IntArray:
        eligible = counts[:, :, 0] >= self._n
        return np.minimum(counts, self._n[:, None]) * eligible[:, :, None]


class PaperNestedWait:
    """Algorithm 2, for one type. Segment k has the stages after boundary k − 1 up to boundary k, the first stage 0 too.

    A segment runs when >= n_k prompts stand at its first stage and all segments before it run; then at most n_k move on
    from every stage. `boundaries`: l'_1 < … < l'_m, the last one >= the longest output.
    """

    def __init__(self, boundaries: tuple[int, ...], n: tuple[int, ...]) -> None:
        self._n: IntArray = np.array(n)
        self._last_stage: IntArray = np.array(boundaries)
        self.first_stage: IntArray = np.array([0, *(b + 1 for b in boundaries[:-1])])

    def batch(self, counts: IntArray) -> IntArray:
        segment = np.searchsorted(self._last_stage, np.arange(counts.shape[2]))
        runs = np.logical_and.accumulate(counts[:, :, self.first_stage] >= self._n, axis=2)
        batch: IntArray = np.minimum(counts, self._n[segment]) * runs[:, :, segment]
        return batch


class PaperNestedWaitByTotals:
    """Algorithm 2 with segment totals, spread over stages by `scheduler.model.rotation`; else as `PaperNestedWait`.

    Keeps for each row which iteration each segment has come to.
    """

    def __init__(self, boundaries: tuple[int, ...], totals: tuple[int, ...], rows: int) -> None:
        self._totals: IntArray = np.array(totals)
        self._lengths: IntArray = np.array(stage_lengths(boundaries))
        self._last_stage: IntArray = np.array(boundaries)
        self.first_stage: IntArray = np.array([0, *(b + 1 for b in boundaries[:-1])])
        self._steps: IntArray = np.zeros((rows, len(totals)), dtype=np.int64)

    def batch(self, counts: IntArray) -> IntArray:
        stages = np.arange(counts.shape[2])
        segment = np.searchsorted(self._last_stage, stages)
        batch = np.zeros_like(counts)
        undecided = np.ones(len(counts), dtype=bool)
        for _ in range(int(self._lengths.max())):
            limit = self._limit(np.arange(len(self._totals)), self._steps)
            runs = np.logical_and.accumulate(counts[:, 0, self.first_stage] >= limit, axis=1)
            positions = self._steps[:, segment] - (stages - self.first_stage[segment])
            moved = np.minimum(counts[:, 0], self._limit(segment, positions)) * runs[:, segment]
            batch[undecided, 0] = moved[undecided]
            self._steps += runs & undecided[:, None]
            # An iteration in which the limits of all prompts present are 0 takes no time.
            undecided &= ~moved.any(axis=1) & runs[:, 0] & counts.any(axis=(1, 2))
            if not undecided.any():
                break
        return batch

    def _limit(self, segment: IntArray, step: IntArray) -> IntArray:
        return stage_limit(self._totals[segment], self._lengths[segment], step)


class Arrivals(Protocol):
    """Where prompts come from."""

    def during(self, seconds: FloatArray) -> IntArray:
        """Arrivals in each row's next `seconds` (rows,), by type: (rows, types)."""
        ...

    def following(self) -> tuple[FloatArray, IntArray]:
        """Of each row's next arrival, the seconds until it comes and its type: two arrays (rows,)."""
        ...


class PoissonArrivals:
    """Independent Poisson streams of `rates_rps`; without memory, so that neither method keeps any state."""

    def __init__(self, rates_rps: FloatArray, rows: int, rng: np.random.Generator) -> None:
        self._rates_rps, self._rows, self._rng = rates_rps, rows, rng

    def during(self, seconds: FloatArray) -> IntArray:
        return self._rng.poisson(seconds[:, None] * self._rates_rps)

    def following(self) -> tuple[FloatArray, IntArray]:
        total_rps = float(self._rates_rps.sum())
        share = np.cumsum(self._rates_rps)[:-1] / total_rps
        types = np.searchsorted(share, self._rng.random(self._rows), side="right")
        return self._rng.exponential(1 / total_rps, self._rows), types


class PerIteration:
    """The same prompts during every iteration, whatever its length: `counts` by type. For systems that never idle."""

    def __init__(self, counts: tuple[int, ...], rows: int = 1) -> None:
        self._arriving: IntArray = np.tile(np.array(counts), (rows, 1))

    def during(self, seconds: FloatArray) -> IntArray:
        return self._arriving * (seconds > 0)[:, None]

    def following(self) -> tuple[FloatArray, IntArray]:
        raise RuntimeError("the system is idle, and arrivals come only with iterations")


class SteppedArrivals:
    """Poisson streams with rates that change in steps, periodically: (seconds, rates by type) of each stretch.

    `follow` sets the run that gives the clocks.
    """

    def __init__(self, stretches: list[tuple[float, tuple[float, ...]]], rng: np.random.Generator) -> None:
        self._rng, self._run = rng, cast("PaperRun", None)
        self._edges_s = np.concatenate([[0.0], np.cumsum([seconds for seconds, _ in stretches])])
        self._rates_rps = np.array([rates for _, rates in stretches])
        self._arrived = np.concatenate([[np.zeros(self._rates_rps.shape[1])], np.cumsum(
            np.diff(self._edges_s)[:, None] * self._rates_rps, axis=0
        )])

    def follow(self, run: "PaperRun") -> None:
        self._run = run

    def during(self, seconds: FloatArray) -> IntArray:
        return self._rng.poisson(self._until(self._run.clock_s) - self._until(self._run.clock_s - seconds))

    def following(self) -> tuple[FloatArray, IntArray]:
        now_s, total = self._run.clock_s, self._arrived.sum(axis=1)
        target = self._until(now_s).sum(axis=1) + self._rng.exponential(1.0, now_s.shape)
        rounds, rest = np.divmod(target, total[-1])
        at_s = rounds * self._edges_s[-1] + np.interp(rest, total, self._edges_s)
        place = np.clip(np.searchsorted(self._edges_s, at_s % self._edges_s[-1], side="right") - 1, 0, None)
        share = np.cumsum(self._rates_rps[place], axis=1)
        types = (self._rng.random(now_s.shape)[:, None] * share[:, -1:] >= share).sum(axis=1)
        return np.asarray(at_s - now_s), types

    def _until(self, at_s: FloatArray) -> FloatArray:
        rounds, rest = np.divmod(at_s, self._edges_s[-1])
        within = [np.interp(rest, self._edges_s, column) for column in self._arrived.T]
        return np.asarray(rounds[:, None] * self._arrived[-1] + np.stack(within, axis=1))


class PaperRun:
    """Independent replications of one system under one policy, from empty or from `start` (types, stages).

    `capacity_tokens` is C, infinite by default: no eviction, and `peak_tokens` tells what would have been needed. An
    overflow evicts last in, first out, and an evicted prompt waits again with nothing done (the paper's restart).
    Counts know the order of admission within a type, and between types as long as every running prompt is in every
    iteration (its stage is then its age); an overflow of several types after one was held raises ValueError. Prompts of
    several types that wait, or entered together, are taken in random order, restarted ones among them. Nor do counts
    know lengths that vary within a type: a prompt that restarts draws a new one.

    State, for reading: `clock_s` (rows,), `counts` (rows, types, stages). Since the start: `arrived` and `completed`
    (rows, types) in prompts; `output_tokens` of completed prompts, `evicted` prompts, `iterations` and `peak_tokens`,
    the most KV tokens held in an iteration (all rows,). `evicted` counts restarts, not newcomers that never got in.
    `prompt_s` (rows, types, stages) are the prompts at each stage times the seconds they were there, so that by
    Little's law its sum over arrivals is the mean latency, and that of stages 0 and 1 the mean TTFT.
    """

    def __init__(
        self,
        model: PaperModel,
        policy: PaperPolicy,
        *,
        seed: int,
        rows: int = 1,
        capacity_tokens: float = math.inf,
        arrivals: Arrivals | None = None,
        start: IntArray | None = None,
    ) -> None:
        types, stages = model.tokens.shape
        self._rng = np.random.default_rng(seed)
        self._model, self._policy, self._capacity_tokens = model, policy, capacity_tokens
        self._arrivals: Arrivals = arrivals or PoissonArrivals(model.rates_rps, rows, self._rng)
        self._finishes_surely = model.finish_probability == 1
        self._may_finish = np.nonzero((model.finish_probability > 0) & ~self._finishes_surely)
        self.clock_s: FloatArray = np.zeros(rows)
        self.counts: IntArray = np.zeros((rows, types, stages), dtype=np.int64)
        if start is not None:
            self.counts += start
        self.arrived: IntArray = np.zeros((rows, types), dtype=np.int64)
        self.completed: IntArray = np.zeros((rows, types), dtype=np.int64)
        self.output_tokens: IntArray = np.zeros(rows, dtype=np.int64)
        self.evicted: IntArray = np.zeros(rows, dtype=np.int64)
        self.iterations: IntArray = np.zeros(rows, dtype=np.int64)
        self.peak_tokens: IntArray = np.zeros(rows, dtype=np.int64)
        self.prompt_s: FloatArray = np.zeros((rows, types, stages))
        self._all_ran = True

    def run(self, until_s: float) -> None:
        """Bring every row's clock to `until_s`; an iteration that would end later stays undone."""
        while np.any(self.clock_s < until_s):
            self.step(until_s)

    def step(self, until_s: float = math.inf) -> None:
        """One event in every row with a clock before `until_s`: an iteration or, with nothing to do, an arrival."""
        live = self.clock_s < until_s
        held_tokens = self._evict_overflow(self._request_tokens())
        batch = self._policy.batch(self.counts)
        self._all_ran = self._all_ran and np.array_equal(batch[:, :, 1:], self.counts[:, :, 1:])
        used_tokens = self._admit_what_fits(batch, held_tokens)
        np.maximum(self.peak_tokens, used_tokens, out=self.peak_tokens, where=live)

        busy = batch.any(axis=(1, 2))
        batch_tokens = np.einsum("rts,ts->r", batch, self._model.tokens)
        need_s = np.asarray(self._model.time_model.iteration_s(0.0, 0.0, batch_tokens))
        idle = live & ~busy
        if idle.any():
            wait_s, type_of_next = self._arrivals.following()
            need_s = np.where(busy, need_s, wait_s)
        ends_s = self.clock_s + need_s
        in_time = live & (ends_s <= until_s)
        spent_s = np.where(live, np.minimum(need_s, until_s - self.clock_s), 0.0)
        self.clock_s = np.where(in_time, ends_s, np.where(live, until_s, self.clock_s))

        self.prompt_s += self.counts * spent_s[:, None, None]
        self._advance(batch * (in_time & busy)[:, None, None])
        self.iterations += in_time & busy
        arriving = self._arrivals.during(np.where(busy, spent_s, 0.0))
        self.prompt_s[:, :, 0] += arriving * spent_s[:, None] / 2  # they come at any time of the iteration
        if idle.any():
            rows = np.flatnonzero(idle & in_time)
            arriving[rows, type_of_next[rows]] += 1
        self.arrived += arriving
        self.counts[:, :, 0] += arriving

    def _evict_overflow(self, held_tokens: IntArray) -> IntArray:
        """Evict until the running prompts fit; takes and returns their KV tokens (rows,)."""
        if not np.any(held_tokens > self._capacity_tokens):
            return held_tokens
        held_tokens = held_tokens.copy()
        # Admission and service are first in, first out: the last in are at the lowest stages.
        if len(self._model.rates_rps) > 1:
            self._require_admission_order()
            for row in np.flatnonzero(held_tokens > self._capacity_tokens):
                held_tokens[row] = self._evict_drawn(int(row), int(held_tokens[row]))
            return held_tokens
        for stage in self._model.stages[1:]:
            tokens = self._model.tokens[0, stage]
            surplus = np.ceil((held_tokens - self._capacity_tokens) / tokens)
            leaving = np.clip(surplus, 0, self.counts[:, 0, stage]).astype(np.int64)
            self.counts[:, 0, stage] -= leaving
            self.counts[:, 0, 0] += leaving
            self.evicted += leaving
            held_tokens -= leaving * tokens
        return held_tokens

    def _evict_drawn(self, row: int, held_tokens: int) -> int:
        """Evict from one row of several types, of those that entered together in random order."""
        counts = self.counts[row]
        for stage in self._model.stages[1:]:
            while held_tokens > self._capacity_tokens and counts[:, stage].any():
                kind = self._draw(counts[:, stage])
                counts[kind, stage] -= 1
                counts[kind, 0] += 1
                self.evicted[row] += 1
                held_tokens -= int(self._model.tokens[kind, stage])
        return held_tokens

    def _admit_what_fits(self, batch: IntArray, held_tokens: IntArray) -> IntArray:
        """Cut the batch's newcomers to those that fit; returns the KV tokens then held (rows,)."""
        if np.any(held_tokens + batch[:, :, 0] @ self._model.prompt_tokens > self._capacity_tokens):
            if len(self._model.rates_rps) > 1:
                self._admit_drawn(batch, held_tokens)
            else:
                places = (int(self._capacity_tokens) - held_tokens) // self._model.prompt_tokens[0]
                np.minimum(batch[:, 0, 0], places, out=batch[:, 0, 0])
        newcomers_tokens: IntArray = batch[:, :, 0] @ self._model.prompt_tokens
        return held_tokens + newcomers_tokens

    def _admit_drawn(self, batch: IntArray, held_tokens: IntArray) -> None:
        """Where the newcomers of several types do not all fit: in random order, until one does not."""
        self._require_admission_order()
        prompt_tokens = self._model.prompt_tokens
        for row in np.flatnonzero(held_tokens + batch[:, :, 0] @ prompt_tokens > self._capacity_tokens):
            wanted, room = batch[row, :, 0].copy(), self._capacity_tokens - held_tokens[row]
            batch[row, :, 0] = 0
            while wanted.any():
                kind = self._draw(wanted)
                room -= prompt_tokens[kind]
                if room < 0:
                    break
                wanted[kind] -= 1
                batch[row, kind, 0] += 1

    def _draw(self, counts: IntArray) -> int:
        """The type of one prompt among `counts` by type, each as likely as the others."""
        ends = np.cumsum(counts)
        return int(np.searchsorted(ends, self._rng.integers(ends[-1]), side="right"))

    def _advance(self, moved: IntArray) -> None:
        finished = moved * self._finishes_surely
        types, stages = self._may_finish
        if types.size:
            probability = self._model.finish_probability[types, stages]
            finished[:, types, stages] = self._rng.binomial(moved[:, types, stages], probability)
        self.counts -= moved
        self.counts[:, :, 1:] += (moved - finished)[:, :, :-1]
        self.completed += finished.sum(axis=2)
        self.output_tokens += np.einsum("rts,s->r", finished, self._model.stages)

    def _request_tokens(self) -> IntArray:
        request: IntArray = np.einsum("rts,ts->r", self.counts[:, :, 1:], self._model.tokens[:, 1:])
        return request

    def _require_admission_order(self) -> None:
        if not self._all_ran:
            raise ValueError(
                f"memory of {self._capacity_tokens:g} tokens overflows after prompts were held; with several types the "
                "last in is then unknown"
            )
