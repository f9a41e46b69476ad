"""A profile from first principles out of files and options: `headrace profile estimate`, and `headrace plan`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scheduler.config_errors import UsageError
from scheduler.model.accelerators import accelerator
from scheduler.model.estimate import Setup, estimate
from scheduler.model.profiles import Profile


def estimated_profile(model_config: Path, accelerator_name: str, setup: Setup, name: str = "") -> Profile:
    """The estimate for the model whose config.json, or the folder of it, is given.

    Raises:
        UsageError: the file, the model or the accelerator cannot be used; the message says why and what to do.
    """
    config = read_config(model_config)
    try:
        return estimate(config, accelerator(accelerator_name), setup, name or _name_of(config, model_config))
    except ValueError as error:
        raise UsageError(str(error)) from error


def read_config(path: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        UsageError: it is not there, or no JSON object.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(
            f"--model-config: cannot read {file}: {error.strerror}; give the config.json of the model's checkpoint"
        ) from error
    except ValueError as error:
        raise UsageError(f"--model-config: {file} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise UsageError(f"--model-config: {file} holds {type(found).__name__}; a model's config.json is an object")
    return found


def _name_of(config: dict[str, Any], path: Path) -> str:
    """What the checkpoint calls the model: its own name, or the folder in which its config.json lies."""
    named = str(config.get("_name_or_path") or "").rstrip("/")
    folder = (path if path.is_dir() else path.parent).resolve().name
    return named or (folder if path.is_dir() or path.name == "config.json" else path.stem)
