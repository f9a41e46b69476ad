"""A window over one engine's arrivals and outputs, cut at the last detected change.

Estimates follow a step of the traffic within a few control periods and are steady otherwise.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

from scheduler.estimation.arrival_rates import ArrivalRates, arrival_rates
from scheduler.estimation.output_lengths import Answers, have_changed
from scheduler.messages import Arrival, Finished, Telemetry
from scheduler.model.fluid import NO_REUSE, PrefixReuse
from scheduler.model.workload import Lengths

KEPT_LENGTHS = 2000
_SPLITS = (0.25, 0.5, 0.75)
"""Splits tested for a change of output lengths, as shares of the ended outputs."""
_RECENT = (1.5, 3.0, 6.0)
"""More splits: the latest outputs against all others, in units of `least_answers`."""
_MOST_MARKS = 2048
_REUSED = ("prompt_tokens", "cached_tokens", "shared_tokens")
_LONGEST = 2**31


def length_classes(tokens: ArrayLike) -> NDArray[np.int64]:
    """The class of each length, named by its longest length; within a class, lengths differ by up to a factor of four.
    """
    _, bits = np.frexp(np.maximum(np.asarray(tokens, dtype=np.float64), 1.0) - 1.0)
    return np.asarray(4 ** ((bits.astype(np.int64) + 1) // 2))


def type_of(arrival: Arrival) -> str:
    """The type of an arrival: the class of its prompt and, if declared, of its output length."""
    name = f"prompt<={length_classes(arrival.prompt_tokens)}"
    if arrival.known_output_tokens is None:
        return name
    return f"{name},output<={length_classes(min(arrival.known_output_tokens, _LONGEST))}"


class TrafficMonitor:
    """Arrivals of the last `window_s` seconds and the latest outputs of one engine, on that engine's clock.

    A change of output lengths counts once `least_answers` outputs have ended since.
    """

    def __init__(self, window_s: float, least_answers: int) -> None:
        self._window_s, self._least_answers = window_s, least_answers
        self._arrivals: deque[tuple[Arrival, str]] = deque()
        self._finished: deque[Finished] = deque(maxlen=KEPT_LENGTHS)
        self._marks: deque[tuple[float, float]] = deque(maxlen=_MOST_MARKS)
        self._gained = 0.0
        self._now_s = self._since_s = 0.0
        self._answers_since_s = -np.inf
        self._running: tuple[tuple[int, int], ...] = ()
        self._ended, self._ended_at_s = np.zeros((0, 2), dtype=np.int64), np.zeros(0)
        self._rates: ArrivalRates | None = None
        self._before_s = 0.0
        self._moved: deque[tuple[float, float]] = deque(maxlen=_MOST_MARKS)

    def follow(self, window_s: float, least_answers: int) -> None:
        """Another window and least number of outputs from now on; what was seen stays."""
        self._window_s, self._least_answers = window_s, least_answers

    def restart(self, telemetry: Telemetry) -> None:
        """The engine was replaced: rates and progress start anew, on another clock; lengths stay."""
        oldest_s = telemetry.arrivals[0].at_s if telemetry.arrivals else telemetry.clock_s
        self._since_s = max(oldest_s, telemetry.clock_s - self._window_s)
        self._arrivals.clear()
        self._marks.clear()
        self._moved.clear()
        self._gained, self._rates, self._answers_since_s = 0.0, None, -np.inf
        self._finished = deque((done._replace(at_s=-np.inf) for done in self._finished), maxlen=KEPT_LENGTHS)
        if telemetry.cursor and telemetry.counters.arrivals > len(telemetry.arrivals) and telemetry.iterations:
            self._answers_since_s = telemetry.iterations[0].at_s

    def observe(self, telemetry: Telemetry, cursor: int, tokens_per_iteration: float = 1.0) -> None:
        """Take in the records newer than `cursor`, and look for changes.

        tokens_per_iteration: expected output tokens that a running request gains in an iteration.
        """
        self._before_s, self._now_s = self._now_s, telemetry.clock_s
        fresh = [iteration.at_s for iteration in telemetry.iterations if iteration.seq > cursor]
        if fresh:
            gained = len(fresh) * tokens_per_iteration
            self._marks.extend([(fresh[0], self._gained + tokens_per_iteration), (fresh[-1], self._gained + gained)])
            self._gained += gained
        self._arrivals.extend((one, type_of(one)) for one in telemetry.arrivals if one.seq > cursor)
        while self._arrivals and self._arrivals[0][0].at_s < self._now_s - self._window_s:
            self._arrivals.popleft()
        self._since_s = max(self._since_s, self._now_s - self._window_s)
        if len(self._finished) == KEPT_LENGTHS:
            self._answers_since_s = max(self._answers_since_s, self._finished[0].at_s)
        # Answers that clients cut short too: until then each had its slot, its memory and its share of every iteration.
        self._finished.extend(done for done in telemetry.finished if done.seq > cursor and done.output_tokens > 0)
        self._ended = np.array(
            [(one.prompt_tokens, one.output_tokens) for one in self._finished], dtype=np.int64
        ).reshape(-1, 2)
        self._ended_at_s = np.array([one.at_s for one in self._finished], dtype=np.float64)
        self._running = tuple((one.prompt_tokens, one.output_tokens) for one in telemetry.running)
        self._update_rates()
        self._forget_changed_answers()

    @property
    def arrivals(self) -> list[Arrival]:
        """Arrivals since the last change of rate; the whole window if there have been none since."""
        all_of_them = [one for one, _ in self._arrivals]
        recent = [one for one in all_of_them if one.at_s >= self._since_s]
        return recent or all_of_them

    @property
    def rates(self) -> ArrivalRates:
        """The arrival rates, unchanged until a newer estimate disagrees (`ArrivalRates.still_holds`)."""
        if self._rates is None:
            return arrival_rates([], [], self._now_s - 1.0, self._now_s)
        return self._rates

    @property
    def stretches(self) -> list[tuple[float, list[Arrival]]]:
        """While rates vary within a control period: the seconds and arrivals of each stretch of one rate, latest last.

        Empty unless the rates changed since the previous report, or twice within the window.
        """
        oldest_s = self._now_s - self._window_s
        moved = [(max(from_s, oldest_s), until_s) for from_s, until_s in self._moved if until_s > oldest_s]
        if not moved or (len(moved) < 2 and moved[-1][1] < self._before_s):
            return []
        edges = [*moved, (moved[-1][1], self._now_s)]
        return [
            (max(until_s - from_s, 1.0), [one for one, _ in self._arrivals if from_s <= one.at_s < until_s])
            for from_s, until_s in edges
        ]

    @property
    def finished(self) -> list[tuple[int, int]]:
        """(prompt, output) tokens of the outputs that ended since the last change of lengths."""
        return [(int(p), int(o)) for p, o in self._ended[self._since_change]]

    @property
    def prefix_reuse(self) -> PrefixReuse:
        """The effect of the prefix cache on the latest finished requests."""
        prompts, cached, shared = self.reused_tokens
        return PrefixReuse(computed=1 - cached / prompts, private=1 - shared / prompts) if prompts else NO_REUSE

    @property
    def reused_tokens(self) -> tuple[int, int, int]:
        """Prompt tokens of the latest finished requests: all, those in the prefix cache, and those shared."""
        prompts, cached, shared = (sum(getattr(done, name) for done in self._finished) for name in _REUSED)
        return prompts, cached, shared

    @property
    def finished_count(self) -> int:
        """Number of outputs that ended since the last change of lengths."""
        return int(self._since_change.sum())

    @property
    def _since_change(self) -> NDArray[np.bool_]:
        return np.asarray((self._ended_at_s > self._answers_since_s) | np.isneginf(self._answers_since_s))

    @property
    def answers_since_s(self) -> float:
        """Time of the last change of output lengths; minus infinity: none yet."""
        return float(self._answers_since_s)

    def answers(self, guessed: Sequence[tuple[int, int]] = ()) -> Answers:
        """Outputs since the last change of lengths, ended and running; `guessed` ones count as ended."""
        seen = self.answers_between(self._answers_since_s, self._now_s)
        return seen.with_ended(guessed) if guessed else seen

    def _update_rates(self) -> None:
        recent = [(one.at_s, kind) for one, kind in self._arrivals if one.at_s >= self._since_s]
        newer = arrival_rates([at for at, _ in recent], [kind for _, kind in recent], self._since_s, self._now_s)
        if newer.since_s > self._since_s:
            self._moved.append((self._since_s, newer.since_s))
        self._since_s = newer.since_s
        if self._rates is None or not self._rates.still_holds(newer):
            self._rates = newer

    def _forget_changed_answers(self) -> None:
        if not self._marks:
            return
        ends = self._ended_at_s[self._since_change]
        marks = {round(share * ends.size) for share in _SPLITS}
        marks |= {ends.size - math.ceil(share * self._least_answers) for share in _RECENT}
        last = ends.size - self._least_answers - 1  # keeps at least `least_answers`
        splits = sorted({float(ends[mark]) for mark in marks if 0 < mark <= last and np.isfinite(ends[mark])})
        for split_s in reversed(splits):
            earlier = self.answers_between(self._answers_since_s, split_s)
            if have_changed(earlier, self.answers_between(split_s, self._now_s), tests=len(splits)):
                self._answers_since_s = split_s
                return

    def answers_between(self, from_s: float, until_s: float) -> Answers:
        """Outputs as observed in (from_s, until_s] on the engine's clock: left-truncated and right-censored.

        Left truncation: an output under way at `from_s` enters with the tokens that it had then (`entry`); a shorter
        output would not have been observed. Right censoring: an output under way at `until_s` has at least the tokens
        that it had then. These token counts follow from the latest ones, since every iteration gives each running
        request the same expected number. With one token per second, observed from 100 s until 120 s:

            30 tokens, ended at 110 s      entry 20, output 30, ended
            30 tokens, ended at 125 s      entry 5, output 25, goes on (censored)
            12 tokens, goes on at 130 s    entry 0, output 2, goes on
            50 tokens, ended at 90 s       left out: over before
             8 tokens, ended at 130 s      left out: it had no token yet at 120 s
        """
        known = (self._ended_at_s > from_s) | np.isneginf(from_s)
        running = np.array(self._running, dtype=np.int64).reshape(-1, 2)
        pairs = np.concatenate([self._ended[known], running])
        prompt, output = pairs[:, 0], pairs[:, 1]
        ended = np.arange(len(pairs)) < len(pairs) - len(running)
        last_seen_s = np.concatenate([self._ended_at_s[known], np.full(len(running), self._now_s)])
        entry = np.zeros(len(pairs))
        if np.isfinite(from_s):
            entry = np.maximum(0.0, output - self._tokens_between(from_s, last_seen_s))
        censored = last_seen_s > until_s
        if censored.any():
            since = np.ceil(self._tokens_between(until_s, last_seen_s)).astype(np.int64)
            output, ended = np.where(censored, output - since, output), ended & ~censored
        seen = output > entry
        return Answers(prompt[seen], output[seen], ended[seen], entry[seen])

    def _tokens_between(self, from_s: float, until_s: NDArray[np.float64]) -> NDArray[np.float64]:
        """Tokens that the iterations between `from_s` and `until_s` added to every running request."""
        if not self._marks:
            return np.full(until_s.shape, np.inf)  # progress is not known: all count from their first token
        times, counts = np.array(self._marks, dtype=np.float64).T
        between = np.interp(until_s, times, counts) - np.interp(from_s, times, counts)
        return np.asarray(between, dtype=np.float64)


def stratified(lengths: Lengths, prompts: list[int], rates: ArrivalRates) -> Lengths:
    """`lengths` reweighted by the arrival rate of each prompt class: a shift shows in arrivals before it does in ends.

    A prompt class that `lengths` does not have yet gets the output lengths of all others. Source: post-stratification.
    """
    classes, arrived = length_classes(lengths.prompt_tokens), np.array(prompts, dtype=np.int64)
    share: dict[int, float] = {}
    for name, rate in rates.by_type.items():
        stratum = int(name.removeprefix("prompt<=").partition(",")[0])
        share[stratum] = share.get(stratum, 0.0) + rate.value
    if not share:
        return lengths
    total = sum(share.values())
    parts_prompt, parts_output, parts_weight = [], [], []
    for stratum, rate_rps in share.items():
        member = classes == stratum
        if member.any():
            own = lengths.weights[member]
            parts_prompt.append(lengths.prompt_tokens[member])
            parts_output.append(lengths.output_tokens[member])
        else:
            own, like = lengths.weights, arrived[length_classes(arrived) == stratum]
            parts_prompt.append(np.resize(like if like.size else np.array([stratum]), own.size))
            parts_output.append(lengths.output_tokens)
        parts_weight.append(own / own.sum() * rate_rps / total)
    return Lengths(np.concatenate(parts_prompt), np.concatenate(parts_output), np.concatenate(parts_weight))
