"""Which replicas a request may go to after failures."""

from __future__ import annotations

from router.rotation import OUT_FOR_S, Rotation


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def offered(rotation: Rotation, request_id: str = "r") -> list[str]:
    return rotation.offered(["a", "b", "c"], str, request_id)


def test_a_replica_that_failed_gets_nothing_until_it_expires() -> None:
    clock = Clock()
    rotation = Rotation(clock)
    rotation.take_out("a")
    assert offered(rotation) == ["b", "c"]
    clock.now_s = OUT_FOR_S - 0.1
    assert offered(rotation) == ["b", "c"] and rotation.out() == {"a"}
    clock.now_s = OUT_FOR_S
    assert offered(rotation) == ["a", "b", "c"] and rotation.out() == set()


def test_failed_replicas_stay_out_though_there_is_no_other() -> None:
    rotation = Rotation(Clock())
    for name in "abc":
        rotation.take_out(name)
    assert offered(rotation) == []


def test_a_doubted_replica_is_the_last_resort() -> None:
    clock = Clock()
    rotation = Rotation(clock)
    rotation.doubt("a")
    assert offered(rotation) == ["b", "c"]
    rotation.take_out("b")
    rotation.take_out("c")
    assert offered(rotation) == ["a"]


def test_a_request_goes_elsewhere_than_before_if_it_can() -> None:
    rotation = Rotation(Clock())
    with rotation.following("r"):
        rotation.routed("r", "a", lambda: None)
        rotation.try_again("r")
        assert offered(rotation) == ["b", "c"]
        assert offered(rotation, "another") == ["a", "b", "c"]
        assert rotation.offered(["a"], str, "r") == ["a"]
    assert offered(rotation) == ["a", "b", "c"]


def test_order_matters_only_while_a_request_is_sent_once_more() -> None:
    rotation = Rotation(Clock())
    with rotation.following("r") as trail:
        rotation.routed("r", "a", lambda: None)
        assert (trail.replica, rotation.tries_again) == ("a", False)
        rotation.try_again("r")
        assert (trail.replica, trail.tried, rotation.tries_again) == (None, {"a"}, True)
        rotation.routed("r", "b", lambda: None)
        assert (trail.replica, rotation.tries_again) == ("b", False)
        rotation.try_again("r")
    assert not rotation.tries_again, "a request that ended while it was sent"


def test_requests_of_others_are_not_followed() -> None:
    rotation = Rotation(Clock())
    rotation.routed("unknown", "a", lambda: None)
    assert offered(rotation, "unknown") == ["a", "b", "c"]
