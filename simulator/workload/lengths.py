"""Request lengths from a short text: fixed or lognormal lengths, a trace's, weighted mixes, shifts over time."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr, ndtri

from scheduler.model.workload import Lengths
from simulator.workload.traces import BadRow, open_trace, sample_rows

_EXAMPLES = "examples: p512d20 | 0.7:p512d20+0.3:p512d50 | lmsys | p2500~0.5d300~1 | @FILE.csv | p512d20; 300s: p512d50"
_POINT = re.compile(r"p0*([1-9]\d{0,8})d0*([1-9]\d{0,8})", re.ASCII)
_LOGNORMAL = re.compile(r"p([1-9]\d{0,5})~(\d+(?:\.\d+)?)d([1-9]\d{0,5})~(\d+(?:\.\d+)?)", re.ASCII)
_LOGNORMAL_POINTS = 200
_SHIFT = re.compile(r"(\d+(?:\.\d+)?)\s*s", re.ASCII)
_LMSYS_LONGEST_TOKENS = 499


@dataclass(frozen=True)
class Component:
    """One part of a mix: `weight` is its share of the requests, in (0, 1]."""

    name: str
    weight: float
    lengths: Lengths

    @cached_property
    def _cumulative(self) -> NDArray[np.float64]:
        return _cumulative(self.lengths.weights)

    def at(self, level: NDArray[np.float64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Prompt and output tokens at these levels, each in [0, 1), of the cumulative distribution."""
        pair = np.searchsorted(self._cumulative, level, side="right")
        return self.lengths.prompt_tokens[pair], self.lengths.output_tokens[pair]


@dataclass(frozen=True)
class Phase:
    """The mix from `start_s` until the next phase; the weights of its components sum to 1."""

    start_s: float
    components: tuple[Component, ...]

    @cached_property
    def cumulative(self) -> NDArray[np.float64]:
        """Summed weights of the components; the last is exactly 1."""
        return _cumulative(np.array([component.weight for component in self.components]))


class LengthSource:
    """Lengths of requests, given when they arrive; `parse_lengths` makes it.

    `names` are the components of all phases. `left_out` says, per name, what share of its requests `limited` removed.
    """

    def __init__(self, phases: tuple[Phase, ...], left_out: Mapping[str, float] | None = None) -> None:
        self.phases = phases
        self.left_out = dict(left_out or {})
        self.names = tuple(dict.fromkeys(c.name for phase in phases for c in phase.components))
        self._starts_s = np.array([phase.start_s for phase in phases])

    def draw(
        self, rng: np.random.Generator, arrival_s: NDArray[np.float64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.intp]]:
        """Prompt tokens, output tokens and index into `names` of requests that arrive then; every array is (n,).

        Takes two random numbers per request whatever the spec. So blocks of any size give one sequence, and without
        shifts it does not depend on the arrival times.
        """
        which, level = rng.random((arrival_s.size, 2)).T
        prompt_tokens, output_tokens, name = np.empty((3, arrival_s.size), np.int64)
        phase_of = np.searchsorted(self._starts_s, arrival_s, side="right") - 1
        for index in np.unique(phase_of):
            phase = self.phases[index]
            component_of = np.searchsorted(phase.cumulative, which, side="right")
            for number, component in enumerate(phase.components):
                rows = np.flatnonzero((phase_of == index) & (component_of == number))
                prompt_tokens[rows], output_tokens[rows] = component.at(level[rows])
                name[rows] = self.names.index(component.name)
        return prompt_tokens, output_tokens, name

    def types(self, horizon_s: float) -> tuple[Component, ...]:
        """One component per name seen until `horizon_s` (> 0), weighted by its share of that time.

        That is its share of the requests when these arrive at a constant rate.
        """
        shares = np.diff(np.minimum([*self._starts_s, math.inf], horizon_s)) / horizon_s
        weight, lengths = dict.fromkeys(self.names, 0.0), {}
        for phase, share in zip(self.phases, shares.tolist(), strict=True):
            for component in phase.components:
                weight[component.name] += share * component.weight
                lengths[component.name] = component.lengths
        return tuple(Component(name, weight[name], lengths[name]) for name in self.names if weight[name] > 0)

    def limited(
        self, max_total_tokens: int | None = None, min_output_tokens: int = 1, max_prompt_tokens: int | None = None
    ) -> "LengthSource":
        """The same source, given that prompt + output <= max_total_tokens, prompt <= max_prompt_tokens and
        output >= min_output_tokens.

        What is left of each phase is scaled up to weight 1. Raises ValueError when nothing is left of one.
        """
        left_out: dict[str, float] = {}
        phases = []
        for phase in self.phases:
            kept = []
            for component in phase.components:
                fits = _fits(component.lengths, max_total_tokens, min_output_tokens, max_prompt_tokens)
                if fits.all():
                    kept.append(component)
                    continue
                remaining = component.lengths.weights * fits
                left_out[component.name] = 1 - float(remaining.sum())
                if fits.any():
                    lengths = Lengths(component.lengths.prompt_tokens, component.lengths.output_tokens, remaining)
                    kept.append(Component(component.name, component.weight * float(remaining.sum()), lengths))
            if not kept:
                raise ValueError(
                    f"no request of {'+'.join(c.name for c in phase.components)} is left: max_total_tokens is "
                    f"{max_total_tokens}, max_prompt_tokens is {max_prompt_tokens} and min_output_tokens is "
                    f"{min_output_tokens}"
                )
            phases.append(_phase(phase.start_s, kept))
        return LengthSource(tuple(phases), left_out)


