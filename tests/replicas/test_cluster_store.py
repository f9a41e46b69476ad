"""The store in a real GCS: values outlive the process that wrote them; applications do not see each other's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import ray
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

from replicas.cluster_store import ClusterStore


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    ray.init(
        address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, logging_level="ERROR",
        _node_ip_address="127.0.0.1",
    )
    yield
    ray.shutdown()


def test_values_outlive_the_actor_that_wrote_them(cluster: None) -> None:
    class Writer:
        def write(self) -> None:
            ClusterStore("app").put("pins", {"small": [1, 2.5, None, "λ"]})

    writer = ray.remote(Writer).options(num_cpus=0).remote()
    ray.get(writer.write.remote())
    ray.kill(writer)
    assert ClusterStore("app").get("pins") == {"small": [1, 2.5, None, "λ"]}


def test_applications_do_not_see_each_other_s_values(cluster: None) -> None:
    one, other = ClusterStore("a"), ClusterStore("a/b")
    for number in (2, 1):
        one.put(f"events/{number}", number)
        other.put(f"events/{number}", -number)
    one.put("events", "no folder")
    assert one.keys("events/") == ["events/1", "events/2"] and one.get("events/2") == 2
    one.delete("events/1")
    one.delete("events/1")
    assert one.keys("events/") == ["events/2"]
    one.forget()
    assert one.keys("") == [] and other.keys("") == ["events/1", "events/2"]
    assert one.get("events/2") is None


def test_a_value_of_something_else_counts_as_none(cluster: None) -> None:
    _internal_kv_put("app/broken", b"\xff", namespace="headrace")
    assert ClusterStore("app").get("broken") is None
    assert _internal_kv_get("app/broken", namespace="headrace") and _internal_kv_list("app/", namespace="headrace")
    assert _internal_kv_del("app/broken", namespace="headrace") == 1
