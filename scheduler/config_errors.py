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
from pydantic_core import ErrorDetails, InitErrorDetails, PydanticCustomError


class UsageError(ValueError):
    """Options or a file that cannot be used as given: the `headrace` command ends with exit code 2."""


class CommandFailed(RuntimeError):
    """The command failed, though its options are valid: `headrace` ends with exit code 1."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """`"; did you mean max_running?"` for the known name closest to `name`; empty when none is close."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


Place = tuple[int | str, ...]
"""The keys and indices that lead to a value of a configuration."""


_UNSHOWN: Any = object()


@dataclasses.dataclass(frozen=True, slots=True)
class Complaint:
    """A mistake at a place of a configuration. value: shown with the message, unless the message says it all."""

    place: Place
    message: str
    value: Any = _UNSHOWN


def complaints(title: str, found: Iterable[Complaint]) -> ValidationError:
    """The error to raise in a pydantic validator for several mistakes, each at its own place below the validator's."""
    return ValidationError.from_exception_data(
        title,
        [
            InitErrorDetails(
                type=PydanticCustomError("value_error", "{message}", {"message": one.message}), loc=one.place,
                input={} if one.value is _UNSHOWN else one.value,
            )
            for one in found
        ],
    )


def describe(error: ValidationError, model: type[BaseModel]) -> str:
    """All errors of a configuration, one a line: key = value: what is allowed."""
    lines = []
    for item in error.errors(include_url=False):
        complaint = described(item, model)
        key = ".".join(str(part) for part in complaint.place)
        shown = "" if complaint.value is _UNSHOWN else f" = {complaint.value!r}"
        lines.append(f"{key}{shown}: {complaint.message}" if key else complaint.message)
    return "\n  ".join(lines)


def described(item: ErrorDetails, model: type[BaseModel], place: Place = ()) -> Complaint:
    """One of pydantic's errors about a `model` that stands at `place`, in our words."""
    where, message = (*place, *item["loc"]), item["msg"]
    for prefix in ("Value error, ", "Assertion failed, "):
        message = message.removeprefix(prefix)
    if item["type"] in ("extra_forbidden", "unexpected_keyword_argument"):  # of a model, of a dataclass
        known = _known_keys(model, item["loc"][:-1])
        return Complaint(
            where, f"no such key; allowed here: {', '.join(known)}{did_you_mean(str(item['loc'][-1]), known)}"
        )
    if item["type"] == "missing":
        return Complaint(where, "this key is required")
    if item["type"] == "value_error" and isinstance(item["input"], dict | BaseModel):
        return Complaint(where, message)  # several keys that do not go together; the message names them
    return Complaint(where, message, item["input"])


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