def _fits(
    lengths: Lengths, max_total_tokens: int | None, min_output_tokens: int, max_prompt_tokens: int | None
) -> NDArray[np.bool_]:
    total_tokens = lengths.prompt_tokens + lengths.output_tokens
    longest = lengths.max_total_tokens if max_total_tokens is None else max_total_tokens
    fits = (total_tokens <= longest) & (lengths.output_tokens >= min_output_tokens)
    return fits if max_prompt_tokens is None else fits & (lengths.prompt_tokens <= max_prompt_tokens)


def parse_lengths(text: str) -> LengthSource:
    """The lengths that `text` describes.

    p512d20                       every prompt has 512 tokens, every output 20
    0.7:p512d20+0.3:p512d50       a mix; weights > 0, scaled to sum to 1
    lmsys                         see `lmsys_lengths`
    p2500~0.5d300~1.2             lognormal prompts of mean 2500 and coefficient of variation 0.5, outputs likewise
    @FILE                         a trace's joint lengths, see `simulator.workload.traces.open_trace`; no + ; or : in
    its path MIX; 300s: MIX; 900s: MIX     another mix for requests that arrive from these times on

    Raises ValueError naming the piece that is wrong.
    """
    first, *later = text.split(";")
    phases = [_phase(0.0, _mix(first, text))]
    for piece in later:
        start, _, mix = piece.partition(":")
        shift = _SHIFT.fullmatch(start.strip())
        if not shift:
            raise _error(piece, text, "after a semicolon comes the time of the shift, as in 300s: p512d50")
        if float(shift[1]) <= phases[-1].start_s:
            raise _error(piece, text, "each shift must come later than the one before, the first after 0s")
        phases.append(_phase(float(shift[1]), _mix(mix, text)))
    return LengthSource(tuple(phases))


def _mix(mix: str, text: str) -> list[Component]:
    pieces = mix.split("+")
    components: list[Component] = []
    for piece in pieces:
        weight, colon, name = (part.strip() for part in piece.rpartition(":"))
        if not colon and len(pieces) > 1:
            raise _error(piece, text, "each part of a mix needs a weight")
        component = _component(piece, _weight(piece, weight, text) if colon else 1.0, name, text)
        if any(component.name == earlier.name for earlier in components):
            raise _error(piece, text, f"{component.name} is in the mix already; add up the weights")
        components.append(component)
    return components


