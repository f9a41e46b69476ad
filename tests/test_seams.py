"""Every name of vLLM and Ray that is not public and that our code uses appears in a seam test, which fails if it moves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from import_graph import ROOT, modules_of

SEAMS = (
    "scheduler/test_vllm_seam.py", "simulator/engine/test_vllm_harness_seam.py", "replicas/test_ray_seam.py",
    "replicas/test_engine_seam.py", "replicas/test_delivery.py", "router/test_fluid_slack_router.py",
)
USERS = ("scheduler", "simulator", "replicas", "router", "cluster")
FILES = [path for package in USERS for path in modules_of(package).values()]
THEIRS = {"request", "victim", "scheduler_output", "new", "super"}
"""Names under which the fence modules hold vLLM's objects."""
STANDARD = {"__init__", "__del__"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_fence(path: Path) -> bool:
    """Whether a module imports vLLM or a private part of Ray."""
    return any(_hidden(node) for node in ast.walk(tree(path)))


def _hidden(node: ast.AST) -> bool:
    if not isinstance(node, ast.ImportFrom) or not node.module:
        return False
    return node.module.startswith("vllm.") or bool(re.match(r"ray\..*_(private|internal)\b", node.module))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if _hidden(node):
            yield from (alias.name for alias in node.names)


def touched(path: Path) -> Iterator[str]:
    """Attributes of vLLM's objects, and private attributes of any object, that a fence module reads or sets."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            holder = node.value.func if isinstance(node.value, ast.Call) else node.value
            name = getattr(holder, "id", getattr(holder, "attr", ""))
            if name in THEIRS or (node.attr.startswith("_") and name not in ("self", "cls")):
                yield node.attr


def ours() -> set[str]:
    """Names that our own code defines as attributes, methods or functions."""
    names: set[str] = set()
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr) if getattr(node.value, "id", "") == "self" else None
            elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                names.add(node.target.id)
    return names


def test_every_hidden_name_that_we_use_is_in_a_seam_test() -> None:
    words = {word for seam in SEAMS for word in re.findall(r"\w+", (ROOT / "tests" / seam).read_text("utf-8"))}
    fences = [path for path in FILES if is_fence(path)]
    assert len(fences) > 15
    used = {(name, str(path.relative_to(ROOT))) for path in fences for name in (*imported(path), *touched(path))}
    private = {name for name in ours() if name.startswith("_")} | STANDARD
    missing = {(name, path) for name, path in used if name not in words and name not in private}
    assert not missing, sorted(missing)
