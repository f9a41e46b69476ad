"""Which package, room and module may import which: no arrow runs back up, and there are no circles.

The picture is in docs/structures.md, "Import order".
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable
from graphlib import CycleError, TopologicalSorter

import pytest
from import_graph import PACKAGES, ROOT, imports_in, modules_of

LAYERS = {
    "scheduler": [
        "vllm_scheduler", "alone", "engine", "support settings", "tuning", "estimation", "policies",
        "wire request_rejected", "messages rejection openai_error metrics", "digest thresholds", "fluid_params",
        "survival", "model config_errors",
    ],
    "simulator": ["cli", "sweep run", "audit", "engine", "config", "scenario", "output", "workload paper_model"],
}
PACKAGE_LAYERS = ["headrace", "cluster", "loadgen", "simulator", "router", "replicas", "scheduler"]
WITH_VLLM = {
    "scheduler.vllm_scheduler", "scheduler.engine.admission_queue", "scheduler.engine.drain", "scheduler.engine.held",
    "scheduler.engine.kv_capacity", "scheduler.engine.pipeline", "scheduler.engine.prefix_hits",
    "scheduler.engine.rejector", "scheduler.engine.running_requests", "scheduler.request_rejected",
    "simulator.engine.vllm_harness", "simulator.engine.replica", "simulator.engine.vllm_v0",
}
WITH_RAY = {
    "cluster.app", "cluster.keeper", "cluster.replica_policy", "cluster.rollout", "replicas.actor_calls",
    "replicas.cluster_store", "replicas.controller_calls",
    "replicas.engine", "replicas.failed_answers", "replicas.logs", "replicas.measured", "replicas.ray_patches",
    "replicas.server",
    "router.attempts", "router.errors", "router.http_app", "router.in_flight", "router.ingress",
    "router.request_router",
}
MODULES = {name: path for package in PACKAGES for name, path in modules_of(package).items()}
EVIDENCE = {path.stem: path for path in (ROOT / "benchmarks" / "evidence").glob("*.py")}
"""Scripts, which import each other by their file names."""


def imported(module: str, *, typing_too: bool = True, lazily_too: bool = True) -> set[str]:
    path = MODULES.get(module) or EVIDENCE[module]
    return {
        one.module for one in imports_in(path)
        if (typing_too or not one.typing_only) and (lazily_too or one.function is None)
    }


def arrows(
    modules: Collection[str], group: Callable[[str], str] = str, *, typing_too: bool = True
) -> dict[str, set[str]]:
    """Which groups of modules import which others."""
    found: dict[str, set[str]] = {group(module): set() for module in modules}
    for module in modules:
        others = {group(other) for other in imported(module, typing_too=typing_too) if other in modules}
        found[group(module)] |= others - {group(module)}
    return found


def room(module: str) -> str:
    """`scheduler.engine.held` is in scheduler's room `engine`; `scheduler.messages` is its own."""
    return module.split(".")[1] if "." in module else ""


def circle(graph: dict[str, set[str]]) -> list[str]:
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def rising(graph: dict[str, set[str]], layers: Iterable[str]) -> list[str]:
    """Arrows that do not run down the layers; what stands in one layer may not import each other."""
    place = {name: number for number, names in enumerate(layers) for name in names.split()}
    unplaced = graph.keys() - place.keys() - {"", "__main__"}
    assert not unplaced, f"give {sorted(unplaced)} a place in the layers"
    return [
        f"{one} -> {other}" for one, others in graph.items() for other in others
        if one and other and place[one] >= place[other]
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_modules_import_each_other_in_no_circle(package: str) -> None:
    graph = arrows({module for module in MODULES if module.partition(".")[0] == package})
    for name in {module.rpartition(".")[0] for module in graph}:
        graph.pop(name, None)  # an `__init__` that gathers the names of its room
    assert circle({one: others & graph.keys() for one, others in graph.items()}) == []


def test_scripts_of_the_evidence_import_each_other_in_no_circle() -> None:
    """A page's module names its script's dataclasses in annotations only."""
    assert circle(arrows(EVIDENCE, typing_too=False)) == []


@pytest.mark.parametrize("package", LAYERS)
def test_rooms_import_downwards_only(package: str) -> None:
    graph = arrows({m for m in MODULES if m.partition(".")[0] == package}, room)
    assert rising(graph, LAYERS[package]) == []


def test_packages_import_downwards_only() -> None:
    graph = arrows(MODULES, lambda module: module.partition(".")[0])
    assert rising(graph, PACKAGE_LAYERS) == []
    assert graph["scheduler"] == set() and graph["replicas"] == {"scheduler"}
    assert graph["router"] == {"replicas", "scheduler"}
    assert graph["loadgen"] <= {"simulator", "scheduler"}
    assert graph["simulator"] == {"router", "replicas", "scheduler"}
    ours = {name for name in imported_from("simulator") if name.partition(".")[0] in {"router", "replicas"}}
    assert ours == {
        "router.prefixes", "router.ranking", "replicas.routing_stats", "replicas.prompt_blocks", "replicas.marks",
    }, "the routers' decision, without Ray"


def imported_from(package: str) -> set[str]:
    return {other for module in MODULES if module.partition(".")[0] == package for other in imported(module)}


def test_the_model_needs_numpy_and_scipy_alone() -> None:
    outside = {
        other.partition(".")[0] for module in MODULES if module.startswith("scheduler.model") for other in
        imported(module) if not other.startswith("scheduler.model")
    }
    assert outside - set(sys.stdlib_module_names) == {"numpy", "scipy"}


@pytest.mark.parametrize(("package", "allowed"), [("vllm", WITH_VLLM), ("ray", WITH_RAY)])
def test_only_the_named_modules_import_vllm_and_ray(package: str, allowed: set[str]) -> None:
    found = {
        module for module in MODULES
        if any(other.partition(".")[0] == package for other in imported(module, typing_too=False, lazily_too=False))
    }
    assert found == allowed


def test_the_scheduler_has_no_ray_in_it() -> None:
    assert not {other for other in imported_from("scheduler") if other.partition(".")[0] == "ray"}


@pytest.mark.parametrize(("graph", "found"), [
    ({"a": {"b"}, "b": {"a"}}, ["a -> b"]), ({"a": set(), "b": {"a"}}, []), ({"a": {"b"}, "b": set()}, ["a -> b"]),
])
def test_an_arrow_that_runs_back_up_is_found(graph: dict[str, set[str]], found: list[str]) -> None:
    assert rising(graph, ["b", "a"]) == found
    assert bool(circle(graph)) == (len(graph["a"]) + len(graph["b"]) == 2)


def test_every_test_file_has_a_name_of_its_own() -> None:
    """pytest imports them by their names alone: two of one name cannot be collected together, though each can alone."""
    names = Counter(path.name for path in (ROOT / "tests").rglob("test_*.py"))
    assert [name for name, count in names.items() if count > 1] == []
