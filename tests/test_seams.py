"""Every non-public name of vLLM and Ray that our code uses appears in a seam test, which fails when it moves."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from import_graph import ROOT, imports_in, modules_of

SEAMS = (
    "cluster/test_build.py", "cluster/test_joining.py", "cluster/test_ray_llm.py", "cluster/test_rollout_seam.py",
    "scheduler/test_vllm_seam.py", "scheduler/alone/test_frontend_seam.py",
    "simulator/engine/test_vllm_harness_seam.py", "replicas/test_ray_seam.py", "replicas/test_engine_seam.py",
    "replicas/test_cluster_store.py", "replicas/test_delivery.py", "replicas/test_logs.py",
    "router/test_fluid_router.py",
)
USERS = ("scheduler", "simulator", "replicas", "router", "cluster")
FILES = [path for package in USERS for path in modules_of(package).values()]
THEIRS = {"request", "victim", "scheduler_output", "new", "scheduler", "_scheduler", "super"}
"""Names under which the fence modules hold vLLM's objects."""
STANDARD = {"__init__", "__del__", "_replace"}


def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def is_fence(path: Path) -> bool:
    """Whether a module imports vLLM or Ray."""
    return any(one.module.partition(".")[0] in ("vllm", "ray") and not one.typing_only for one in imports_in(path))


def _hidden(node: ast.AST) -> bool:
    if not isinstance(node, ast.ImportFrom) or not node.module:
        return False
    return node.module.startswith("vllm.") or bool(re.match(r"ray\..*_(private|internal)\b", node.module))


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(tree(path)):
        if _hidden(node):
            yield from (alias.name for alias in node.names)


def touched(path: Path) -> Iterator[tuple[str, str]]:
    """(holder, attribute) of what a fence module reads or sets on vLLM's objects, on itself, or in private."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Attribute):
            holder = node.value.func if isinstance(node.value, ast.Call) else node.value
            name = getattr(holder, "id", getattr(holder, "attr", ""))
            if name in THEIRS | {"self"} or node.attr.startswith("_"):
                yield name, node.attr


def ours() -> set[str]:
    """Names that our own code defines as attributes, methods or functions."""
    names: set[str] = set()
    for path in FILES:
        for node in ast.walk(tree(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                names.add(node.name)
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                names.add(node.attr)
            elif isinstance(node, ast.AnnAssign | ast.Assign):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                names |= {target.id for target in targets if isinstance(target, ast.Name)}
    return names


def test_every_hidden_name_that_we_use_is_in_a_seam_test() -> None:
    words = {word for seam in SEAMS for word in re.findall(r"\w+", (ROOT / "tests" / seam).read_text("utf-8"))}
    fences = [path for path in FILES if is_fence(path)]
    assert len(fences) > 15
    own = ours()
    used = {(name, path.name) for path in fences for name in imported(path)}
    for path in fences:
        for holder, name in touched(path):
            is_own = name in own and not (name.startswith("_") and holder in THEIRS)
            if not is_own and name not in STANDARD:
                used.add((name, path.name))
    assert {"_preempt_request", "_inflight_prefills", "_get_response", "RequestMetadata"} <= {name for name, _ in used}
    missing = sorted((name, file) for name, file in used if name not in words)
    assert missing == []
