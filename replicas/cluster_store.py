"""Small JSON values of one application, kept in Ray's GCS: they outlive every process of ours, not the cluster.

The fence around `ray.experimental.internal_kv`: `tests/replicas/test_cluster_store.py` fails when an upgrade moves it.
Every call blocks on the GCS, so none belongs on an event loop.
"""

from __future__ import annotations

import logging
from typing import Any
from urllib.parse import quote

from pydantic_core import from_json, to_json
from ray.experimental.internal_kv import _internal_kv_del, _internal_kv_get, _internal_kv_list, _internal_kv_put

_NAMESPACE = "headrace"
logger = logging.getLogger(__name__)


class ClusterStore:
    """The values of the application `app_name`; needs a process that is connected to Ray."""

    def __init__(self, app_name: str) -> None:
        self._prefix = f"{quote(app_name, safe='')}/"

    def get(self, key: str) -> Any:
        """The value under `key`; None when there is none, or when it is no JSON."""
        text = _internal_kv_get(self._prefix + key, namespace=_NAMESPACE)
        if text is None:
            return None
        try:
            return from_json(text)
        except ValueError:
            logger.warning("the stored value %s is not JSON and is ignored", key)
            return None

    def put(self, key: str, value: Any) -> None:
        """Keep a value that JSON can carry; infinite numbers become null."""
        _internal_kv_put(self._prefix + key, to_json(value, inf_nan_mode="null"), namespace=_NAMESPACE)

    def delete(self, key: str) -> None:
        """Forget the value under `key`; none is fine."""
        _internal_kv_del(self._prefix + key, namespace=_NAMESPACE)

    def keys(self, prefix: str = "") -> list[str]:
        """The keys that begin with `prefix`, sorted."""
        found = _internal_kv_list(self._prefix + prefix, namespace=_NAMESPACE)
        return sorted(key.decode().removeprefix(self._prefix) for key in found)

    def forget(self) -> None:
        """Delete everything of the application."""
        _internal_kv_del(self._prefix, del_by_prefix=True, namespace=_NAMESPACE)
