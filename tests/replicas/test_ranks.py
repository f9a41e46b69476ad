"""How the engines of a replica are named and found."""

from __future__ import annotations

from typing import Any

import pytest

from replicas.ranks import EngineAddress, engine_addresses, named_by, replica_of
from scheduler.support import ranks_in

TWO = engine_addresses({"a": "actor-a", "b": "actor-b"}, 2)


def test_a_replica_of_one_engine_goes_by_its_own_name() -> None:
    assert engine_addresses({"a": "actor-a"}, 1) == {"a": EngineAddress("actor-a", 0)}


def test_each_data_parallel_rank_is_an_engine_of_its_own() -> None:
    assert TWO == {
        "a#0": ("actor-a", 0), "a#1": ("actor-a", 1), "b#0": ("actor-b", 0), "b#1": ("actor-b", 1),
    }
    assert {replica_of(name) for name in TWO} == {"a", "b"}


@pytest.mark.parametrize(
    ("asked", "meant"),
    [("a#1", ["a#1"]), ("a", ["a#0", "a#1"]), (None, ["a#0", "a#1", "b#0", "b#1"]), ("c", []), ("a#2", [])],
)
def test_a_name_means_one_engine_or_all_of_a_replica(asked: str | None, meant: list[str]) -> None:
    assert named_by(TWO, asked) == meant


@pytest.mark.parametrize(
    ("engine_args", "ranks"),
    [({}, 1), ({"data_parallel_size": None}, 1), ({"data_parallel_size": 1}, 1), ({"data_parallel_size": 4}, 4)],
)
def test_the_engine_arguments_tell_how_many_there_are(engine_args: dict[str, Any], ranks: int) -> None:
    assert ranks_in(engine_args) == ranks
