"""A store in memory that carries JSON alone, as the cluster's does."""

from __future__ import annotations

from typing import Any

from pydantic_core import from_json, to_json


class FakeStore:
    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}
        self.fails = False

    def get(self, key: str) -> Any:
        self._answer()
        return from_json(self.values[key]) if key in self.values else None

    def put(self, key: str, value: Any) -> None:
        self._answer()
        self.values[key] = to_json(value, inf_nan_mode="null")

    def delete(self, key: str) -> None:
        self._answer()
        self.values.pop(key, None)

    def keys(self, prefix: str) -> list[str]:
        self._answer()
        return sorted(key for key in self.values if key.startswith(prefix))

    def _answer(self) -> None:
        if self.fails:
            raise ConnectionError("no GCS")
