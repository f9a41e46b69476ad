"""What is wrong with a file or a set of options, in words that name the key, the value and what is allowed."""

from __future__ import annotations

import difflib
import json
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """All errors of a configuration, one a line: key = value: what is allowed."""
    lines = []
    for item in error.errors(include_url=False):
        key = ".".join(str(part) for part in item["loc"])
        message = item["msg"].removeprefix("Value error, ")
        if item["type"] == "extra_forbidden":
            known = _known_keys(model, item["loc"][:-1])
            close = difflib.get_close_matches(str(item["loc"][-1]), known, n=1)
            hint = f"; did you mean {close[0]}?" if close else ""
            message = f"no such key; allowed here: {', '.join(known)}{hint}"
            lines.append(f"{key}: {message}")
        elif item["type"] == "missing":
            lines.append(f"{key}: this key is required")
        elif item["type"] == "value_error" and isinstance(item["input"], dict):
            lines.append(f"{key}: {message}")  # several keys that do not go together; the message names them
        else:
            lines.append(f"{key} = {item['input']!r}: {message}")
    return "\n  ".join(lines)


def _known_keys(model: type[BaseModel], path: tuple[int | str, ...]) -> list[str]:
    current: type[BaseModel] = model
    for part in path:
        if isinstance(part, int):
            continue
        annotation = current.model_fields[part].annotation
        inner: Any = next((a for a in getattr(annotation, "__args__", ()) if _is_model(a)), annotation)
        if not _is_model(inner):
            return []
        current = inner
    return list(current.model_fields)


def _is_model(value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, BaseModel)


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
