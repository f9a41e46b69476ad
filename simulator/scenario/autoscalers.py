"""Rules by which others choose the number of replicas, and one that knows the future, beside ours.

    fluid[:late_costs=100]                          ours (`scheduler.tuning.wanted_replicas`)
    ongoing-requests[:target=2,up=30,down=600]      Ray Serve's default: requests under way per replica, over 30 s
    slo-keda[:up=0.55,down=0.4]                     llm-d's SLO-aware rule for KEDA, as its documentation states it
    oracle                                          the smallest number that takes the future's own rates

Sources: Ray 2.60, `ray.serve.autoscaling_policy` (a test calls Ray's own function on the same figures); llm-d,
docs/architecture/autoscaling/slo-aware.md.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from scheduler.tuning.slo import Slo
from simulator.workload.arrivals import named_numbers

FLUID, ORACLE = "fluid", "oracle"
_PARTS: dict[str, tuple[str, ...]] = {
    FLUID: ("late_costs",), "ongoing-requests": ("target", "up", "down"), "slo-keda": ("up", "down"), ORACLE: (),
}
AUTOSCALERS = tuple(_PARTS)
_LOOK_BACK_S = 30.0
_SLO_WINDOW_S, _SLO_LOOK_S, _SLO_MOST = 45.0, 15.0, 2.0
_SLO_QUANTILE = 0.9
_UP_EVERY_S, _UP_LEAST = 60.0, 4
_DOWN_EVERY_S = 120.0
_LEAST_WINDOW_S = 10.0


@dataclass(frozen=True, slots=True)
class FleetView:
    """What a rule may see at `now_s`, in virtual seconds.

    ready, coming: replicas that serve, and that were started and do not serve yet. ongoing: requests under way, and
    those that wait for the first replica. done: TTFT and TPOT in seconds (NaN: none) of what completed since the last
    look.
    """

    now_s: float
    ready: int
    coming: int
    ongoing: int
    done: Sequence[tuple[float, float]] = ()

    @property
    def target(self) -> int:
        """Replicas that were asked for."""
        return self.ready + self.coming


class Autoscaler(ABC):
    """A rule. It is asked every `every_s` seconds; the caller keeps its answer within the bounds."""

    every_s: ClassVar[float] = 1.0

    @abstractmethod
    def wanted(self, view: FleetView) -> int:
        """The number of replicas that there should be."""


class OngoingRequests(Autoscaler):
    """Ray Serve's default: requests under way, averaged over 30 s, over `target` per replica; more only after
    `up_s` seconds of wanting more, fewer only after `down_s` of wanting fewer."""

    def __init__(self, *, target: float = 2.0, up: float = 30.0, down: float = 600.0) -> None:
        self._target, self._up_s, self._down_s = target, up, down
        self._seen: deque[tuple[float, int]] = deque()
        self._since: tuple[int, float] | None = None

    def wanted(self, view: FleetView) -> int:
        """See the class; from 0, one at once as soon as a request is there."""
        self._seen.append((view.now_s, view.ongoing))
        while self._seen[0][0] <= view.now_s - _LOOK_BACK_S:
            self._seen.popleft()
        if view.ready == 0:
            return max(1, view.target) if view.ongoing else view.target
        mean = sum(ongoing for _, ongoing in self._seen) / len(self._seen)
        desired = math.ceil(mean / self._target - 1e-9)
        direction = (desired > view.target) - (desired < view.target)
        if direction == 0:
            self._since = None
            return view.target
        if self._since is None or self._since[0] != direction:
            self._since = direction, view.now_s
        if view.now_s - self._since[1] < (self._up_s if direction > 0 else self._down_s):
            return view.target
        self._since = None
        return desired if direction > 0 or view.target == 1 else max(1, desired)


class SloKeda(Autoscaler):
    """llm-d's: the 0.9 quantiles of TTFT and TPOT over their targets, averaged; more above `up`, fewer below `down`."""

    every_s = _SLO_LOOK_S

    def __init__(self, targets: Slo, *, up: float = 0.55, down: float = 0.4) -> None:
        self._targets, self._up, self._down = targets, up, down
        self._done: deque[tuple[float, tuple[float, float]]] = deque()
        self._ratios: deque[tuple[float, float]] = deque()
        self._up_s = self._down_s = -math.inf

    def wanted(self, view: FleetView) -> int:
        """See the class; replicas that are coming are taken into account by llm-d's in-flight credit."""
        now_s = view.now_s
        self._done.extend((now_s, one) for one in view.done)
        while self._done and self._done[0][0] <= now_s - _SLO_WINDOW_S:
            self._done.popleft()
        self._ratios.append((now_s, min(self._raw(), _SLO_MOST)))
        while self._ratios[0][0] <= now_s - _SLO_WINDOW_S:
            self._ratios.popleft()
        ratio, number = sum(one for _, one in self._ratios) / len(self._ratios), view.target
        if number == 0 or view.ready == 0:
            return max(number, 1) if view.ongoing else number
        if ratio > self._up and now_s - self._up_s >= _UP_EVERY_S:
            credit = view.ready / number
            more = math.ceil(number * (ratio * credit / self._up - 1) - 1e-9)
            if more > 0:
                self._up_s = now_s
                return number + min(more, max(number, _UP_LEAST))
        fewer = math.floor(number * (1 - ratio / self._down) + 1e-9)
        if fewer > 0 and now_s - self._down_s >= _DOWN_EVERY_S:
            self._down_s = now_s
            return number - 1
        return number

    def _raw(self) -> float:
        times = np.array([one for _, one in self._done], dtype=np.float64).reshape(-1, 2)
        ratios = [0.0]
        for column, target_s in enumerate((self._targets.ttft_s, self._targets.tpot_s)):
            known = times[~np.isnan(times[:, column]), column]
            if target_s is not None and known.size:
                ratios.append(float(np.quantile(known, _SLO_QUANTILE)) / target_s)
        return max(ratios)


