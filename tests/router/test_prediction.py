"""What `POST /admin/predict` accepts, what it asks the controller for, and how it says the answer."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fake_dashboard import PLAN
from fake_store import FakeStore
from pydantic import ValidationError
from synthetic_engine import SyntheticEngine

from cluster.live import SettingsJudge
from router.admin import AdminError
from router.dashboard.prediction import PredictionRequest, in_words, model_of, values_of
from router.live_settings import SettingsOffice
from scheduler.thresholds import Thresholds

SETTINGS = {"targets": {"tpot_s": 0.5}, "controller": {"profile": "a100-llama2-7b-paper"}}
TELEMETRY = {"a": SyntheticEngine(Thresholds(policy="nested_wait", max_running=40)).report(None)}


@pytest.fixture
def office() -> SettingsOffice:
    office = SettingsOffice(FakeStore(), SettingsJudge({"m": {}, "n": {}}), lambda _: None)

    async def main() -> None:
        await office.deployed({"m": SETTINGS, "n": SETTINGS})
        assert office._task is not None
        office._task.cancel()

    asyncio.run(main())
    return office


def values(office: SettingsOffice, **asked: Any) -> dict[str, Any]:
    return values_of(PredictionRequest.model_validate(asked), "m", office, TELEMETRY)


def refusal(office: SettingsOffice, **asked: Any) -> tuple[int, str]:
    with pytest.raises(AdminError) as error:
        values(office, **asked)
    return error.value.status_code, str(error.value)


def test_targets_are_merged_and_checked_as_a_change_of_settings_is(office: SettingsOffice) -> None:
    assert values(office, settings={"targets": {"ttft_s": 3.0}})["targets"] == {
        "ttft_s": 3.0, "tpot_s": 0.5, "latency_s": None
    }
    assert values(office, settings={"targets": {"tpot_s": None}})["targets"]["tpot_s"] is None
    assert values(office, settings={"targets": {"tpot_s": 0.5}})["targets"]["tpot_s"] == 0.5, "no change at all"
    code, said = refusal(office, settings={"targets": {"tpot_s": -1}})
    assert code == 400 and "tpot_s" in said and "model m" in said
    code, said = refusal(office, settings={"drain_s": 3})
    assert code == 400 and "settings.drain_s cannot be predicted; allowed: targets" in said


def test_thresholds_are_checked_as_a_pin_is(office: SettingsOffice) -> None:
    found = values(office, thresholds={"max_running": 8, "token_budget": None})
    assert (found["max_running"], found["token_budget"]) == (8, 2048), "null is the engine's own limit"
    assert values(office, thresholds={"token_budget": 100})["max_running"] == 40, "the active one stays"
    code, said = refusal(office, thresholds={"max_running": 100_000})
    assert code == 400 and "max_num_seqs = 512" in said
    assert refusal(office, thresholds={"max_runing": 3})[0] == 400
    assert refusal(office, thresholds={"max_running": 3}, auto=True)[0] == 400


def test_without_values_the_present_ones_are_planned(office: SettingsOffice) -> None:
    assert values(office) == {"replicas": None, "rate_rps": None, "released": False}
    assert values(office, auto=True, replicas=3, rate_rps=2.5) == {"replicas": 3, "rate_rps": 2.5, "released": True}


@pytest.mark.parametrize("asked", [
    {"replicas": 0}, {"replicas": 10**9}, {"replicas": 1.5}, {"rate_rps": 0}, {"rate_rps": "nan"}, {"unknown": 1},
    {"model": "m" * 500},
])
def test_values_out_of_range_are_no_question(asked: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(asked))):
        PredictionRequest.model_validate(asked)


def test_the_model_must_be_named_where_there_are_several() -> None:
    assert model_of(PredictionRequest(), ["m"]) == "m"
    for asked, status in (({}, 400), ({"model": "x"}, 404)):
        with pytest.raises(AdminError, match="the models are m, n") as error:
            model_of(PredictionRequest.model_validate(asked), ["m", "n"])
        assert error.value.status_code == status


def test_the_prediction_in_words_says_what_moves() -> None:
    now = PLAN
    assert in_words(now, dict(now, capacity_rps=7.2, goodput_rps=7.1, limit="TPOT target")) == (
        "Fewer requests would be in time: 7.1 of the 9.4 requests/s offered (now 8). "
        "Capacity: 7.2 requests/s (now 8.1). Limit: TPOT target (now memory)."
    )
    assert in_words(now, now).startswith("At the present load nothing changes: 8 of the 9.4 requests/s offered.")
    assert in_words(now, dict(now, goodput_rps=9.0)).startswith("More requests would be in time")
    assert in_words(now, dict(now, reason="one request alone takes 9 ms a token")) == (
        "The TPOT target could not be met: one request alone takes 9 ms a token."
    )
    assert in_words(now, dict(now, cold=True)).endswith("Output lengths are still guessed.")
