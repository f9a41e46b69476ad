"""The engines of one replica: one for each data-parallel rank. Their names and addresses.

With `data_parallel_size` above 1 vLLM starts that many engine-core processes behind one AsyncLLM, which spreads the
requests over them. Each has a scheduler, a control channel and thresholds of its own, and is tuned and shown by itself,
as `REPLICA#RANK`; a replica of one engine goes by its replica's name alone. No Ray in here.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

_MARK = "#"  # never part of a Ray replica id


class EngineAddress(NamedTuple):
    """One engine: its replica's actor, and its rank there."""

    actor_name: str
    rank: int = 0


def engine_addresses(replicas: Mapping[str, str], ranks: int) -> dict[str, EngineAddress]:
    """The engines by name, of replicas given as actor name by replica id, in the same order."""
    return {
        engine_name(replica, rank, ranks): EngineAddress(actor_name, rank)
        for replica, actor_name in replicas.items() for rank in range(ranks)
    }


def engine_name(replica: str, rank: int, ranks: int) -> str:
    """The name of one engine of a replica."""
    return replica if ranks == 1 else f"{replica}{_MARK}{rank}"


def replica_of(engine: str) -> str:
    """The replica to which an engine belongs."""
    return engine.partition(_MARK)[0]


def named_by(engines: Iterable[str], asked: str | None) -> list[str]:
    """The engines that a name means: one engine, all of a replica, or all (None). Empty when there is none."""
    return [engine for engine in engines if asked in (None, engine, replica_of(engine))]
