"""LoRA adapters by name: `MODEL:ADAPTER` is a model of its own to clients."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from fastapi import HTTPException

_PLAIN = re.compile(r"[\w-][\w.:-]{0,199}")
"""A name that stays below the adapters' own folder."""
Metadata = Callable[[str, str], Awaitable[dict[str, Any]]]


async def exists(model_id: str, adapters: Mapping[str, str], metadata: Metadata) -> bool:
    """Whether a name is that of a model or of an adapter that can be loaded.

    adapters: the place of a model's adapters, by model; metadata: Ray's look at an adapter there (cached), which raises
    an HTTPException when there is none. Without this a wrong name would fail in a replica, with a path in the answer.
    """
    base, _, adapter = model_id.partition(":")
    if not adapter:
        return base == model_id
    if base not in adapters or not _PLAIN.fullmatch(adapter):
        return False
    try:
        await metadata(model_id, adapters[base])
    except HTTPException:
        return False
    return True
