"""Replicas by fluid slack: the order in which a request is offered to them."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

from replicas.routing_stats import RoutingStats

_Replica = TypeVar("_Replica")


def best_first(
    replicas: Sequence[_Replica], stats: Callable[[_Replica], RoutingStats | None],
    ongoing: Callable[[_Replica], int], shuffle: Callable[[list[_Replica]], None] = random.shuffle,
) -> list[_Replica]:
    """The replicas by fluid slack, most first; replicas without a report come last.

    `ongoing` is the router's own count of a replica's requests, newer than the report. Replicas of equal slack are
    shuffled, so that they share the load.
    """

    def slack(replica: _Replica) -> float:
        reported = stats(replica)
        return reported.slack(ongoing(replica)) if reported else -1.0 - ongoing(replica)

    shuffled = list(replicas)
    shuffle(shuffled)
    return sorted(shuffled, key=slack, reverse=True)
