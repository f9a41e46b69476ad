"""The active thresholds: versions, pins, rejections, validity."""

import itertools
import threading

import pytest

from scheduler.engine.active_thresholds import ActiveThresholds
from scheduler.messages import Apply
from scheduler.thresholds import EngineLimits, InvalidThresholds, SegmentThreshold, Thresholds, TypeThreshold

LIMITS = EngineLimits(
    kv_capacity_tokens=1600, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=1024
)
CONFIGURED = Thresholds(policy="fcfs", max_running=32)


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def active(clock):
    return ActiveThresholds(CONFIGURED, LIMITS, clock)


def _wait(version, n=4, **fields):
    return Thresholds(version=version, policy="wait", types=(TypeThreshold(name="all", n=n),), **fields)


def test_configured_thresholds_are_active_at_first(active):
    current = active.current()
    assert current.thresholds == CONFIGURED and current.from_config and current.policy.name == "fcfs"
    assert current.lapses_at_s is None


def test_newer_thresholds_take_over_with_their_policy(active):
    ack = active.offer(Apply(thresholds=_wait(1, reason="load")))
    assert ack.accepted and ack.active_version == 1 and ack.reason == "load" and ack.code == ""
    current = active.current()
    assert current.thresholds.version == 1 and current.policy.name == "wait" and not current.from_config


@pytest.mark.parametrize("version", [4, 5])
def test_older_or_equal_version_is_stale(active, version):
    active.offer(Apply(thresholds=_wait(5)))
    before = active.current()
    ack = active.offer(Apply(thresholds=_wait(version, n=8)))
    assert (ack.accepted, ack.code, ack.active_version) == (False, "stale", 5)
    assert f"version {version}" in ack.reason and "version 5" in ack.reason
    assert active.current() is before


def test_operator_cannot_go_back_in_versions_either(active):
    active.offer(Apply(thresholds=_wait(5)))
    assert active.offer(Apply(thresholds=_wait(5, n=8), automatic=False)).code == "stale"


def test_version_zero_means_one_more(active):
    active.offer(Apply(thresholds=_wait(41)))
    assert active.offer(Apply(thresholds=_wait(0, n=8))).active_version == 42
    assert active.current().thresholds == _wait(42, n=8)


def test_pin_rejects_the_controller_and_accepts_the_operator(active):
    active.offer(Apply(thresholds=_wait(1, pinned=True), automatic=False))
    rejected = active.offer(Apply(thresholds=_wait(2, n=8), automatic=True))
    assert (rejected.accepted, rejected.code, rejected.active_version) == (False, "pinned", 1)
    assert "pinned" in rejected.reason
    assert active.current().thresholds == _wait(1, pinned=True)

    assert active.offer(Apply(thresholds=_wait(2, n=8), automatic=False)).accepted, "the operator lifts the pin"
    assert active.offer(Apply(thresholds=_wait(3), automatic=True)).accepted


def test_thresholds_that_do_not_fit_change_nothing(active):
    active.offer(Apply(thresholds=_wait(1)))
    before = active.current()
    ack = active.offer(Apply(thresholds=_wait(2, n=65)))
    assert (ack.accepted, ack.code, ack.active_version) == (False, "invalid", 1)
    assert "types[0].n = 65" in ack.reason
    assert active.current() is before
    assert active.offer(Apply(thresholds=_wait(2))).accepted, "the rejected version was not used up"


def test_configured_thresholds_must_fit(clock):
    with pytest.raises(InvalidThresholds, match="max_running = 65"):
        ActiveThresholds(Thresholds(max_running=65), LIMITS, clock)


def test_strict_mode_is_rejected_unless_allowed(clock):
    active = ActiveThresholds(CONFIGURED, LIMITS, clock)
    ack = active.offer(Apply(thresholds=_wait(1, mode="strict"), automatic=False))
    assert ack.code == "invalid" and "mode" in ack.reason and "serving" in ack.reason
    with pytest.raises(InvalidThresholds, match="mode"):
        ActiveThresholds(_wait(0, mode="strict"), LIMITS, clock)
    allowed = ActiveThresholds(CONFIGURED, LIMITS, clock, allow_strict=True)
    assert allowed.offer(Apply(thresholds=_wait(1, mode="strict"))).accepted


def test_same_rule_keeps_the_policy_object_and_its_memory(active):
    segments = (SegmentThreshold(end_output_tokens=8, total=4), SegmentThreshold(end_output_tokens=64, total=2))
    active.offer(Apply(thresholds=Thresholds(version=1, policy="nested_wait", segments=segments)))
    policy = active.current().policy
    renewed = Thresholds(version=2, policy="nested_wait", segments=segments, reason="again", valid_for_s=9.0)
    active.offer(Apply(thresholds=renewed))
    assert active.current().policy is policy and active.current().thresholds == renewed
    active.offer(Apply(thresholds=Thresholds(version=3, policy="nested_wait", segments=segments, max_hold_s=1.0)))
    assert active.current().policy is not policy


def test_unrenewed_thresholds_lapse_to_the_configured_ones(active, clock):
    clock.now_s = 100.0
    active.offer(Apply(thresholds=_wait(7, valid_for_s=10.0)))
    clock.now_s = 109.9
    assert active.current().thresholds.policy == "wait"
    clock.now_s = 110.0
    current = active.current()
    assert current.from_config and current.policy.name == "fcfs" and current.lapses_at_s is None
    assert current.thresholds == CONFIGURED.with_version(7), "versions never go back"
    assert active.offer(Apply(thresholds=_wait(7, valid_for_s=10.0))).code == "stale", "a late duplicate"
    assert active.offer(Apply(thresholds=_wait(8))).accepted


def test_lapse_is_noticed_by_an_offer_too(active, clock):
    active.offer(Apply(thresholds=_wait(7, valid_for_s=10.0, pinned=True), automatic=False))
    clock.now_s = 11.0
    assert active.offer(Apply(thresholds=_wait(8))).accepted, "a lapsed pin pins nothing"


def test_renewal_extends(active, clock):
    active.offer(Apply(thresholds=_wait(1, valid_for_s=10.0)))
    clock.now_s = 9.0
    active.offer(Apply(thresholds=_wait(2, valid_for_s=10.0)))
    clock.now_s = 18.9
    assert active.current().thresholds.version == 2 and not active.current().from_config
    clock.now_s = 19.0
    assert active.current().from_config


def test_reading_takes_no_lock_while_nothing_lapses(active, clock):
    active.offer(Apply(thresholds=_wait(1, valid_for_s=10.0)))
    with active._lock:  # an offer is under way; the engine's loop must not wait for it (it would deadlock here)
        assert active.current().thresholds.version == 1


def test_of_equal_versions_offered_at_once_exactly_one_wins(active):
    start = threading.Barrier(8)
    acks = []

    def offer(n):
        start.wait()
        for version in range(1, 51):
            acks.append((version, n, active.offer(Apply(thresholds=_wait(version, n=n)))))  # noqa: PERF401

    threads = [threading.Thread(target=offer, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    taken = [(version, n) for version, n, ack in acks if ack.accepted]
    assert [version for version, _ in sorted(taken)] == list(range(1, 51)), "each version is taken once"
    assert all(ack.code == "stale" for _, _, ack in acks if not ack.accepted)
    last = active.current().thresholds
    assert (last.version, last.types[0].n) == max(taken)


def test_acks_name_growing_versions(active):
    versions = [active.offer(Apply(thresholds=_wait(0, n=n))).active_version for n in range(1, 6)]
    assert all(later > earlier for earlier, later in itertools.pairwise(versions))
