"""Settings of one engine, read from vLLM's `additional_config`."""

import pytest

from scheduler.settings import SchedulerSettings
from scheduler.thresholds import Thresholds


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"threshold": {}}, r"headrace\.threshold = \{\}.*keys are thresholds, profile, .*allow_strict"),
        ({"allow_strict": "perhaps"}, r"headrace\.allow_strict = 'perhaps'"),
        ({"channel": 5}, r"headrace\.channel = 5"),
        ({"thresholds": {"max_hold_s": -1.0}}, r"thresholds\.max_hold_s = -1\.0"),
        ({"thresholds": {"nonsense": 1}}, r"thresholds\.nonsense"),
        ({"thresholds": 3}, r"thresholds\.\(body\) = 3"),
        ({"controller": {"profile": "no-such"}}, r"headrace\.controller\.profile = 'no-such': .*known profiles"),
        ({"controller": {"period_s": 0}}, r"headrace\.controller\.period_s = 0"),
        ([], r"additional_config\.headrace = \[\].*an object"),
        (None, r"additional_config\.headrace = None"),
    ],
    ids=str,
)
def test_settings_errors_name_the_key(settings, says):
    with pytest.raises(ValueError, match=says):
        SchedulerSettings.from_additional_config({"headrace": settings})


def test_settings_default_to_plain_fcfs():
    for nothing in (None, {}, {"other": 1}, {"headrace": {}}):
        settings = SchedulerSettings.from_additional_config(nothing)
        assert settings.thresholds == Thresholds() and settings.channel is None and not settings.allow_strict


@pytest.mark.parametrize(
    ("settings", "has_one", "is_tuned"),
    [
        ({}, True, True),
        ({"targets": {"ttft_s": 3.0}, "thresholds": {"policy": "fcfs"}}, True, True),
        ({"thresholds": {"policy": "fcfs"}}, False, True),
        ({"thresholds": {"policy": "nested_wait"}}, True, True),
        ({"channel": "ipc:///tmp/x", "targets": {"ttft_s": 3.0}}, False, True),
        ({"controller": None}, False, True),
        ({"controller": {"enabled": False}}, False, False),
    ],
    ids=str,
)
def test_an_engine_has_its_own_controller_where_no_replica_owns_it(settings, has_one, is_tuned):
    found = SchedulerSettings.from_additional_config({"headrace": settings})
    assert (found.has_own_controller, found.is_tuned_somewhere) == (has_one, is_tuned)


def test_the_first_profile_is_the_engine_s_or_its_controller_s():
    settings = {"profile": "cpu-smollm2", "controller": {"profile": "a100-llama2-7b"}}
    for given, expected in (
        (settings, "cpu-smollm2"), ({"controller": settings["controller"]}, "a100-llama2-7b"), ({}, None),
        ({"controller": None}, None),
    ):
        assert SchedulerSettings.from_additional_config({"headrace": given}).first_profile == expected


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"controller": {"overflow_probability": 0.03}}, 0.03),
        ({"controller": {"overflow_probability": 0.03}, "overflow_probability": 0.02}, 0.02),
        ({"controller": {"overflow_probability": 0.03}, "channel": "ipc:///tmp/x"}, 0.01),
        ({"controller": None}, 0.01),
    ],
    ids=str,
)
def test_an_engine_s_own_controller_says_what_is_in_force_where_the_engine_does_not(settings, expected):
    live = SchedulerSettings.from_additional_config({"headrace": settings}).live
    assert (live.overflow_probability, live.profile) == (expected, None)
    controller = (settings["controller"] or {}) | {"profile": "cpu-smollm2"}
    with_profile = SchedulerSettings.from_additional_config({"headrace": settings | {"controller": controller}})
    assert with_profile.live.profile == "cpu-smollm2"