def _weight(piece: str, weight: str, text: str) -> float:
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        raise _error(piece, text, f"the weight is {weight!r}; it must be a number > 0")
    return value


def _component(piece: str, weight: float, name: str, text: str) -> Component:
    if name == "lmsys":
        return Component(name, weight, lmsys_lengths())
    if name.startswith("@"):
        try:
            return Component(f"@{Path(name[1:]).stem}", weight, trace_lengths(name[1:]))
        except (ValueError, OSError) as error:
            raise _error(piece, text, f"{error}") from error
    if spread := _LOGNORMAL.fullmatch(name):
        prompt, prompt_cv, output, output_cv = map(float, spread.groups())
        return Component(name, weight, lognormal_lengths(prompt, prompt_cv, output, output_cv))
    point = _POINT.fullmatch(name)
    if not point:
        raise _error(
            piece, text, "lengths are pPROMPTdOUTPUT with integers >= 1, pMEAN~CVdMEAN~CV, lmsys, or @ and a trace file"
        )
    return Component(f"p{point[1]}d{point[2]}", weight, Lengths.point(int(point[1]), int(point[2])))


def _error(piece: str, text: str, rule: str) -> ValueError:
    return ValueError(f"lengths {text!r}, at {piece.strip()!r}: {rule}; {_EXAMPLES}")


def _phase(start_s: float, components: list[Component]) -> Phase:
    total = math.fsum(component.weight for component in components)
    return Phase(start_s, tuple(Component(c.name, c.weight / total, c.lengths) for c in components))


@lru_cache
def lmsys_lengths() -> Lengths:
    """Lengths like those of lmsys-chat-1m's requests of less than 500 tokens; prompt and output are independent.

    Prompts are lognormal, outputs Weibull, both rounded to integers and conditioned to 1..499. The two parameters of
    each solve two equations on that discrete distribution: its mean is the published one (58.6 and 147.3), and
    P(X < m) = P(X > m) at the published median m (21 and 116). scipy.optimize.root gave the constants below.
    """
    edges = np.arange(0.5, _LMSYS_LONGEST_TOKENS + 1)
    prompt = np.diff(ndtr((np.log(edges) - 3.11586949) / 1.92133034))
    output = np.diff(-np.exp(-((edges / 176.148057) ** 1.04741971)))
    tokens = np.arange(1, _LMSYS_LONGEST_TOKENS + 1)
    prompt_tokens, output_tokens = np.meshgrid(tokens, tokens, indexing="ij")
    return Lengths(prompt_tokens.ravel(), output_tokens.ravel(), np.outer(prompt, output).ravel())


@lru_cache
def lognormal_lengths(prompt_mean: float, prompt_cv: float, output_mean: float, output_cv: float) -> Lengths:
    """Independent lognormal prompts and outputs of these means (tokens) and coefficients of variation.

    Each is represented by 200 equally likely values, the middle quantiles, rounded to integers >= 1.
    """
    middles = ndtri((np.arange(_LOGNORMAL_POINTS) + 0.5) / _LOGNORMAL_POINTS)

    def tokens(mean: float, cv: float) -> NDArray[np.int64]:
        variance = math.log1p(cv**2)
        values = mean * np.exp(math.sqrt(variance) * middles - variance / 2)
        return np.asarray(np.maximum(1, np.rint(values)), dtype=np.int64)

    prompts, outputs = np.meshgrid(tokens(prompt_mean, prompt_cv), tokens(output_mean, output_cv), indexing="ij")
    return Lengths(prompts.ravel(), outputs.ravel(), np.ones(prompts.size))


@lru_cache
def trace_lengths(path: str) -> Lengths:
    """The joint lengths of a trace's usable rows. Raises ValueError and OSError as `open_trace` does."""
    rows = (row for row in open_trace(path).rows() if not isinstance(row, BadRow))
    sample = sample_rows(rows, np.random.default_rng(0))
    if not sample.rows:
        raise ValueError(f"{path} has no usable row")
    return sample.lengths()


def _cumulative(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    total = np.cumsum(weights)
    return np.asarray(total / total[-1])
