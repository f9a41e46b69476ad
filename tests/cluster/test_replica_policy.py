"""The policy that Ray Serve's autoscaler asks, as Ray builds it from its import path, and the bounds around it."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from ray.serve._private.autoscaling_state import _resolve_policy_callable
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from cluster.llm_entry import WITHOUT_ENGINE, LLMEntry
from cluster.replica_bounds import POLICY, with_policy
from cluster.replica_policy import WantedReplicasPolicy
from cluster.settings import ModelSettings

BOUNDS = {"min_replicas": 1, "max_replicas": 8}
FLUID = ModelSettings.model_validate({"thresholds": {"policy": "fluid"}})
ENTRY = LLMEntry.model_validate(
    {"model_loading_config": {"model_id": "m"}, "engine_kwargs": {"max_num_seqs": 40}}, context=WITHOUT_ENGINE
)


def context(present: int = 2, requests: float = 10.0, **options: Any) -> AutoscalingContext:
    names = ("deployment_id", "running_replicas", "aggregated_metrics", "raw_metrics")
    config = AutoscalingConfig(**with_policy(BOUNDS, ENTRY, FLUID))
    return AutoscalingContext(**dict.fromkeys(names) | {
        "deployment_name": "HeadraceServer:m", "app_name": "headrace", "current_num_replicas": present,
        "target_num_replicas": present, "total_num_requests": requests, "total_queued_requests": 0.0,
        "capacity_adjusted_min_replicas": 1, "capacity_adjusted_max_replicas": 8, "policy_state": {},
        "last_scale_up_time": None, "last_scale_down_time": None, "current_time": None, "config": config,
    } | options)


class Told:
    """A store that tells what was left there, and when it was read. The first value is an older one."""

    def __init__(self, *values: Any) -> None:
        older = [value | {"look": 0.0} for value in values[:1] if isinstance(value, dict)]
        self.values, self.read = older + list(values), threading.Semaphore(0)
        self.now_s = 0.0

    def __call__(self, app_name: str, deployment: str) -> Any:
        assert (app_name, deployment) == ("headrace", "HeadraceServer:m")
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        self.read.release()
        if isinstance(value, Exception):
            raise value
        return value

    def policy(self) -> WantedReplicasPolicy:
        policy = WantedReplicasPolicy(self, lambda: self.now_s)
        policy(context())
        for _ in range(2 + len(self.values)):
            assert self.read.acquire(timeout=30)  # then the value of the second one has been taken over
        return policy


def wanted(replicas: int, look: float = 1.0, **more: Any) -> dict[str, Any]:
    return {"replicas": replicas, "reason": "many ask", "look": look, "valid_for_s": 30.0} | more


@pytest.mark.parametrize("replicas", [1, 5])
def test_serve_is_told_the_controllers_number(replicas: int) -> None:
    told = Told(wanted(replicas))
    assert told.policy()(context()) == (replicas, {})


def test_ray_builds_it_from_its_path_and_applies_more_and_fewer_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """What Serve's controller does with the option: import, pickle, unpickle, make, wrap with delays and factors."""
    config = AutoscalingConfig(**with_policy(BOUNDS, ENTRY, FLUID))
    policy = _resolve_policy_callable(config.policy)
    assert type(policy).__name__ == "WantedReplicasPolicy"
    board = SimpleNamespace(fresh=lambda now_s: wanted(board.replicas), replicas=5)
    policy._board, policy._keep_reading = board, lambda *_: None
    wrapped = _apply_autoscaling_config(policy)
    assert wrapped(context(present=2))[0] == 5
    board.replicas = 1
    assert wrapped(context(present=5))[0] == 1
    assert wrapped(context(present=5, requests=90.0))[0] == 3, "of 40 slots each: not from under requests"
    board.replicas = 0
    assert wrapped(context(present=1, requests=0.0))[0] == 0
    assert wrapped(context(present=1, requests=0.2))[0] == 1, "not from under a request"
    assert wrapped(context(present=0, requests=1.0))[0] == 1, "Serve's own start of a first one"


@pytest.mark.parametrize("values", [[None], [wanted(1, valid_for_s=-1.0)], [OSError("no store")], ["nonsense"]])
def test_while_nothing_is_said_rays_own_rule_may_add_and_none_is_taken_away(values: list[Any]) -> None:
    policy = Told(*values).policy()
    assert policy(context(present=2, requests=10.0)) == (2, {})
    assert policy(context(present=2, requests=130.0)) == (4, {}), "40 slots each"


def test_the_last_word_counts_for_a_while_and_no_longer() -> None:
    told = Told(wanted(5))
    policy = told.policy()
    told.now_s = 29.0
    assert policy(context())[0] == 5
    told.now_s = 31.0
    assert policy(context())[0] == 2, "the same word, read again, is not new"
    told.values = [wanted(6, look=2.0)]
    assert told.read.acquire(timeout=30) and told.read.acquire(timeout=30) and told.read.acquire(timeout=30)
    assert policy(context())[0] == 6


def test_what_a_store_had_before_anyone_looked_may_be_old() -> None:
    told = Told(wanted(1))
    told.values = [wanted(1)]
    policy = told.policy()
    assert policy(context(present=8)) == (8, {}), "none is taken away for an old word"


def test_too_little_known_leaves_it_to_rays_rule_and_takes_none_away() -> None:
    policy = Told(wanted(1, decided=False)).policy()
    assert policy(context(present=2, requests=10.0)) == (2, {})
    assert policy(context(present=2, requests=130.0)) == (4, {})


def test_nothing_that_goes_wrong_reaches_serve_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = Told(wanted(5)).policy()
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    broken: Callable[[], Any] = lambda: 1 / 0  # noqa: E731
    for _ in range(50):
        assert policy(context(present=3, total_num_requests=broken)) == (3, {})
    assert len([record for record in caplog.records if record.exc_info]) == 1


def test_a_number_beyond_the_bounds_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    policy = Told(wanted(20)).policy()
    logging.getLogger("ray.serve").addHandler(caplog.handler)
    logging.getLogger("ray.serve").setLevel(logging.INFO)
    for _ in range(50):
        policy(context(present=8))
    assert len([record for record in caplog.records if "by the controller" in record.message]) == 1


def test_the_policy_is_added_to_bounds_without_one() -> None:
    scaled = with_policy(BOUNDS, ENTRY, FLUID)
    assert scaled["policy"] == {"policy_function": POLICY} and scaled["target_ongoing_requests"] == 40
    assert (scaled["upscale_delay_s"], scaled["downscale_delay_s"]) == (0, 0) and scaled["max_replicas"] == 8
    assert with_policy(BOUNDS | {"downscale_delay_s": 5.0}, ENTRY, FLUID)["downscale_delay_s"] == 5.0


@pytest.mark.parametrize(("scaling", "settings"), [
    (BOUNDS | {"policy": {"policy_function": "ray.serve.autoscaling_policy:default_autoscaling_policy"}}, FLUID),
    (BOUNDS, ModelSettings.model_validate({"thresholds": {"policy": "wait"}})),
    (BOUNDS, ModelSettings.model_validate({"thresholds": {"policy": "fluid"}, "controller": {"enabled": False}})),
    (None, FLUID),
])
def test_another_policy_and_bounds_for_which_nothing_is_decided_stay_as_they_are(
    scaling: Any, settings: ModelSettings
) -> None:
    assert with_policy(scaling, ENTRY, settings) == scaling
