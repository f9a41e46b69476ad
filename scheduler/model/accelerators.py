"""Accelerators and what their makers publish of them: `scheduler/accelerators.json`, a source beside each."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

_FILE = resources.files("scheduler") / "accelerators.json"
_GIB = 2**30


class UnknownAccelerator(ValueError):
    """An accelerator that is not in the table; the message names those that are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accelerator:
    """One device, by its maker's dense figures.

    devices: parts of the names by which drivers call it; ray_types: Ray's `accelerator_type`. memory_gib: as the driver
    shows it. fp8_flops: None where there is no 8-bit product. link_bytes_per_s: to the other accelerators of the
    machine, one way. compute_share: of the compute efficiency that is assumed elsewhere.
    """

    name: str
    description: str
    devices: tuple[str, ...]
    ray_types: tuple[str, ...]
    memory_gib: float
    memory_bytes_per_s: float
    bf16_flops: float
    fp8_flops: float | None
    link_bytes_per_s: float
    link: str
    source: str
    compute_share: float = 1.0

    @property
    def memory_bytes(self) -> float:
        """Bytes of memory."""
        return self.memory_gib * _GIB

    @property
    def engine_defaults(self) -> tuple[int, int]:
        """max_num_batched_tokens and max_num_seqs with which vLLM 0.29 serves on such a device, unless told otherwise.

        Source: vLLM's `EngineArgs.get_batch_defaults`.
        """
        if self.memory_gib >= 160:
            return 16_384, 1024
        return (8192, 1024) if self.memory_gib >= 70 and not self.name.startswith("a100") else (2048, 256)


def accelerators() -> Mapping[str, Accelerator]:
    """All of the table, by name."""
    table: dict[str, dict[str, Any]] = json.loads(_FILE.read_text(encoding="utf-8"))
    return {
        name: Accelerator(
            name=name, **{**row, "devices": tuple(row["devices"]), "ray_types": tuple(row["ray_types"])}
        )
        for name, row in table.items()
    }


def accelerator(name: str) -> Accelerator:
    """The accelerator of that name; capitals do not matter.

    Raises:
        UnknownAccelerator: it is not in the table.
    """
    table = accelerators()
    if name.lower() not in table:
        close = difflib.get_close_matches(name.lower(), list(table), n=1)
        meant = f"; did you mean {close[0]}?" if close else ""
        raise UnknownAccelerator(
            f"accelerator {name!r} is not known{meant}; known: {', '.join(table)}; on another one measure a profile "
            "with headrace profile measure"
        )
    return table[name.lower()]


def accelerator_of_device(device_name: str) -> Accelerator | None:
    """The accelerator that a driver calls so, such as "NVIDIA H100 80GB HBM3"; None: not in the table."""
    words = device_name.replace("_", " ").lower()
    found = [
        (len(device), one) for one in accelerators().values() for device in one.devices
        if f" {device.lower()} " in f" {words} "
    ]
    return max(found, key=lambda pair: pair[0])[1] if found else None


def is_known_to_ray_as(accelerator_type: str) -> bool:
    """Whether Ray's `accelerator_type` names an accelerator of the table."""
    return any(accelerator_type in one.ray_types for one in accelerators().values())
