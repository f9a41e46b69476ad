"""Where small values of an application are kept."""

from __future__ import annotations

from typing import Any, Protocol


class Store(Protocol):
    """Values by key; a key may have parts, separated by "/"."""

    def get(self, key: str) -> Any: ...

    def put(self, key: str, value: Any) -> None: ...

    def delete(self, key: str) -> None: ...

    def keys(self, prefix: str) -> list[str]: ...


def wanted_key(deployment: str) -> str:
    """Where the controller leaves, and Serve's policy reads, how many replicas a deployment should have."""
    return f"wanted/{deployment}"
