"""The engines of the replicas: their names and addresses. No Ray in here.

With `data_parallel_size` above 1 vLLM starts that many engine-core processes behind one AsyncLLM, which spreads the
requests over them. Each has a scheduler, a control channel and thresholds of its own, and is tuned and shown by itself,
as `REPLICA#RANK`; a replica of one engine goes by its replica's name alone.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

_MARK = "#"  # never part of a Ray replica id


class ServedModel(NamedTuple):
    """A model of the application: the name clients use, and the engines in each of its replicas (data parallel)."""

    model_id: str
    ranks: int = 1


class EngineAddress(NamedTuple):
    """One engine: its replica's actor, its rank there, its model, and the model's deployment."""

    actor_name: str
    rank: int = 0
    model_id: str = ""
    deployment: str = ""


def engine_name(replica: str, rank: int, ranks: int) -> str:
    """The name of one engine of a replica."""
    return replica if ranks == 1 else f"{replica}{_MARK}{rank}"


def engines_in(replica: str, actor_name: str, deployment: str, model: ServedModel) -> dict[str, EngineAddress]:
    """The engines of one replica by name."""
    return {
        engine_name(replica, rank, model.ranks): EngineAddress(actor_name, rank, model.model_id, deployment)
        for rank in range(model.ranks)
    }


def replica_of(engine: str) -> str:
    """The replica to which an engine belongs."""
    return engine.partition(_MARK)[0]


def named_by(engines: Iterable[str], asked: str | None) -> list[str]:
    """The engines that a name means: one engine, all of a replica, or all (None). Empty when there is none."""
    return [engine for engine in engines if asked in (None, engine, replica_of(engine))]
