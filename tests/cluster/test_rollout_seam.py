"""The non-public names of Ray by which a deployment gets a version of ours and live settings."""

from __future__ import annotations

from typing import Any

import pytest

ray = pytest.importorskip("ray", reason="Ray is not installed")


def test_a_deployment_keeps_the_version_that_it_is_given() -> None:
    from ray import serve

    class Served:
        pass

    bound = serve.deployment(Served, name="served", num_replicas=2).bind(key="value")
    deployment = bound._bound_deployment
    changed = deployment.options(version="v", user_config={"a": 1}, max_surge_percent=20, _internal=True)
    assert serve.Application(changed)._bound_deployment._version == "v"
    config = changed._deployment_config
    assert (config.user_config, config.max_surge_percent, config.num_replicas) == ({"a": 1}, 20, 2)
    assert changed._replica_config.init_kwargs == {"key": "value"}
    assert changed._replica_config.ray_actor_options is not None
    assert changed._replica_config.placement_group_bundles is None


def test_a_change_of_scale_or_settings_is_no_restart_and_a_change_of_version_is_one() -> None:
    from ray.serve._private.config import DeploymentConfig
    from ray.serve._private.version import DeploymentVersion

    def version(code: str, **options: Any) -> Any:
        return DeploymentVersion(code, DeploymentConfig(**options), {})

    first = version("v", num_replicas=1, user_config={"a": 1})
    other = version("v", num_replicas=2, user_config={"a": 2}, max_surge_percent=20, graceful_shutdown_timeout_s=5.0)
    assert not first.requires_actor_restart(other) and first.requires_actor_reconfigure(other)
    assert not first.requires_actor_reconfigure(version("v", num_replicas=3, user_config={"a": 1}))
    assert first.requires_actor_restart(version("w", num_replicas=1, user_config={"a": 1}))


def test_free_resources_are_known_by_node() -> None:
    from ray._private.state import available_resources_per_node

    assert callable(available_resources_per_node)
