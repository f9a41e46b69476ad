"""Names of adapters: what exists is served, and nothing else is looked for outside the adapters' folder."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from fastapi import HTTPException

from router.adapters import exists

ADAPTERS = {"org/m": "s3://bucket/adapters"}


class Bucket:
    """Stands for Ray's look at an adapter."""

    def __init__(self) -> None:
        self.looked_for: list[tuple[str, str]] = []

    async def metadata(self, model_id: str, path: str) -> dict[str, Any]:
        self.looked_for.append((model_id, path))
        if model_id not in ("org/m:north", "org/m:team:v1.2"):
            raise HTTPException(404, f"no adapter_config.json in {path}")
        return {}


def found(bucket: Bucket, model_id: str) -> bool:
    return asyncio.run(exists(model_id, ADAPTERS, bucket.metadata))


@pytest.mark.parametrize("model_id", ["org/m:north", "org/m:team:v1.2"])
def test_an_adapter_that_is_there_exists(model_id: str) -> None:
    bucket = Bucket()
    assert found(bucket, model_id)
    assert bucket.looked_for == [(model_id, "s3://bucket/adapters")]


def test_a_model_needs_no_look() -> None:
    bucket = Bucket()
    assert found(bucket, "org/m") and found(bucket, "other")
    assert bucket.looked_for == []


def test_an_adapter_that_is_not_there_does_not() -> None:
    assert not found(Bucket(), "org/m:west")


@pytest.mark.parametrize(
    "model_id",
    [
        "other:north", "org/m:", "org/m:../secrets", "org/m:a/b", "org/m:..", "org/m:.hidden", "org/m:a b", "org/m:a\n",
        "org/m:" + "a" * 201, "org/m:%2e%2e", "org/m:\ud800",
    ],
)
def test_nothing_is_looked_for_that_cannot_be_an_adapter_of_the_model(model_id: str) -> None:
    bucket = Bucket()
    assert not found(bucket, model_id)
    assert bucket.looked_for == []