class Oracle(Autoscaler):
    """Knows when requests will arrive (`arrivals_s`, ascending) and what a replica takes: the smallest number for the
    rate, averaged over a start-up time, at every moment until a replica that is started now serves."""

    def __init__(self, arrivals_s: Sequence[float], each_rps: float, start_up_s: float, fewest: int) -> None:
        self._arrivals_s = np.asarray(arrivals_s, dtype=np.float64)
        self._each_rps, self._start_up_s, self._fewest = each_rps, start_up_s, fewest

    def wanted(self, view: FleetView) -> int:
        """See the class."""
        window_s = max(self._start_up_s, _LEAST_WINDOW_S)
        middles_s = np.linspace(view.now_s, view.now_s + self._start_up_s + self.every_s, 9)
        ends = np.searchsorted(self._arrivals_s, np.stack((middles_s - window_s / 2, middles_s + window_s / 2)))
        # At either end of the run the window is cut, and so is the time that its requests are spread over.
        last_s = float(self._arrivals_s[-1])
        seconds = np.minimum(middles_s + window_s / 2, last_s) - np.maximum(middles_s - window_s / 2, 0.0)
        rates = (ends[1] - ends[0]) / np.maximum(seconds, _LEAST_WINDOW_S / 2)
        return max(self._fewest, math.ceil(float(rates.max()) / self._each_rps - 1e-9))


def parse_autoscaler(text: str) -> tuple[str, dict[str, float]]:
    """The rule's name and its numbers.

    Raises ValueError naming what is unknown or out of range.
    """
    name, _, given = (part.strip() for part in text.partition(":"))
    if name not in _PARTS:
        raise ValueError(f"autoscale is {text!r}; the rules are {', '.join(AUTOSCALERS)}")
    keys = _PARTS[name]
    usage = f"{name}:{','.join(f'[{key}=…]' for key in keys)}" if keys else name
    numbers = named_numbers(f"autoscale {text!r}", given, (), keys, usage)
    for key, value in numbers.items():
        least = 1.0 if key == "late_costs" else 0.0
        if not least < value < math.inf and not (key in ("up", "down") and value == 0):
            raise ValueError(f"autoscale {text!r}: {key} is {value:g}; allowed: above {least:g}")
    return name, numbers


RIVALS: dict[str, Callable[..., Autoscaler]] = {
    "ongoing-requests": lambda targets, **numbers: OngoingRequests(**numbers), "slo-keda": SloKeda,
}
"""The other rules by name; each takes the latency targets and its numbers."""
