"""Configuration errors in words: the key, the value and what is allowed.

Also the two errors with which the `headrace` command ends, so that it imports none of the packages that raise them.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
from collections.abc import Iterable
from typing import Any, get_type_hints

import yaml
from pydantic import BaseModel, ValidationError


class UsageError(ValueError):
    """Options or a file that cannot be used as given: the `headrace` command ends with exit code 2."""


class CommandFailed(RuntimeError):
    """The command failed, though its options are valid: `headrace` ends with exit code 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean max_running?"` for the known name closest to `name`; empty when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """All errors of a configuration, one a line: key = value: what is allowed."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
            known = _known_keys(model, item["loc"][:-1])
            message = f"no such key; allowed here: {', '.join(known)}{did_you_mean(str(item['loc'][-1]), known)}"
            lines.append(f"{key}: {message}")
        elif item["type"] == "missing":
            lines.append(f"{key}: this key is required")
        elif item["type"] == "value_error" and isinstance(item["input"], dict):
            lines.append(f"{key}: {message}")  # several keys that do not go together; the message names them
        else:
            lines.append(f"{key} = {item['input']!r}: {message}")
    return "\n  ".join(lines)


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    current: Any = model
    for part in path:
        if isinstance(part, int):
            continue
        annotation = get_type_hints(current)[part]
        inner: Any = next((a for a in getattr(annotation, "__args__", ()) if _has_keys(a)), annotation)
        if not _has_keys(inner):
            return []
        current = inner
    if dataclasses.is_dataclass(current):
        return [one.name for one in dataclasses.fields(current)]
    return list(current.model_fields)


def _has_keys(value: Any) -> bool:
    return isinstance(value, type) and (issubclass(value, BaseModel) or dataclasses.is_dataclass(value))


def parse_settings(settings: list[str]) -> dict[str, Any]:
    """`KEY=VALUE` texts of a command line as a mapping; values are YAML.

    Raises ValueError for a text without `=` and for a value that is no YAML or that JSON could not carry.
    """
    values = {}
    for setting in settings:
        key, separator, value = setting.partition("=")
        if not separator or not key:
            raise ValueError(f"{setting!r} is not KEY=VALUE")
        try:
            values[key] = yaml.safe_load(value)
            json.dumps(values[key], allow_nan=False)
        except (yaml.YAMLError, TypeError, ValueError) as error:
            what = getattr(error, "problem", None) or error
            raise ValueError(f"the value of {key} is not YAML that JSON can carry: {what}") from error
    return values
