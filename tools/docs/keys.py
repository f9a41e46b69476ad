"""Keys of a configuration object, read from its class: type, default, unit and, from docstrings, meaning.

A class says what its keys mean in its docstring, as `name: meaning.` or `one; other: meaning of both.`
"""

from __future__ import annotations

import dataclasses
import inspect
import re
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

UNIT_OF_ENDING = {
    "_per_minute": "per minute", "_s": "seconds", "_tokens": "tokens", "_bytes": "bytes", "_rps": "requests per second",
    "_probability": "from 0 to 1", "_share": "from 0 to 1", "_rate": "from 0 to 1", "_fraction": "from 0 to 1",
}
UNIT_OF_NAME = {
    "max_running": "requests", "queue_limit": "requests", "n": "requests", "total": "requests",
    "concurrent_requests": "requests", "min_finished": "requests", "choices": "choices", "token_budget": "tokens",
    "num_cpus": "cores",
}
_WORDS = {str: "text", int: "whole number", float: "number", bool: "true or false", dict: "object", Path: "path",
          type(None): "null"}


@dataclass(frozen=True, slots=True)
class Key:
    """One key. kind: its type in words; default: as YAML shows it; inner: the class of an object below it; many: there
    is a list of such objects, or a mapping by name."""

    name: str
    kind: str
    default: str
    unit: str
    meaning: str
    inner: type | None = None
    many: str = ""


def keys_of(owner: type) -> list[Key]:
    """The keys of a pydantic model or dataclass, in the order of the class."""
    given = list(_fields(owner))
    meanings = meanings_in(owner, [name for name, *_ in given])
    return [_key(name, hint, default, rules, meanings.get(name, "")) for name, hint, default, rules in given]


def summary_of(owner: type) -> str:
    """The docstring's first sentence, without what it says about keys."""
    text = " ".join(_docstring(owner).split())
    names = "|".join(re.escape(name) for name, *_ in _fields(owner))
    return re.split(rf"(?:^|(?<=[.;]) ?)(?:{names})(?:[,;] \w+)*: ", text)[0].strip()


def meanings_in(owner: type, names: Collection[str]) -> dict[str, str]:
    """What the docstrings of a class and of those it extends say about each key; the class itself goes first."""
    found: dict[str, str] = {}
    for one in owner.__mro__:
        for name, meaning in _meanings(" ".join(_docstring(one).split()), names):
            found.setdefault(name, meaning)
    return found


def _meanings(text: str, names: Collection[str]) -> Iterator[tuple[str, str]]:
    listed = "|".join(sorted(map(re.escape, names), key=len, reverse=True))
    head = re.compile(rf"(?:(?<=^)|(?<=[.;,] )|(?<=\) ))((?:{listed})(?:[,;] (?:{listed}))*): ")
    heads = list(head.finditer(text))
    for this, following in zip(heads, [*heads[1:], None], strict=False):
        meaning = text[this.end():following.start() if following else len(text)].strip().rstrip(";.")
        meaning = re.split(r"\.? (?:Raises|Source)[ :]", meaning)[0]
        for name in re.split(r"[,;] ", this[1]):
            yield name, meaning.strip()


def _docstring(owner: type) -> str:
    own = owner.__dict__.get("__doc__") or ""
    return "" if own.startswith(f"{owner.__name__}(") else inspect.cleandoc(own)


def _fields(owner: type) -> Iterator[tuple[str, Any, Any, list[Any]]]:
    """Name, type, default and rules of each key."""
    if issubclass(owner, BaseModel):
        for name, field in owner.model_fields.items():
            yield name, field.annotation, _default(field), list(field.metadata)
        return
    hints = typing.get_type_hints(owner, include_extras=True)
    for field in dataclasses.fields(owner):
        made = field.default_factory() if field.default_factory is not dataclasses.MISSING else field.default
        yield field.name, hints[field.name], made, []


def _default(field: FieldInfo) -> Any:
    if field.is_required():
        return dataclasses.MISSING
    return field.get_default(call_default_factory=True)


def _key(name: str, hint: Any, default: Any, rules: list[Any], meaning: str) -> Key:
    inner, many = _inner(hint)
    kind = _kind(hint, rules)
    return Key(name, kind, "" if inner and not many else _shown(default), _unit(name, kind), meaning, inner, many)


def _unit(name: str, kind: str) -> str:
    if "number" not in kind:
        return ""
    endings = (unit for ending, unit in UNIT_OF_ENDING.items() if name.endswith(ending))
    return UNIT_OF_NAME.get(name) or next(endings, "")


def _inner(hint: Any) -> tuple[type | None, str]:
    """The class of the object that a key holds, and whether it holds several: "list" or "mapping"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _inner(args[0])
    if origin in (Union, types.UnionType):
        return next((found for found in map(_inner, args) if found[0]), (None, ""))
    if origin in (list, tuple):
        return _inner(args[0])[0], "list"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return _inner(args[1])[0], "mapping"
    is_object = inspect.isclass(hint) and (issubclass(hint, BaseModel) or dataclasses.is_dataclass(hint))
    return (hint if is_object else None), ""


def _kind(hint: Any, rules: list[Any]) -> str:
    origin, args = get_origin(hint), get_args(hint)
    if origin is Annotated:
        return _kind(args[0], [*rules, *_unpacked(args[1:])])
    if origin in (Union, types.UnionType):
        own = [one for one in args if one is not type(None)]
        return " or ".join([*(_kind(one, rules) for one in own), *(["null"] if type(None) in args else [])])
    if origin is Literal:
        return " or ".join(f"`{one}`" for one in args)
    if origin in (list, tuple):
        inside = [_kind(one, []) for one in args if one is not Ellipsis]
        return f"list of {inside[0]}" if origin is list or Ellipsis in args else f"[{', '.join(inside)}]"
    if inspect.isclass(origin) and issubclass(origin, Mapping):
        return f"object: name → {_kind(args[1], [])}"
    if inspect.isclass(hint) and issubclass(hint, Enum):
        return " or ".join(f"`{one.value}`" for one in hint)
    return _WORDS.get(hint, "object" if _inner(hint)[0] else "any value") + _bounds(rules)


def _unpacked(rules: Collection[Any]) -> Iterator[Any]:
    for rule in rules:
        yield from rule.metadata if isinstance(rule, FieldInfo) else [rule]


def _bounds(rules: Collection[Any]) -> str:
    said = []
    for sign, name in ((">", "gt"), ("≥", "ge"), ("<", "lt"), ("≤", "le")):
        said += [f"{sign} {getattr(rule, name):g}".replace("e+0", "e")
                 for rule in rules if getattr(rule, name, None) is not None]
    return f", {' and '.join(said)}" if said else ""


def _shown(value: Any) -> str:
    if value is dataclasses.MISSING or value is PydanticUndefined:
        return "required"
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list | tuple | Mapping) and not value:
        return "empty"
    return f'"{value}"' if value == "" else str(value)
