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
