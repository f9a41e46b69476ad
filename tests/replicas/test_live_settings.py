"""How a replica follows the settings of its model, and what an operator's change of them does."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_store import FakeStore

from replicas.live_settings import SettingsFollower, in_force, kept_change, store_key
from scheduler.engine.settings_in_force import SettingsInForce
from scheduler.messages import Ack, Configure
from scheduler.policies import make_policy
from scheduler.settings import SchedulerSettings
from scheduler.support import EngineSetup
from scheduler.thresholds import EngineLimits
from scheduler.wire import answer_of, read_question

LIMITS = EngineLimits(
    kv_capacity_tokens=1600, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=1024
)
FIRST = {"targets": {"tpot_s": 0.5}, "controller": {"profile": "a100-llama2-7b-paper"}, "drain_s": 9.0}
SECOND = FIRST | {"targets": {"tpot_s": 0.05}}


class Engines:
    """Two ranks that take settings by the engine's own rules; `silent` ones do not answer."""

    def __init__(self) -> None:
        self.asked = 0
        self.silent: set[int] = set()
        self.ranks = [
            SettingsInForce(SchedulerSettings(), LIMITS, lambda: 0.0, EngineSetup(), make_policy) for _ in range(2)
        ]

    async def ask(self, rank: int, question: bytes) -> bytes:
        self.asked += 1
        if rank in self.silent:
            return answer_of(Ack.without_version("no answer"))
        asked = read_question(question)
        assert isinstance(asked, Configure)
        return answer_of(self.ranks[rank].configure(asked))

    @property
    def tpots(self) -> list[float | None]:
        return [rank.settings.targets.tpot_s for rank in self.ranks]


@pytest.fixture
def engines() -> Engines:
    return Engines()


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


def run(engines: Engines, store: FakeStore, *steps: Any) -> SettingsFollower:
    """Settings that are deployed one after the other; a callable changes something and lets the follower look."""

    async def main() -> SettingsFollower:
        follower = SettingsFollower("m", 2, engines.ask, store)
        for step in steps:
            if callable(step):
                step()
                await follower.look()
            else:
                await follower.deployed(step)
        follower.close()
        return follower

    return asyncio.run(main())


def changed(store: FakeStore, deployed: dict[str, Any], settings: dict[str, Any]) -> None:
    store.put(store_key("m"), kept_change(deployed, settings, by="anna"))


def test_deployed_settings_reach_every_rank_and_are_asked_once(engines: Engines, store: FakeStore) -> None:
    run(engines, store, FIRST, lambda: None)
    assert engines.tpots == [0.5, 0.5] and engines.asked == 2
    run(engines, store, FIRST, SECOND)
    assert engines.tpots == [0.05, 0.05]


def test_a_rank_that_did_not_answer_is_asked_again(engines: Engines, store: FakeStore) -> None:
    engines.silent = {1}
    run(engines, store, FIRST, engines.silent.clear)
    assert engines.tpots == [0.5, 0.5]


def test_an_operator_s_change_holds_until_other_settings_are_deployed(engines: Engines, store: FakeStore) -> None:
    follower = run(engines, store, FIRST, lambda: changed(store, FIRST, SECOND))
    assert engines.tpots == [0.05, 0.05] and follower.settings == SECOND
    new_replica = Engines()
    run(new_replica, store, FIRST)
    assert new_replica.tpots == [0.05, 0.05], "a replica that starts later has it too"
    third = FIRST | {"targets": {"tpot_s": 1.0}}
    run(new_replica, store, FIRST, third)
    assert new_replica.tpots == [1.0, 1.0]


def test_a_change_that_is_taken_back_leaves_what_was_deployed(engines: Engines, store: FakeStore) -> None:
    run(engines, store, FIRST, lambda: changed(store, FIRST, SECOND), lambda: store.delete(store_key("m")))
    assert engines.tpots == [0.5, 0.5]


def test_without_the_store_what_was_known_holds(engines: Engines, store: FakeStore) -> None:
    run(engines, store, FIRST, lambda: changed(store, FIRST, SECOND), lambda: setattr(store, "fails", True))
    assert engines.tpots == [0.05, 0.05]


def test_settings_that_an_engine_refuses_are_said_once(
    engines: Engines, store: FakeStore, caplog: pytest.LogCaptureFixture
) -> None:
    run(engines, store, FIRST, FIRST | {"thresholds": {"max_running": 65}}, lambda: None)
    assert engines.tpots == [0.5, 0.5]
    assert len([record for record in caplog.records if "max_running = 65" in record.getMessage()]) == 2, "once a rank"


@pytest.mark.parametrize("kept", [None, {}, 3, {"instead_of": "x", "settings": SECOND}, {"instead_of": "x"}])
def test_what_is_kept_of_other_settings_does_not_count(kept: object) -> None:
    assert in_force(FIRST, kept) is FIRST
