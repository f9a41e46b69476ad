"""How the engines of a replica are named and found."""

from __future__ import annotations

from typing import Any

import pytest

from replicas import served
from replicas.ranks import ServedModel, engines_in, named_by, replica_of
from scheduler.support import ranks_in

MODEL = ServedModel("m", ranks=2)
TWO = engines_in("a", "actor-a", "server:m", MODEL) | engines_in("b", "actor-b", "server:m", MODEL)


def test_a_replica_of_one_engine_goes_by_its_own_name() -> None:
    assert engines_in("a", "actor-a", "server:m", ServedModel("m")) == {"a": ("actor-a", 0, "m", "server:m")}


def test_each_data_parallel_rank_is_an_engine_of_its_own() -> None:
    wanted = {f"{replica}#{rank}": (f"actor-{replica}", rank, "m", "server:m") for replica in "ab" for rank in (0, 1)}
    assert wanted == TWO
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


def test_an_application_s_engines_come_with_their_model_and_those_of_a_deployment_about_to_end_are_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    actors = {
        replica: f"SERVE_REPLICA::headrace#HeadraceServer:{model}#{replica}"
        for replica, model in {"a": "one", "b": "two", "c": "before"}.items()
    }
    monkeypatch.setattr(served, "replica_ids", lambda app_name: actors)
    models = {"HeadraceServer:one": ServedModel("org/one"), "HeadraceServer:two": ServedModel("two", ranks=2)}
    assert {name: engine.model_id for name, engine in served.engines_of("headrace", models).items()} == {
        "a": "org/one", "b#0": "two", "b#1": "two",
    }
