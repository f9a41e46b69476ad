"""The replicas of one kind under one controller: what they know together, and the plans that follow from it.

Replicas with the same estimates share one plan, so that a thousand replicas cost hardly more to plan for than one. The
cluster's controller and the simulator's use this object alike. No clock, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Hashable, Iterable

from scheduler.estimation.pool import Deviation, Pool
from scheduler.tuning.replica_model import Proposal, ReplicaModel

_KV_GRID = math.log(1.01)
"""Replicas of one kind whose KV caches differ by less share a plan, made for the smallest of them."""
_MOST_PLANS = 24
"""Plans made in one pass beside each replica's first, and the first for other targets; the other replicas keep theirs
until the next."""


class Siblings:
    """Replicas by name; longest: most tokens of prompt and output together."""

    def __init__(self, longest: int) -> None:
        self._pool = Pool(longest)
        self._plans: dict[Hashable, tuple[float, Proposal]] = {}
        self._latest: dict[str, tuple[Hashable, Proposal]] = {}

    def take(self, name: str, model: ReplicaModel, now_s: float) -> None:
        """A replica has reported; only `fluid` plans with what replicas share.

        Raises:
            ValueError: it has reported what no engine can; what was known of it stays.
        """
        if model.configured.policy == "fluid":
            self._pool.take(name, model.digest(), now_s)

    def keep_only(self, names: Collection[str]) -> None:
        """Replicas of other names are gone."""
        self._pool.keep_only(names)
        self._latest = {name: one for name, one in self._latest.items() if name in names}

    def settle(self, now_s: float) -> None:
        """Compare what all have reported; before plans are asked for."""
        self._pool.settle(now_s)
        self._plans.clear()

    def propose(self, name: str, model: ReplicaModel) -> Proposal:
        """The thresholds for a replica, by what it knows with its siblings; by its own estimates where it has none."""
        model.shared = self._pool.estimates(name, model.least_outputs) if model.configured.policy == "fluid" else None
        if model.shared is None:
            self._latest.pop(name, None)
            return model.propose()
        capacity = model.limits.kv_capacity_tokens
        key = (model.shared.same_as, model.plans_for, round(math.log(capacity) / _KV_GRID))
        made_for, proposal = self._plans.get(key, (math.inf, None))
        if proposal is None or made_for > capacity:
            plans_for, latest = self._latest.get(name, (None, None))
            if len(self._plans) >= _MOST_PLANS and latest is not None and plans_for == model.plans_for:
                return latest
            proposal = model.propose()
            self._plans[key] = capacity, proposal
        self._latest[name] = model.plans_for, proposal
        return proposal

    @property
    def deviations(self) -> dict[str, Deviation]:
        """The replicas of another speed than their siblings."""
        return self._pool.deviations


def in_turn(names: Iterable[str], passes: int) -> list[str]:
    """The names in order, another one first in every pass, so that none always comes too late for a plan."""
    ordered = sorted(names)
    first = _MOST_PLANS * passes % len(ordered) if ordered else 0
    return ordered[first:] + ordered[:first]

