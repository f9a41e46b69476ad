"""Settings as one ingress shows and changes them."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import pytest
from fake_store import FakeStore

from cluster.live import SettingsJudge
from router.admin import AdminError
from router.live_settings import SettingsOffice, SettingsUpdate, changes, settings_event

FIRST = {"targets": {"tpot_s": 0.5}, "controller": {"profile": "a100-llama2-7b-paper"}}
AUTHOR = {"by": "anna", "key": "operator key", "at_unix_s": 7.0, "reason": "noon"}


class Seen:
    def __init__(self, store: FakeStore) -> None:
        self.followed: list[Mapping[str, Any]] = []
        self.office = SettingsOffice(store, SettingsJudge({"m": {}, "n": {}}), self.followed.append)

    def deployed(self, **models: Any) -> None:
        async def main() -> None:
            await self.office.deployed(models)
            assert self.office._task is not None
            self.office._task.cancel()
            self.office._task = None

        asyncio.run(main())

    def put(self, update: dict[str, Any]) -> dict[str, Any]:
        asked = SettingsUpdate.model_validate(update)
        planned = self.office.planned(asked)
        asyncio.run(self.office.keep(asked, AUTHOR))
        return planned


@pytest.fixture
def store() -> FakeStore:
    return FakeStore()


@pytest.fixture
def seen(store: FakeStore) -> Seen:
    seen = Seen(store)
    seen.deployed(m=FIRST, n=FIRST)
    return seen


def test_a_change_merges_fields_and_is_followed_and_shown(seen: Seen) -> None:
    planned = seen.put({"model": "m", "settings": {"targets": {"ttft_s": 3.0}, "controller": {"period_s": 2.0}}})
    assert planned["m"]["targets"] == {"ttft_s": 3.0, "tpot_s": 0.5}
    assert seen.followed[-1]["m"] == planned["m"] and seen.followed[-1]["n"] == FIRST
    shown = seen.office.shown()
    assert shown["m"]["settings"]["controller"]["period_s"] == 2.0 and shown["m"]["changed"] == AUTHOR
    assert shown["n"]["changed"] is None and shown["n"]["settings"]["drain_s"] > 0, "defaults are written out"


def test_another_ingress_and_one_that_starts_later_have_it_too(seen: Seen, store: FakeStore) -> None:
    seen.put({"settings": {"targets": {"tpot_s": 0.3}}})
    other = Seen(store)
    other.deployed(m=FIRST, n=FIRST)
    assert {one["targets"]["tpot_s"] for one in other.office.settings.values()} == {0.3}


def test_changes_at_two_ingresses_within_a_second_are_both_kept(seen: Seen, store: FakeStore) -> None:
    other = Seen(store)
    other.deployed(m=FIRST, n=FIRST)
    seen.put({"model": "m", "settings": {"targets": {"tpot_s": 0.3}}})
    other.put({"model": "m", "settings": {"targets": {"ttft_s": 3.0}}})
    assert other.office.settings["m"]["targets"] == {"ttft_s": 3.0, "tpot_s": 0.3}


def test_changes_that_come_together_are_both_kept(seen: Seen) -> None:
    async def both() -> list[dict[str, Any]]:
        updates = ({"targets": {"tpot_s": 0.3}}, {"targets": {"ttft_s": 3.0}})
        return await asyncio.gather(*(
            seen.office.keep(SettingsUpdate(settings=one, model="m"), AUTHOR) for one in updates
        ))

    assert asyncio.run(both()) == [
        {"m": {"targets.tpot_s": (0.5, 0.3)}}, {"m": {"targets.ttft_s": (None, 3.0)}},
    ]
    assert seen.office.settings["m"]["targets"] == {"ttft_s": 3.0, "tpot_s": 0.3}


def test_other_deployed_settings_end_a_change_for_good(seen: Seen, store: FakeStore) -> None:
    seen.put({"settings": {"targets": {"tpot_s": 0.3}}})
    seen.deployed(m=FIRST | {"drain_s": 5.0}, n=FIRST)
    assert [one["targets"]["tpot_s"] for one in seen.office.settings.values()] == [0.5, 0.3]
    seen.deployed(m=FIRST, n=FIRST)
    assert seen.office.settings["m"] == FIRST, "not revived when the first are deployed again"


def test_null_takes_a_target_away_and_what_changes_nothing_is_no_change(seen: Seen) -> None:
    assert seen.put({"model": "m", "settings": {"targets": {"tpot_s": 0.5}}}) == {}
    seen.put({"model": "m", "settings": {"targets": {"tpot_s": None}}})
    assert seen.office.complete("m")["targets"]["tpot_s"] is None


@pytest.mark.parametrize(
    ("update", "status", "says"),
    [
        ({"model": "x", "settings": {}}, 404, "model = 'x' does not exist; the models are m, n"),
        ({"settings": {"targets": {"tpot_s": -1}}}, 400, "model m: targets.tpot_s"),
        ({"settings": {"targets": {"tpot_s": 1e-9}}}, 400, "below the"),
        ({"settings": {"target": {}}}, 400, "target"),
        ({"settings": {"scheduler": "my.Scheduler"}}, 400, "scheduler is set by a deployment"),
        ({"settings": {"drain_s": 5}}, 400, "drain_s is set by a deployment"),
        ({"settings": {"controller": {"profile": "no such"}}}, 400, "no such"),
        ({"settings": {"thresholds": {"policy": "lifo"}}}, 400, "lifo"),
    ],
    ids=str,
)
def test_what_may_not_be_is_refused_and_changes_nothing(
    seen: Seen, update: dict[str, Any], status: int, says: str
) -> None:
    before = dict(seen.office.settings)
    with pytest.raises(AdminError, match=says.replace("(", r"\(")) as refused:
        seen.office.planned(SettingsUpdate.model_validate(update))
    assert refused.value.status_code == status and seen.office.settings == before


def test_tuning_is_not_turned_on_where_no_controller_runs(store: FakeStore) -> None:
    office = SettingsOffice(store, SettingsJudge({"m": {}}, has_controller=False), lambda _: None)
    office.settings = {"m": {"controller": {"enabled": False}}}
    with pytest.raises(AdminError, match="no controller runs; turn it on there and deploy it"):
        office.planned(SettingsUpdate.model_validate({"settings": {"controller": {"enabled": True}}}))
    assert office.planned(SettingsUpdate.model_validate({"settings": {"controller": {"period_s": 9.0}}}))


def test_a_limit_for_all_is_changed_for_all_models_only(seen: Seen) -> None:
    for limits, name in (({"requests_per_minute": 5}, "requests_per_minute"), ({"keys": {"operator": {}}}, "keys")):
        with pytest.raises(AdminError, match=f"model m: limits.{name} is for all models") as refused:
            seen.put({"model": "m", "settings": {"limits": {"choices": 3, **limits}}})
        assert refused.value.status_code == 400
        planned = seen.put({"settings": {"limits": limits, "max_wait_s": 5.0}})
        assert [planned[model]["limits"].keys() >= limits.keys() for model in "mn"] == [True, True]
    assert seen.put({"model": "m", "settings": {"limits": {"choices": 3}}})["m"]["limits"]["choices"] == 3


def test_limits_of_a_key_that_nobody_has_are_refused(seen: Seen) -> None:
    update = SettingsUpdate(settings={"limits": {"keys": {"free-tire": {}, "operator": {}, "anonymous": {}}}})
    said = "limits.keys.free-tire: no tenant has this name; allowed here: free-tier, operator, anonymous; did you mean"
    with pytest.raises(AdminError, match=f"{said} free-tier") as refused:
        seen.office.planned(update, ["free-tier"])
    assert refused.value.status_code == 400
    assert seen.office.planned(update, ["free-tire"])


def test_changes_name_the_keys_and_an_event_says_them_briefly() -> None:
    changed = changes({"a": {"b": 1, "c": 2}, "d": 3}, {"a": {"b": 1, "c": 4}, "e": 5})
    assert changed == {"a.c": (2, 4), "d": (3, None), "e": (None, 5)}
    event = settings_event("m", changed, AUTHOR)
    assert event["reason"] == "a.c 2 -> 4, d 3 -> None, e None -> 5; noon"
    assert event["new"] == {"a.c": 4, "d": None, "e": 5} and (event["kind"], event["by"]) == ("settings", "anna")
    assert len(settings_event("m", {"x": ("y" * 5000, 1)}, AUTHOR)["reason"]) < 300
