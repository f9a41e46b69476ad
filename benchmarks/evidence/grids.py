"""Grids of simulations behind the evidence pages: run what is missing on all cores, average over seeds."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from simulator.run import simulate_options
from simulator.sweep import PointResult, SweepPlan, SweepPoint, run_points

CONSOLE = Console(stderr=True)
Cells = dict[tuple[Any, ...], list[dict[str, Any]]]


@dataclass(frozen=True)
class Grid:
    """Options of every point, options to combine, and seeds."""

    base: dict[str, Any]
    axes: dict[str, list[Any]]
    seeds: Sequence[int] = (1, 2, 3)


def run_grids(out: Path, grids: Mapping[str, Grid]) -> dict[str, list[PointResult]]:
    """All points of all grids, by grid; runs that are in `out` already are kept. Ends the program when one fails."""
    points = {
        name: [
            SweepPoint(f"{name}/{point.name}", point.options)
            for point in SweepPlan(base=grid.base, grid=grid.axes, seeds=list(grid.seeds), out=out).points()
        ]
        for name, grid in grids.items()
    }
    everything = [point for several in points.values() for point in several]
    results = run_points(everything, out, simulate_options, os.cpu_count() or 1, CONSOLE)
    failed = [result for result in results if result.error]
    if failed:
        raise SystemExit("\n".join(f"{result.name}: {result.error}" for result in failed))
    by_name = {result.name: result for result in results}
    return {name: [by_name[point.name] for point in several] for name, several in points.items()}


def by(results: Iterable[PointResult], *keys: str) -> Cells:
    """Summaries of the points that agree in `keys` (their seeds), in the grid's order."""
    cells: Cells = defaultdict(list)
    for result in results:
        if result.summary:
            cells[tuple(result.options.get(key) for key in keys)].append(result.summary)
    return dict(cells)


def mean_of(summaries: list[dict[str, Any]], key: str) -> float:
    """Mean over seeds; a measure that nobody reached counts as 0."""
    return mean(summary[key] or 0.0 for summary in summaries)


def with_spread(summaries: list[dict[str, Any]], key: str, digits: int = 2) -> str:
    """Mean over seeds with the smallest and the largest, for a table's cell."""
    values = [summary[key] or 0.0 for summary in summaries]
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def best(cells: Cells, key: str, choose: Callable[..., Any] = min) -> tuple[Any, ...]:
    """The cell whose mean over seeds is best."""
    chosen: tuple[Any, ...] = choose(cells, key=lambda cell: mean_of(cells[cell], key))
    return chosen
