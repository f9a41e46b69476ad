"""Write the table of values in helm/headrace/README.md from the comments in values.yaml: `python helm/readme.py`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).resolve().parent / "headrace"
COMMAND = "python helm/readme.py"
BEGIN = f"<!-- The rest is made from values.yaml by `{COMMAND}`; change its comments instead. -->"
LONGEST_DEFAULT = 60


@dataclass(frozen=True, slots=True)
class Value:
    """One value. path: as `helm --set` takes it; default: as YAML, in one line."""

    path: str
    default: str
    meaning: str


@dataclass(frozen=True, slots=True)
class Group:
    """Values below one key, or at the top level for the key ""."""

    key: str
    meaning: str
    values: tuple[Value, ...]


def groups(text: str) -> Iterator[Group]:
    """The groups of a values.yaml in its order, the top level's own values first."""
    lines = text.splitlines()
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    top: list[Value] = []
    rest: list[Group] = []
    for key, node in root.value:
        if _is_group(lines, node):
            rest.append(Group(key.value, _comment(lines, key), tuple(_values(lines, key.value, node))))
        else:
            top.append(Value(key.value, _default(node), _comment(lines, key)))
    yield Group("", "", tuple(top))
    yield from rest


def _values(lines: list[str], path: str, node: yaml.MappingNode) -> Iterator[Value]:
    for key, inner in node.value:
        below = f"{path}.{key.value}"
        meaning = _comment(lines, key)
        if not _is_group(lines, inner):
            yield Value(below, _default(inner), meaning)
            continue
        if meaning:
            yield Value(below, "", meaning)
        yield from _values(lines, below, inner)


def _is_group(lines: list[str], node: yaml.Node) -> bool:
    """Whether the keys inside have comments of their own."""
    is_block = isinstance(node, yaml.MappingNode) and not node.flow_style
    return is_block and any(_comment(lines, key) for key, _ in node.value)


def _comment(lines: list[str], key: yaml.Node) -> str:
    """The comment on the lines right above a key."""
    found: list[str] = []
    number = key.start_mark.line - 1
    while number >= 0 and lines[number].strip().startswith("#"):
        found.insert(0, lines[number].strip().removeprefix("#").strip())
        number -= 1
    return " ".join(found)


def _default(node: yaml.Node) -> str:
    value: Any = yaml.safe_load(yaml.serialize(node))
    text = json.dumps(value)
    return text if len(text) <= LONGEST_DEFAULT else "see values.yaml"


def table(text: str) -> str:
    """The Markdown of all groups."""
    parts = []
    for group in groups(text):
        parts.append(f"### {f'`{group.key}`' if group.key else 'Names, pods and the rest'}\n")
        if group.meaning:
            parts.append(f"{_escaped(group.meaning)}\n")
        parts.append("| value | default | meaning |\n|---|---|---|\n" + "".join(
            f"| `{one.path}` | {_code(one.default)} | {_escaped(one.meaning)} |\n" for one in group.values
        ))
    return "\n".join(parts)


def _code(default: str) -> str:
    return f"`{default}`" if default and default != "see values.yaml" else default


def _escaped(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def page() -> str:
    """The README as it should be."""
    own = (CHART / "README.md").read_text("utf-8").partition(BEGIN)[0].rstrip()
    return f"{own}\n\n{BEGIN}\n\n{table((CHART / 'values.yaml').read_text('utf-8'))}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is out of date")
    readme = CHART / "README.md"
    if parser.parse_args().check:
        sys.exit(None if readme.read_text("utf-8") == page() else f"{readme} is out of date; run: {COMMAND}")
    readme.write_text(page(), "utf-8")


if __name__ == "__main__":
    main()
