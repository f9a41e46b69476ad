"""Arrival processes from a short text: Poisson, gamma renewal, on-off, diurnal, step, and evenly spaced."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scheduler.model.iteration_time import require_number

Array = NDArray[np.float64]

_BLOCK = 4096


@dataclass(frozen=True)
class ArrivalProcess:
    """When requests arrive; `parse_arrivals` makes it.

    Arrivals are drawn on a clock on which they come at a constant rate: the sum of `gaps`, which have mean 1, divided
    by that rate. `warp` takes such times to real ones (both in s, increasing), and so makes the rate vary. Hence
    another rate stretches the same arrivals.
    """

    spec: str
    gaps: Callable[[np.random.Generator, int], Array]
    warp: Callable[[Array], Array] = lambda even_s: even_s

    def blocks(self, rate_rps: float, rng: np.random.Generator) -> Iterator[Array]:
        """Arrival times in s, ascending from time 0, without end, in blocks of 4096.

        `rate_rps` (> 0, else ValueError) is the mean rate over a long time; for `step` it is the rate before the step.
        """
        require_number("rate_rps", rate_rps, allow_zero=False)
        reached = 0.0
        while True:
            even = reached + np.cumsum(self.gaps(rng, _BLOCK))
            reached = float(even[-1])
            yield self.warp(even / rate_rps)


def parse_arrivals(text: str) -> ArrivalProcess:
    """The arrival process that `text` describes.

    poisson
    uniform                           one request every 1/rate seconds
    gamma:cv=3                        independent gamma gaps; cv is their standard deviation divided by their mean
    onoff:on=10,off=20                Poisson for `on` seconds, no arrivals for `off` seconds, and again
    diurnal:period=3600,amplitude=0.8 Poisson with rate·(1 + amplitude·sin(2πt/period)), 0 <= amplitude <= 1
    step:at=60,factor=3               Poisson with rate, from `at` seconds on with rate·factor
    step:at=60,until=120,factor=3     the same, only until `until`

    Raises ValueError naming what is unknown, missing or out of range.
    """
    name, _, given = (part.strip() for part in text.partition(":"))
    if name not in _PROCESSES:
        raise ValueError(f"arrivals is {text!r}; the processes are: {', '.join(_usage(known) for known in _PROCESSES)}")
    make, required, optional = _PROCESSES[name]
    values = named_numbers(f"arrivals {text!r}", given, required, optional, _usage(name))
    try:
        return make(text, **values)
    except ValueError as error:
        raise ValueError(f"arrivals {text!r}: {error}") from None


def named_numbers(
    what: str, given: str, required: tuple[str, ...], optional: tuple[str, ...], usage: str
) -> dict[str, float]:
    """The numbers of a text like `at=60,factor=3`, by key; `what` and `usage` are for its errors.

    Raises ValueError for a key that is unknown, given twice or missing, and for a value that is no number.
    """
    values: dict[str, float] = {}
    for part in given.split(",") if given else ():
        key, _, value = (piece.strip() for piece in part.partition("="))
        if key not in required + optional or key in values:
            raise ValueError(f"{what}, at {part.strip()!r}: write {usage}, each key once")
        try:
            values[key] = float(value)
        except ValueError:
            raise ValueError(f"{what}: {key} is {value!r}; it must be a number") from None
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"{what}: {', '.join(missing)} missing; write {usage}")
    return values


def _exponential(rng: np.random.Generator, n: int) -> Array:
    return rng.standard_exponential(n)


def _poisson(spec: str) -> ArrivalProcess:
    return ArrivalProcess(spec, _exponential)


def _uniform(spec: str) -> ArrivalProcess:
    return ArrivalProcess(spec, lambda rng, n: np.ones(n))


def _gamma(spec: str, *, cv: float) -> ArrivalProcess:
    if not 0.001 <= cv <= 1000:
        raise ValueError(f"cv is {cv!r}; it must be between 0.001 and 1000")
    return ArrivalProcess(spec, lambda rng, n: rng.standard_gamma(cv**-2, n) * cv**2)


def _onoff(spec: str, *, on: float, off: float) -> ArrivalProcess:
    require_number("on", on, allow_zero=False)
    require_number("off", off)

    def warp(even_s: Array) -> Array:
        cycle, within_s = np.divmod(even_s * (on / (on + off)), on)
        return np.asarray(cycle * (on + off) + within_s)

    return ArrivalProcess(spec, _exponential, warp)


def _diurnal(spec: str, *, period: float, amplitude: float) -> ArrivalProcess:
    require_number("period", period, allow_zero=False)
    if not 0 <= amplitude <= 1:
        raise ValueError(f"amplitude is {amplitude!r}; it must be between 0 and 1")

    def even_phase(phase: Array) -> Array:
        """∫ (1 + amplitude·sin 2πu) du from 0 to phase."""
        return phase + amplitude * (1 - np.cos(2 * math.pi * phase)) / (2 * math.pi)

    def warp(even_s: Array) -> Array:
        cycle, target = np.divmod(even_s / period, 1.0)
        phase = np.zeros_like(target)
        # Bisection, bit by bit: `even_phase` has no inverse in closed form, and this one keeps the order exactly.
        for bit in range(1, 53):
            higher = phase + 0.5**bit
            phase = np.where(even_phase(higher) <= target, higher, phase)
        return np.asarray((cycle + phase) * period)

    return ArrivalProcess(spec, _exponential, warp)


def _step(spec: str, *, at: float, factor: float, until: float = math.inf) -> ArrivalProcess:
    require_number("at", at)
    require_number("factor", factor, allow_zero=False)
    if not until > at:
        raise ValueError(f"until is {until!r}; it must be > at, which is {at!r}")

    longest_s = (until - at) * factor

    def warp(even_s: Array) -> Array:
        beyond_s = even_s - at
        inside_s, after_s = np.clip(beyond_s, 0, longest_s), np.maximum(beyond_s - longest_s, 0)
        return np.asarray(np.minimum(even_s, at) + inside_s / factor + after_s)

    return ArrivalProcess(spec, _exponential, warp)


_PROCESSES: dict[str, tuple[Callable[..., ArrivalProcess], tuple[str, ...], tuple[str, ...]]] = {
    "poisson": (_poisson, (), ()),
    "uniform": (_uniform, (), ()),
    "gamma": (_gamma, ("cv",), ()),
    "onoff": (_onoff, ("on", "off"), ()),
    "diurnal": (_diurnal, ("period", "amplitude"), ()),
    "step": (_step, ("at", "factor"), ("until",)),
}


def _usage(name: str) -> str:
    _, required, optional = _PROCESSES[name]
    keys = ",".join([f"{key}=…" for key in required] + [f"[{key}=…]" for key in optional])
    return f"{name}:{keys}" if keys else name
