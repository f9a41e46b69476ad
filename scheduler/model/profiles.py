"""Presets of a language model on a device: its iteration-time model, KV capacity, and the source of each number."""

import json
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from scheduler.model.iteration_time import IterationTimeModel

_PRESETS = resources.files("scheduler") / "profiles"
_KEYS = {"name", "description", "law", "kv_capacity_tokens", "provenance"}


@dataclass(frozen=True, slots=True)
class Profile:
    """One model on one device; `kv_capacity_tokens` is the size of its KV cache, C in arXiv 2504.11320."""

    name: str
    description: str
    time_model: IterationTimeModel
    kv_capacity_tokens: int
    provenance: tuple[str, ...]


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
    if not isinstance(data, dict) or set(data) != _KEYS:
        found = sorted(data) if isinstance(data, dict) else type(data).__name__
        raise ValueError(f"found {found}; it must be an object with exactly the keys {sorted(_KEYS)}")
    capacity, provenance = data["kv_capacity_tokens"], data["provenance"]
    if not (isinstance(capacity, int) and capacity >= 1 and isinstance(provenance, list)):
        raise ValueError("kv_capacity_tokens must be an integer >= 1 and provenance a list of strings")
    return Profile(
        name=str(data["name"]),
        description=str(data["description"]),
        time_model=IterationTimeModel(**data["law"]),
        kv_capacity_tokens=capacity,
        provenance=tuple(str(line) for line in provenance),
    )
