"""Token buckets of keys: what a minute allows, when to come again, and shares among ingresses."""

from __future__ import annotations

import pytest

from router.key_usage import KeyUsage
from router.limits import KeyLimits, Limits
from router.refusal import Refusal


def usage_at(now: list[float], ingresses: int = 1) -> KeyUsage:
    usage = KeyUsage(lambda: now[0])
    usage.ingresses = ingresses
    return usage


def taken(usage: KeyUsage, limits: KeyLimits, tokens: int = 1) -> int | None:
    """None: allowed; else the seconds of Retry-After."""
    try:
        usage.take("k", limits, tokens, "r")
    except Refusal as refusal:
        assert refusal.status == 429
        return refusal.retry_after_s
    return None


@pytest.mark.parametrize(("ingresses", "allowed"), [(1, 60), (3, 20)])
def test_a_minute_s_worth_at_once_and_then_at_the_rate(ingresses: int, allowed: int) -> None:
    now = [50.0]
    usage, limits = usage_at(now, ingresses), KeyLimits(requests_per_minute=60)
    assert [taken(usage, limits) for _ in range(allowed)] == [None] * allowed
    retry_s = taken(usage, limits)
    assert retry_s is not None and retry_s >= 1
    now[0] += ingresses
    assert taken(usage, limits) is None and taken(usage, limits) is not None


def test_one_request_larger_than_a_minute_waits_for_a_full_bucket_and_is_paid_off() -> None:
    now = [0.0]
    usage, limits = usage_at(now), KeyLimits(tokens_per_minute=100)
    assert taken(usage, limits, 250) is None
    retry_s = taken(usage, limits, 1)
    assert retry_s is not None and retry_s >= 36, "at most a minute is told"
    now[0] += 151 * 0.6
    assert taken(usage, limits, 1) is None
    usage.give_back("k", 1)
    assert taken(usage, limits, 1) is None


def test_a_refused_request_costs_nothing() -> None:
    now = [0.0]
    usage = usage_at(now)
    assert taken(usage, KeyLimits(requests_per_minute=1, tokens_per_minute=10), 10) is None
    for _ in range(5):
        assert taken(usage, KeyLimits(requests_per_minute=1000, tokens_per_minute=10), 5) is not None
    assert taken(usage, KeyLimits(requests_per_minute=2)) is None


def test_a_key_has_the_general_limits_where_it_has_none_of_its_own() -> None:
    keys = {"a": {"requests_per_minute": 1}, "b": {"tokens_per_minute": None, "concurrent_requests": 1024}, "c": {}}
    written = Limits.model_validate({"tokens_per_minute": 7, "concurrent_requests": 3, "keys": keys})
    for limits in (written, Limits.model_validate(written.model_dump(mode="json", exclude_defaults=True))):
        a, b, c, other = (limits.of_key(name) for name in ("a", "b", "c", "x"))
        assert (a.requests_per_minute, a.tokens_per_minute, a.concurrent_requests) == (1, 7, 3)
        assert (b.requests_per_minute, b.tokens_per_minute, b.concurrent_requests) == (None, None, 1024)
        assert (c.tokens_per_minute, other.tokens_per_minute) == (7, 7)
