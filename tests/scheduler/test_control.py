"""Which thresholds are in force: versions, pins, refusals, validity."""

import itertools
import threading

import pytest

from scheduler.control import ThresholdsInForce
from scheduler.messages import Apply
from scheduler.thresholds import EngineLimits, InvalidThresholds, SegmentThreshold, Thresholds, TypeThreshold

LIMITS = EngineLimits(
    kv_capacity_tokens=1600, block_tokens=16, max_num_seqs=64, max_num_batched_tokens=512, max_model_len=1024
)
CONFIGURED = Thresholds(policy="fcfs", max_in_service=32)


class Clock:
    now_s = 0.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def in_force(clock):
    return ThresholdsInForce(CONFIGURED, LIMITS, clock)


def _wait(version, n=4, **fields):
    return Thresholds(version=version, policy="wait", types=(TypeThreshold(name="all", n=n),), **fields)


def test_configured_thresholds_are_in_force_at_first(in_force):
    current = in_force.current()
    assert current.thresholds == CONFIGURED and current.from_config and current.policy.name == "fcfs"
    assert current.lapses_at_s is None


def test_newer_thresholds_take_over_with_their_policy(in_force):
    ack = in_force.offer(Apply(thresholds=_wait(1, reason="load")))
    assert ack.accepted and ack.version_in_force == 1 and ack.reason == "load" and ack.code == ""
    current = in_force.current()
    assert current.thresholds.version == 1 and current.policy.name == "wait" and not current.from_config


@pytest.mark.parametrize("version", [4, 5])
def test_older_or_equal_version_is_stale(in_force, version):
    in_force.offer(Apply(thresholds=_wait(5)))
    before = in_force.current()
    ack = in_force.offer(Apply(thresholds=_wait(version, n=8)))
    assert (ack.accepted, ack.code, ack.version_in_force) == (False, "stale", 5)
    assert f"version {version}" in ack.reason and "version 5" in ack.reason
    assert in_force.current() is before


def test_operator_cannot_go_back_in_versions_either(in_force):
    in_force.offer(Apply(thresholds=_wait(5)))
    assert in_force.offer(Apply(thresholds=_wait(5, n=8), automatic=False)).code == "stale"


def test_version_zero_means_one_more(in_force):
    in_force.offer(Apply(thresholds=_wait(41)))
    assert in_force.offer(Apply(thresholds=_wait(0, n=8))).version_in_force == 42
    assert in_force.current().thresholds == _wait(42, n=8)


def test_pin_refuses_the_controller_and_takes_the_operator(in_force):
    in_force.offer(Apply(thresholds=_wait(1, pinned=True), automatic=False))
    refused = in_force.offer(Apply(thresholds=_wait(2, n=8), automatic=True))
    assert (refused.accepted, refused.code, refused.version_in_force) == (False, "pinned", 1)
    assert "pinned" in refused.reason
    assert in_force.current().thresholds == _wait(1, pinned=True)

    assert in_force.offer(Apply(thresholds=_wait(2, n=8), automatic=False)).accepted, "the operator lifts the pin"
    assert in_force.offer(Apply(thresholds=_wait(3), automatic=True)).accepted


def test_thresholds_that_do_not_fit_change_nothing(in_force):
    in_force.offer(Apply(thresholds=_wait(1)))
    before = in_force.current()
    ack = in_force.offer(Apply(thresholds=_wait(2, n=65)))
    assert (ack.accepted, ack.code, ack.version_in_force) == (False, "invalid", 1)
    assert "types[0].n = 65" in ack.reason
    assert in_force.current() is before
    assert in_force.offer(Apply(thresholds=_wait(2))).accepted, "the refused version was not used up"


def test_configured_thresholds_must_fit(clock):
    with pytest.raises(InvalidThresholds, match="max_in_service = 65"):
        ThresholdsInForce(Thresholds(max_in_service=65), LIMITS, clock)


