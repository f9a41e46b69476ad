"""Presets of a language model on a device: its iteration-time model, KV capacity, and the source of each number."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from scheduler.model.iteration_time import IterationTimeModel

_PRESETS = resources.files("scheduler") / "profiles"
_KEYS = {"name", "description", "law", "kv_capacity_tokens", "provenance"}
_OPTIONAL = {"interval"}


@dataclass(frozen=True, slots=True)
class Interval:
    """What an estimate leaves open: the model with the shortest and with the longest times, and the largest and the
    smallest KV cache, in tokens. The fast end has the shortest times and the most tokens."""

    fast: IterationTimeModel
    slow: IterationTimeModel
    kv_low: int
    kv_high: int


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one device; `kv_capacity_tokens` is the size of its KV cache, C in arXiv 2504.11320.

    interval: of an estimate; None: measured or published.
    """

    name: str
    description: str
    time_model: IterationTimeModel
    kv_capacity_tokens: int
    provenance: tuple[str, ...]
    interval: Interval | None = None

    def as_dict(self) -> dict[str, Any]:
        """The JSON of a profile's file, the inverse of `load_profile`."""
        found: dict[str, Any] = {
            "name": self.name, "description": self.description, "law": asdict(self.time_model),
            "kv_capacity_tokens": self.kv_capacity_tokens,
        }
        if self.interval is not None:
            found["interval"] = {
                "law": {"low": asdict(self.interval.fast), "high": asdict(self.interval.slow)},
                "kv_capacity_tokens": {"low": self.interval.kv_low, "high": self.interval.kv_high},
            }
        return found | {"provenance": list(self.provenance)}


def profile_names() -> tuple[str, ...]:
    """Names of the presets that come with the package, sorted."""
    return tuple(sorted(f.name.removesuffix(".json") for f in _PRESETS.iterdir() if f.name.endswith(".json")))


def load_profile(name_or_path: str | Path) -> Profile:
    """The preset of that name, or the profile in the JSON file at that path; ValueError for anything else."""
    name = str(name_or_path)
    if name in profile_names():
        text = (_PRESETS / f"{name}.json").read_text(encoding="utf-8")
    elif Path(name).is_file():
        text = Path(name).read_text(encoding="utf-8")
    else:
        raise ValueError(
            f"profile {name!r} is not known; known profiles: {', '.join(profile_names())}; "
            "or give the path of a profile's JSON file"
        )
    try:
        return _profile(json.loads(text))
    except (ValueError, TypeError) as error:
        raise ValueError(f"profile {name!r}: {error}") from error


def _profile(data: Any) -> Profile:
    if not isinstance(data, dict) or set(data) - _OPTIONAL != _KEYS:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(
            f"found {found}; it must be an object with the keys {sorted(_KEYS)}, and may have {sorted(_OPTIONAL)}"
        )
    capacity, provenance = data["kv_capacity_tokens"], data["provenance"]
    if not (isinstance(capacity, int) and capacity >= 1 and isinstance(provenance, list)):
        raise ValueError("kv_capacity_tokens must be an integer >= 1 and provenance a list of strings")
    return Profile(
        name=str(data["name"]),
        description=str(data["description"]),
        time_model=IterationTimeModel(**data["law"]),
        kv_capacity_tokens=capacity,
        provenance=tuple(str(line) for line in provenance),
        interval=_interval(data["interval"]) if "interval" in data else None,
    )


def _interval(data: Any) -> Interval:
    try:
        law, tokens = data["law"], data["kv_capacity_tokens"]
        return Interval(
            IterationTimeModel(**law["low"]), IterationTimeModel(**law["high"]), int(tokens["low"]), int(tokens["high"])
        )
    except (KeyError, TypeError) as error:
        raise ValueError("interval must have law and kv_capacity_tokens, each with low and high") from error
