"""A workload: requests in the order they arrive, made up from a spec or taken from a trace."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice, repeat
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scheduler.model.workload import RequestType, WorkloadMix
from simulator.workload.arrivals import parse_arrivals
from simulator.workload.config import WorkloadConfig
from simulator.workload.lengths import parse_lengths
from simulator.workload.prompts import Pieces
from simulator.workload.sessions import SESSIONS, Limits, are_sessions, parse_sessions, sample_sessions, turns_by_time
from simulator.workload.traces import (
    BadRow,
    Trace,
    TraceRow,
    TraceSample,
    open_trace,
    sample_rows,
)

_BAD_ROW_MESSAGES = 20


class SimRequest(NamedTuple):
    """One request of a workload.

    `type_name` is the component of a spec ("p512d20", "lmsys"), or "all" for a trace. `pieces` are the parts of
    its prompt (None: shared with no other request), `answer` the piece that its output becomes in later prompts.
    """

    arrival_s: float
    prompt_tokens: int
    output_tokens: int
    type_name: str
    pieces: Pieces | None = None
    answer: int | None = None


def open_workload(config: WorkloadConfig) -> "Workload":
    """The workload of `config`.

    Reads the whole trace when arrivals are a process, and only its header under replay. Raises ValueError when the
    trace is of no known format, has no usable row or, under replay, no timestamps, and when no request of `lengths`
    is within the limits; OSError when the trace cannot be read.
    """
    if config.lengths is not None:
        return _Sessions(config) if are_sessions(config.lengths) else _Synthetic(config)
    assert config.trace is not None
    trace = open_trace(config.trace, config.trace_format, config.tokenizer)
    return _Replay(config, trace) if config.replays else _Resampled(config, trace)


@dataclass
class _Tally:
    """What became of the rows of one pass over a trace."""

    rows_read: int = 0
    bad_rows: int = 0
    too_long: int = 0
    long_prompts: int = 0
    too_short: int = 0
    messages: list[str] = field(default_factory=list)

    def bad(self, message: str) -> None:
        self.bad_rows += 1
        if self.bad_rows <= _BAD_ROW_MESSAGES:
            self.messages.append(message)

    def notes(self, file: str, config: WorkloadConfig) -> tuple[str, ...]:
        left_out = self.bad_rows + self.too_long + self.long_prompts + self.too_short
        if not left_out:
            return ()
        messages = self.messages + ["…"] * (self.bad_rows > len(self.messages))
        reasons = (
            (self.bad_rows, f"bad: {'; '.join(messages)}"),
            (self.too_long, f"longer than {config.max_total_tokens} tokens"),
            (self.long_prompts, f"with prompts of more than {config.max_prompt_tokens} tokens"),
            (self.too_short, f"with fewer than {config.min_output_tokens} output tokens"),
        )
        described = "; ".join(f"{count} {reason}" for count, reason in reasons if count)
        return (f"{file}: {left_out} of {self.rows_read} rows left out ({described})",)


class Workload(ABC):
    """Requests in the order they arrive. Memory does not grow with their number."""

    def __init__(self, config: WorkloadConfig, name: str) -> None:
        self.config = config
        self.name = name
        self._tally = _Tally()
        # Separate streams, so that another rate or process leaves the lengths as they are.
        self._arrival_seed, self._length_seed, self._sample_seed = np.random.SeedSequence(config.seed).spawn(3)

    @abstractmethod
    def requests(self) -> Iterator[SimRequest]:
        """The requests by arrival time; the same ones on every call."""

    @abstractmethod
    def mix(self) -> WorkloadMix:
        """Rates and joint lengths by type: one type per component of a spec, the type "all" for a trace.

        The rates sum to `rate_rps`, whatever the process, or else to the trace's own mean rate. Lengths that shift are
        averaged over the first requests / rate_rps seconds. Reads a replayed trace; ValueError if it has no mean rate.
        """

    @abstractmethod
    def notes(self) -> tuple[str, ...]:
        """What a reader of results should know: which requests were left out and why, which numbers are estimates."""

    @property
    def rows_read(self) -> int:
        """Rows that the latest pass over the trace has read so far; 0 without a trace. The other counts likewise."""
        return self._tally.rows_read

    @property
    def bad_rows(self) -> int:
        """Rows that are no request; under replay also those that go back in time."""
        return self._tally.bad_rows

    @property
    def too_long(self) -> int:
        """Rows of more than max_total_tokens."""
        return self._tally.too_long

    @property
    def long_prompts(self) -> int:
        """Rows with prompts of more than max_prompt_tokens, but not more than max_total_tokens."""
        return self._tally.long_prompts

    @property
    def too_short(self) -> int:
        """Rows of less than min_output_tokens, but at least 1."""
        return self._tally.too_short

    def _arrivals(self, requests: int) -> Iterator[NDArray[np.float64]]:
        """That many arrival times of the process, in blocks."""
        assert self.config.rate_rps is not None
        rng = np.random.default_rng(self._arrival_seed)
        blocks = parse_arrivals(self.config.arrivals).blocks(self.config.rate_rps, rng)
        while requests > 0:
            block = next(blocks)[:requests]
            requests -= block.size
            yield block


class _Synthetic(Workload):
    """Lengths from a spec."""

    def __init__(self, config: WorkloadConfig) -> None:
        assert config.lengths is not None
        super().__init__(config, config.lengths.strip())
        self._source = parse_lengths(config.lengths).limited(
            config.max_total_tokens, config.min_output_tokens, config.max_prompt_tokens
        )

    def requests(self) -> Iterator[SimRequest]:
        assert self.config.requests is not None
        rng = np.random.default_rng(self._length_seed)
        for arrival_s in self._arrivals(self.config.requests):
            prompt_tokens, output_tokens, name = self._source.draw(rng, arrival_s)
            names = [self._source.names[index] for index in name.tolist()]
            yield from map(SimRequest, arrival_s.tolist(), prompt_tokens.tolist(), output_tokens.tolist(), names)

    def mix(self) -> WorkloadMix:
        assert self.config.requests is not None
        assert self.config.rate_rps is not None
        rate_rps = self.config.rate_rps
        types = self._source.types(self.config.requests / rate_rps)
        return WorkloadMix(tuple(RequestType(t.name, rate_rps * t.weight, t.lengths) for t in types))

    def notes(self) -> tuple[str, ...]:
        limits = f"max_total_tokens {self.config.max_total_tokens}, min_output_tokens {self.config.min_output_tokens}"
        if self.config.max_prompt_tokens is not None:
            limits += f", max_prompt_tokens {self.config.max_prompt_tokens}"
        return tuple(f"{share:.1%} of {name} left out ({limits})" for name, share in self._source.left_out.items())


class _Sessions(Workload):
    """Conversations. The process gives the times at which they begin; those that went on at time 0 began before it, at
    the same mean rate, so that requests come at theirs from the beginning."""

    def __init__(self, config: WorkloadConfig) -> None:
        assert config.lengths is not None
        assert config.rate_rps is not None
        super().__init__(config, config.lengths.strip())
        self._spec = parse_sessions(config.lengths)
        self._limits = Limits(
            config.max_total_tokens or math.inf, config.max_prompt_tokens or math.inf, config.min_output_tokens
        )
        self._sample = sample_sessions(self._spec, self._limits)
        self._sessions_per_s = config.rate_rps / self._sample.mean_turns

    def requests(self) -> Iterator[SimRequest]:
        rng = np.random.default_rng(self._length_seed)
        turns = turns_by_time(self._spec, self._limits, rng, self._starts_s())
        for at_s, turn in islice(turns, self.config.requests):
            yield SimRequest(at_s, turn.prompt_tokens, turn.output_tokens, SESSIONS, turn.pieces, turn.answer)

    def _starts_s(self) -> Iterator[NDArray[np.float64]]:
        rng, longest_s = np.random.default_rng(self._sample_seed), self._sample.longest_s
        earlier = rng.poisson(self._sessions_per_s * longest_s)
        yield np.sort(rng.uniform(-longest_s, 0.0, earlier))
        yield from parse_arrivals(self.config.arrivals).blocks(
            self._sessions_per_s, np.random.default_rng(self._arrival_seed)
        )

    def mix(self) -> WorkloadMix:
        assert self.config.rate_rps is not None
        return WorkloadMix((RequestType(SESSIONS, self.config.rate_rps, self._sample.lengths),))

    def notes(self) -> tuple[str, ...]:
        mean, wanted = self._sample.mean_turns, self._spec.turns
        if mean > 0.95 * wanted:
            return ()
        return (f"sessions have {mean:.1f} turns instead of {wanted:g}, as the limits on tokens allow no more",)


class _TraceWorkload(Workload):
    def __init__(self, config: WorkloadConfig, trace: Trace) -> None:
        super().__init__(config, trace.path.stem)
        self._trace = trace

    def _rows(self) -> Iterator[TraceRow]:
        """One pass over the trace: the rows that become requests. Starts a new tally."""
        tally = self._tally = _Tally()
        longest, longest_prompt = self.config.max_total_tokens or math.inf, self.config.max_prompt_tokens or math.inf
        latest_s = -math.inf
        for row in self._trace.rows():
            tally.rows_read += 1
            if isinstance(row, BadRow):
                tally.bad(row.message)
                continue
            if self.config.replays and row.timestamp_s is not None:
                if row.timestamp_s < latest_s:
                    tally.bad(f"{row.where}: it comes {latest_s - row.timestamp_s:g} s before a row above it")
                    continue
                latest_s = row.timestamp_s
            if row.prompt_tokens + row.output_tokens > longest:
                tally.too_long += 1
            elif row.prompt_tokens > longest_prompt:
                tally.long_prompts += 1
            elif row.output_tokens < self.config.min_output_tokens:
                tally.too_short += 1
            else:
                yield row

    def _sampled(self, rows: Iterator[TraceRow]) -> TraceSample:
        sample = sample_rows(rows, np.random.default_rng(self._sample_seed))
        if not sample.rows:
            raise self._no_usable_row()
        return sample

    def _no_usable_row(self) -> ValueError:
        why = "; ".join(self._tally.notes(self._trace.path.name, self.config)) or "it is empty"
        return ValueError(f"{self._trace.path} has no usable row; {why}")

    def notes(self) -> tuple[str, ...]:
        return self._trace.notes + self._tally.notes(self._trace.path.name, self.config)


class _Resampled(_TraceWorkload):
    """The rows of a trace, each once before any comes again; arrivals of a process.

    They come in random order, except that prompts which share text keep the file's order, from a random one on: which
    requests share a prefix, and how soon after one another, is part of such a trace.
    """

    def __init__(self, config: WorkloadConfig, trace: Trace) -> None:
        super().__init__(config, trace)
        self._sample = self._sampled(self._rows())

    def requests(self) -> Iterator[SimRequest]:
        rng = np.random.default_rng(self._length_seed)
        prompt_tokens, output_tokens = self._sample.prompt_tokens, self._sample.output_tokens
        pieces, rows = self._sample.pieces, prompt_tokens.size
        first = int(rng.integers(rows)) if pieces else 0
        order = np.empty(0, np.intp)
        for arrival_s in self._arrivals(self.config.requests or self._sample.rows):
            epochs = math.ceil((arrival_s.size - order.size) / rows)
            epoch = (lambda: (np.arange(rows) + first) % rows) if pieces else (lambda: rng.permutation(rows))
            order = np.concatenate([order, *(epoch() for _ in range(epochs))])
            row, order = order[: arrival_s.size], order[arrival_s.size :]
            columns = arrival_s, prompt_tokens[row], output_tokens[row]
            shared = [pieces[index] for index in row] if pieces else repeat(None)
            yield from map(SimRequest, *(column.tolist() for column in columns), repeat("all"), shared)

    def mix(self) -> WorkloadMix:
        assert self.config.rate_rps is not None
        return WorkloadMix.from_lengths(self._sample.lengths(), self.config.rate_rps)

    def notes(self) -> tuple[str, ...]:
        kept, rows = self._sample.prompt_tokens.size, self._sample.rows
        sampled = f"{self._trace.path.name}: lengths are drawn from a random {kept} of its {rows} usable rows"
        return (*super().notes(), *([sampled] if kept < rows else []))


class _Replay(_TraceWorkload):
    """The rows of a trace at their own times, read while they are asked for."""

    def __init__(self, config: WorkloadConfig, trace: Trace) -> None:
        super().__init__(config, trace)
        self._shortage: tuple[str, ...] = ()
        if not trace.has_timestamps:
            raise ValueError(f"arrivals is 'replay', but {trace.path} has no timestamps; name a process and its rate")

    def requests(self) -> Iterator[SimRequest]:
        stretch = self._own_rate_rps / self.config.rate_rps if self.config.rate_rps is not None else 1.0
        first_s, number = math.nan, 0
        for number, row in enumerate(islice(self._rows(), self.config.requests), 1):
            assert row.timestamp_s is not None
            first_s = row.timestamp_s if number == 1 else first_s
            arrival_s = (row.timestamp_s - first_s) * stretch
            yield SimRequest(arrival_s, row.prompt_tokens, row.output_tokens, "all", row.pieces)
        if not number:
            raise self._no_usable_row()
        if number < (self.config.requests or 0):
            self._shortage = (f"{self._trace.path.name}: {number} of the {self.config.requests} requests asked for",)

    def mix(self) -> WorkloadMix:
        return WorkloadMix.from_lengths(self._whole.lengths(), self.config.rate_rps or self._own_rate_rps)

    def notes(self) -> tuple[str, ...]:
        return super().notes() + self._shortage

    @cached_property
    def _whole(self) -> TraceSample:
        return self._sampled(islice(self._rows(), self.config.requests))

    @property
    def _own_rate_rps(self) -> float:
        """Gaps between requests per second."""
        if not self._whole.span_s > 0:
            raise ValueError(f"{self._trace.path} has no mean rate; its requests all come at the same time")
        return (self._whole.rows - 1) / self._whole.span_s