def test_strict_mode_is_refused_unless_allowed(clock):
    in_force = ThresholdsInForce(CONFIGURED, LIMITS, clock)
    ack = in_force.offer(Apply(thresholds=_wait(1, mode="strict"), automatic=False))
    assert ack.code == "invalid" and "mode" in ack.reason and "serving" in ack.reason
    with pytest.raises(InvalidThresholds, match="mode"):
        ThresholdsInForce(_wait(0, mode="strict"), LIMITS, clock)
    allowed = ThresholdsInForce(CONFIGURED, LIMITS, clock, allow_strict=True)
    assert allowed.offer(Apply(thresholds=_wait(1, mode="strict"))).accepted


def test_same_rule_keeps_the_policy_object_and_its_memory(in_force):
    segments = (SegmentThreshold(end_output_tokens=8, total=4), SegmentThreshold(end_output_tokens=64, total=2))
    in_force.offer(Apply(thresholds=Thresholds(version=1, policy="nested_wait", segments=segments)))
    policy = in_force.current().policy
    renewed = Thresholds(version=2, policy="nested_wait", segments=segments, reason="again", valid_for_s=9.0)
    in_force.offer(Apply(thresholds=renewed))
    assert in_force.current().policy is policy and in_force.current().thresholds == renewed
    in_force.offer(Apply(thresholds=Thresholds(version=3, policy="nested_wait", segments=segments, max_hold_s=1.0)))
    assert in_force.current().policy is not policy


def test_unrenewed_thresholds_lapse_to_the_configured_ones(in_force, clock):
    clock.now_s = 100.0
    in_force.offer(Apply(thresholds=_wait(7, valid_for_s=10.0)))
    clock.now_s = 109.9
    assert in_force.current().thresholds.policy == "wait"
    clock.now_s = 110.0
    current = in_force.current()
    assert current.from_config and current.policy.name == "fcfs" and current.lapses_at_s is None
    assert current.thresholds == CONFIGURED.with_version(7), "versions never go back"
    assert in_force.offer(Apply(thresholds=_wait(7, valid_for_s=10.0))).code == "stale", "a late duplicate"
    assert in_force.offer(Apply(thresholds=_wait(8))).accepted


def test_lapse_is_noticed_by_an_offer_too(in_force, clock):
    in_force.offer(Apply(thresholds=_wait(7, valid_for_s=10.0, pinned=True), automatic=False))
    clock.now_s = 11.0
    assert in_force.offer(Apply(thresholds=_wait(8))).accepted, "a lapsed pin pins nothing"


def test_renewal_extends(in_force, clock):
    in_force.offer(Apply(thresholds=_wait(1, valid_for_s=10.0)))
    clock.now_s = 9.0
    in_force.offer(Apply(thresholds=_wait(2, valid_for_s=10.0)))
    clock.now_s = 18.9
    assert in_force.current().thresholds.version == 2 and not in_force.current().from_config
    clock.now_s = 19.0
    assert in_force.current().from_config


def test_reading_takes_no_lock_while_nothing_lapses(in_force, clock):
    in_force.offer(Apply(thresholds=_wait(1, valid_for_s=10.0)))
    with in_force._lock:  # somebody offers; the engine's loop must not wait for it (it would deadlock here)
        assert in_force.current().thresholds.version == 1


def test_of_equal_versions_offered_at_once_exactly_one_wins(in_force):
    start = threading.Barrier(8)
    acks = []

    def offer(n):
        start.wait()
        for version in range(1, 51):
            acks.append((version, n, in_force.offer(Apply(thresholds=_wait(version, n=n)))))  # noqa: PERF401

    threads = [threading.Thread(target=offer, args=(n,)) for n in range(1, 9)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()

    taken = [(version, n) for version, n, ack in acks if ack.accepted]
    assert [version for version, _ in sorted(taken)] == list(range(1, 51)), "each version is taken once"
    assert all(ack.code == "stale" for _, _, ack in acks if not ack.accepted)
    last = in_force.current().thresholds
    assert (last.version, last.types[0].n) == max(taken)


def test_acks_name_growing_versions(in_force):
    versions = [in_force.offer(Apply(thresholds=_wait(0, n=n))).version_in_force for n in range(1, 6)]
    assert all(later > earlier for earlier, later in itertools.pairwise(versions))
