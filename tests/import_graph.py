"""What imports what, read from the source without running it: for the markers of tests and the test of structure."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("headrace", "cluster", "router", "replicas", "loadgen", "simulator", "scheduler")
_TESTS = ROOT / "tests"
_SEARCHED = (
    ROOT, _TESTS, *sorted(path for path in _TESTS.rglob("*") if path.is_dir()), ROOT / "benchmarks" / "evidence"
)


class Import(NamedTuple):
    """One imported module. function: the outermost function that does it when it runs; None at import time."""

    module: str
    function: str | None = None
    typing_only: bool = False


@functools.cache
def imports_in(path: Path) -> tuple[Import, ...]:
    """All imports of a file; `from a import b` counts as one of `a.b` where that is a module."""
    return tuple(_imports(ast.parse(path.read_text(encoding="utf-8")).body, None, False))


def _imports(nodes: list[ast.stmt], function: str | None, typing_only: bool) -> Iterator[Import]:
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _imports(node.body, function or node.name, typing_only)
            continue
        yield from (Import(name, function, typing_only) for name in _names(node))
        for part in ("body", "orelse", "finalbody", "handlers"):
            guarded = part == "body" and isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
            yield from _imports(getattr(node, part, []), function, typing_only or guarded)


def _names(node: ast.stmt | ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        assert node.module and not node.level, "imports are absolute"
        inner = [f"{node.module}.{alias.name}" for alias in node.names]
        modules = [name for name in inner if file_of(name)]
        yield from modules
        if len(modules) < len(inner):
            yield node.module
    elif isinstance(node, ast.Assign | ast.Expr):
        for call in ast.walk(node):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "importorskip":
                yield ast.literal_eval(call.args[0])


@functools.cache
def file_of(module: str) -> Path | None:
    """Where a module of this repository is; None for one of another package."""
    for folder in _SEARCHED:
        place = folder.joinpath(*module.split("."))
        for path in (place.with_suffix(".py"), place / "__init__.py"):
            if path.is_file():
                return path
    return None


def modules_of(package: str) -> dict[str, Path]:
    """The modules of a package by dotted name, `__init__` under the package's own."""
    found = {}
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def packages_reached(path: Path, functions: frozenset[str] = frozenset()) -> set[str]:
    """The packages of others that importing a file imports, directly or not, and those that its `functions` import."""
    reached = set(_reached_at_import(path))
    for one in imports_in(path):
        if one.function in functions:
            files, outside = _resolved(one.module)
            reached |= outside.union(*(_reached_at_import(file) for file in files))
    return reached


@functools.cache
def _reached_at_import(path: Path) -> frozenset[str]:
    reached: set[str] = set()
    seen = {path}
    at_hand = [path]
    while at_hand:
        for one in imports_in(at_hand.pop()):
            if one.function is None and not one.typing_only:
                files, outside = _resolved(one.module)
                reached |= outside
                at_hand += files - seen
                seen |= files
    return frozenset(reached)


@functools.cache
def _resolved(module: str) -> tuple[frozenset[Path], frozenset[str]]:
    """The files of ours that importing a module runs; or the package of others that it is in."""
    parts = module.split(".")
    files = {file_of(".".join(parts[:end])) for end in range(1, len(parts) + 1)} - {None}
    return frozenset(file for file in files if file), frozenset(() if files else parts[:1])
