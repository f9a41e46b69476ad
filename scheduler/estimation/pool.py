"""What the engines of one kind know together: same model, engine settings and accelerator.

Each engine's `Digest` is a set of sums, and the pool adds them up. An engine's estimates are the pool's, but for what
it shows to be its own:

- iteration times: the common model times the engine's factor; see `scheduler.estimation.speeds` for the prior;
- output lengths by class of prompt, and the mix of these classes: the pool's, unless the engine's own counts differ
  significantly and by a tenth (`scheduler.estimation.siblings`); then its own, with the pool's as a prior that is worth
  `PRIOR_OUTPUTS` outputs;
- arrival rate: the mean of the engines', unless the engine's own interval excludes it;
- prefix hits, tokens a step, realised margin, delivery: the pool's, unless the engine's own differ by what matters.

An engine that differs is left out of what the others share, and none counts for more than `MOST_OUTPUTS` outputs or
four times the median engine's. One that is gone, or silent for `SILENT_S` and for several passes, becomes history,
which halves every `HALF_LIFE_S`: an application that restarts or scales up again does not begin anew. No clock: the
caller says what time it is.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Any

from scheduler.digest import Digest
from scheduler.estimation.common import Settled
from scheduler.estimation.estimates import Estimates
from scheduler.estimation.members import PAST, Members

MOST_OUTPUTS = 2000.0
SILENT_S, HALF_LIFE_S = 60.0, 600.0
SILENT_PASSES = 3.0
"""An engine reports once a pass; one that misses so many is not just late."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """An engine whose iterations take `factor` times as long as its siblings', with its interval."""

    factor: float
    low: float
    high: float

    @property
    def shown(self) -> dict[str, Any]:
        """JSON-ready."""
        return {"factor": self.factor, "low": self.low, "high": self.high, "text": self.in_words}

    @property
    def in_words(self) -> str:
        """What it does, without its name."""
        if self.factor >= 1:
            return f"runs {self.factor:.2g} times slower than its siblings"
        return f"runs {1 / self.factor:.2g} times faster than its siblings"


class Pool:
    """The engines of one kind; longest: most tokens of prompt and output together."""

    def __init__(self, longest: int) -> None:
        self._members, self._longest = Members(), longest
        self._settled: Settled | None = None
        self._faded_s: float | None = None

    def __len__(self) -> int:
        return len(self._members.place)

    def take(self, name: str, digest: Digest, now_s: float) -> None:
        """The latest digest of an engine; it counts from the next `settle` on.

        Raises:
            ValueError: values that no engine can have; what was known of it stays.
        """
        self._members.take(name, digest, now_s)

    def keep_only(self, names: Collection[str]) -> None:
        """Engines of other names are gone."""
        for name in set(self._members.place) - set(names):
            self._leave(name)

    def settle(self, now_s: float) -> None:
        """Learn from the digests of all engines; a few milliseconds for a thousand."""
        members = self._members
        since_s = 0.0 if self._faded_s is None else max(0.0, now_s - self._faded_s)
        members.fade(0.5 ** (since_s / HALF_LIFE_S))
        self._faded_s = now_s
        oldest_s = now_s - max(SILENT_S, SILENT_PASSES * since_s)
        for name in [one for one, place in members.place.items() if members.rows[place]["heard_s"] < oldest_s]:
            self._leave(name)
        self._settled = None  # should the comparison fail, each goes by its own estimates
        alone = len(members.place) < 2 and not members.rows[PAST]["weight"] > 0
        self._settled = None if alone or not members.place else Settled(members, self._longest, MOST_OUTPUTS)

    def estimates(self, name: str, least_outputs: int) -> Estimates | None:
        """An engine's estimates as of the latest `settle`. None: it has no siblings, or all of them together have seen
        fewer ended outputs than `least_outputs`, so that its own and their prior hold."""
        settled = self._settled
        if settled is None or name not in settled.numbers or settled.samples < least_outputs:
            return None
        return settled.estimates(settled.numbers[name])

    @property
    def deviations(self) -> dict[str, Deviation]:
        """The engines of another speed than their siblings, by name; those that are gone are none."""
        settled = self._settled
        if settled is None or len(settled.numbers) < 2:
            return {}
        speeds, numbers = settled.speeds, settled.numbers
        return {
            name: Deviation(float(speeds.factors[at]), float(speeds.low[at]), float(speeds.high[at]))
            for name, at in numbers.items() if speeds.apart[at]
        }

    def _leave(self, name: str) -> None:
        settled, factor = self._settled, None
        if settled is not None and name in settled.numbers:
            at = settled.numbers[name]
            if settled.speeds.usual[at] and not settled.lengths_apart[at]:
                factor = float(settled.speeds.factors[at])
        elif settled is None and len(self._members.place) == 1:
            factor = 1.0  # it had no siblings: what it knows is all there is
        self._members.leave(name, factor, MOST_OUTPUTS)
