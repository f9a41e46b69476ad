"""When a deployment replaces its replicas, and in which order.

Serve replaces replicas whose version changed. A version is a digest of what needs a restart, so that a deployment of
anything else restarts nothing. Where the cluster has room for one more replica, new ones start before old ones stop.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import ray
from ray._private.state import available_resources_per_node

_PACKAGES = ("headrace", "cluster", "router", "replicas", "scheduler")
SURGE_PERCENT = 20
"""Replicas that may start before old ones stop, at least one; as many as Serve replaces at a time."""


def version_of(*parts: Any) -> str:
    """A digest of `parts`, JSON-like, and of this release's own code."""
    text = json.dumps([*parts, _code()], sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@cache
def _code() -> str:
    """A digest of the sources of our packages: a checkout changes without its version."""
    digest = hashlib.sha256()
    for package in _PACKAGES:
        spec = find_spec(package)
        folders = spec.submodule_search_locations if spec else None
        for path in sorted(path for folder in folders or () for path in Path(folder).rglob("*.py")):
            digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def surge_percent(bundles: Iterable[Mapping[str, float]]) -> int:
    """`max_surge_percent` for a deployment whose replicas need `bundles` of resources.

    0 when no node has room for one more replica now: Serve would wait for room for ever.
    """
    needed: Counter[str] = Counter()
    for bundle in bundles:
        needed.update(bundle)
    nodes = available_resources_per_node().values() if ray.is_initialized() else ()
    fits = any(all(node.get(name, 0.0) >= amount for name, amount in needed.items()) for node in nodes)
    return SURGE_PERCENT if fits else 0
