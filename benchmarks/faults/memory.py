"""Memory of processes over time: a fitted slope with its interval. Pure but for `sample`."""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import psutil
from scipy.stats import linregress, t

MIB = float(1 << 20)
_FEWEST = 10
_CONFIDENCE = 0.95
_WATCHED = 0.8  # of the warm-up


@dataclass(frozen=True)
class Slope:
    """Growth of one process. low, high: 95 % interval, of independent errors; samples close in time are not quite
    independent, so that it is a little narrow."""

    mib_per_hour: float
    low: float
    high: float
    mean_mib: float
    minutes: float

    @property
    def grows(self) -> bool:
        """The whole interval is above zero."""
        return self.low > 0


def slope_of(at_s: Sequence[float], used_bytes: Sequence[float]) -> Slope:
    """A straight line through samples of memory, by least squares.

    Raises:
        ValueError: fewer than 10 samples, or all at one time.
    """
    if len(at_s) < _FEWEST or len(set(at_s)) < 2:
        raise ValueError(f"{len(at_s)} samples; at least {_FEWEST}, at different times, make a slope")
    hours, mib = np.asarray(at_s, dtype=float) / 3600, np.asarray(used_bytes, dtype=float) / MIB
    fit = linregress(hours, mib)
    half = float(t.ppf((1 + _CONFIDENCE) / 2, len(at_s) - 2)) * float(fit.stderr)
    slope = float(fit.slope)
    return Slope(slope, slope - half, slope + half, float(mib.mean()), float(np.ptp(hours)) * 60)


class MemoryLog:
    """Samples by process: `add` them as they come, `slopes` when all is over.

    warm_s: samples of a process's first so many seconds do not count: it loads and fills its pools. A process must live
    nearly as long again, so that a page more or less is not taken for a slope.
    """

    def __init__(self, warm_s: float) -> None:
        self._warm_s = warm_s
        self._samples: defaultdict[str, list[tuple[float, float]]] = defaultdict(list)

    def add(self, at_s: float, used_bytes: Mapping[str, float]) -> None:
        """One sample of every process, by its name with its process id."""
        for name, used in used_bytes.items():
            self._samples[name].append((at_s, used))

    def slopes(self) -> dict[str, Slope]:
        """Of every process with enough samples after its warm-up."""
        found = {}
        for name, samples in self._samples.items():
            warm = [(at_s, used) for at_s, used in samples if at_s >= samples[0][0] + self._warm_s]
            if not warm or warm[-1][0] - warm[0][0] < _WATCHED * self._warm_s:
                continue
            with contextlib.suppress(ValueError):
                found[name] = slope_of(*zip(*warm, strict=True))
        return found


def sample(processes: Iterable[tuple[str, psutil.Process]]) -> dict[str, float]:
    """Memory that each process has for itself, bytes; shared pages (Ray's object store) are left out."""
    used = {}
    for role, process in processes:
        with contextlib.suppress(psutil.Error):
            used[f"{role} {process.pid}"] = float(process.memory_full_info().uss)
    return used
