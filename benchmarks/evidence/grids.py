"""Grids of simulations behind the evidence pages: run what is missing on all cores, average over seeds."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from rich.console import Console

from scheduler.model.fluid import FluidEquilibrium, solve_fluid
from scheduler.model.profiles import load_profile
from simulator.run import simulate_options
from simulator.sweep import PointResult, SweepPlan, SweepPoint, kept_run, run_points
from simulator.workload.config import WorkloadConfig
from simulator.workload.requests import open_workload

PROFILE = "a100-llama2-7b"
CONSOLE = Console(stderr=True)
Cells = dict[tuple[Any, ...], list[dict[str, Any]]]


def arguments(description: str | None, runs: str) -> argparse.ArgumentParser:
    """The options that every page's command has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("docs/evidence"))
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument("--quick", action="store_true")
    return parser


def slug(name: str) -> str:
    """A title as a part of file names."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def fluid_of(lengths: str, profile: str) -> FluidEquilibrium:
    """The equilibrium of one request a second; its critical rate scale is the capacity in requests/s."""
    mix = open_workload(WorkloadConfig(lengths=lengths, requests=1, rate_rps=1.0)).mix()
    loaded = load_profile(profile)
    return solve_fluid(mix, loaded.time_model, loaded.kv_capacity_tokens)


@dataclass(frozen=True)
class Grid:
    """Options of every point, options to combine, and seeds."""

    base: dict[str, Any]
    axes: dict[str, list[Any]]
    seeds: Sequence[int] = (1, 2, 3)


@dataclass(frozen=True)
class Choice:
    """Which runs to work on: in how many processes (0: none is run), only these groups, seeds, and what anew."""

    workers: int
    only: re.Pattern[str] | None = None
    seeds: int | None = None
    again: re.Pattern[str] | None = None

    @staticmethod
    def options(parser: argparse.ArgumentParser) -> None:
        """Let a command line choose; a group's name is in its runs' folder."""
        parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes; 0 runs nothing")
        parser.add_argument("--only", type=re.compile, help="run only groups of this name (a regular expression)")
        parser.add_argument("--seeds", type=int, help="run no seed beyond this one")
        parser.add_argument("--again", type=re.compile, help="drop the runs of groups of this name and run them anew")

    @classmethod
    def of(cls, args: argparse.Namespace) -> Choice:
        """What the command line asks for."""
        return cls(args.workers, args.only, args.seeds, args.again)

    def drops(self, group: str) -> bool:
        """Whether the group's runs are to be thrown away first."""
        return self.workers > 0 and self.again is not None and bool(self.again.search(group)) and self.runs(group)

    def runs(self, group: str, seed: int = 0) -> bool:
        """Whether the group's missing runs, those of this seed, are to be made."""
        seeded = self.seeds is None or seed <= self.seeds
        return self.workers > 0 and seeded and (self.only is None or bool(self.only.search(group)))


class Summaries:
    """The summaries behind a page, in a file beside it: a page can be continued, and checked, without the runs.

    One line a run; a run counts only with the same options, in which a path is the name of its file.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        text = path.read_text() if path is not None and path.is_file() else "{}"
        self._known: dict[str, dict[str, Any]] = json.loads(text)

    def of(self, point: SweepPoint, out: Path) -> PointResult | None:
        """The point's run, if its summary is known."""
        known = self._known.get(point.name)
        if known is None or known["options"] != _portable(point.options):
            return None
        return PointResult(point.name, out / point.name, point.options, "kept", known["summary"])

    def write(self, results: Iterable[PointResult]) -> None:
        """Write these, and no others."""
        if self._path is None:
            return
        found = {
            one.name: {"options": _portable(one.options), "summary": _rounded(one.summary)} for one in results
            if one.summary
        }
        lines = [f"{json.dumps(name)}: {json.dumps(found[name])}" for name in sorted(found)]
        self._path.write_text("{\n" + ",\n".join(lines) + "\n}\n")


def _portable(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: Path(value).name if isinstance(value, str) and "/" in value else value
            for name, value in options.items()}


def _rounded(summary: Mapping[str, Any]) -> dict[str, Any]:
    """The numbers of a summary to six digits, without what differs from one machine to another."""
    return {
        name: float(f"{value:.6g}") if isinstance(value, float) else value for name, value in summary.items()
        if name not in ("notes", "wall_s")
    }


def run_grids(
    out: Path, grids: Mapping[str, Grid], choice: Choice | None = None, summaries: Path | None = None
) -> dict[str, list[PointResult]]:
    """The points of all grids, by grid; runs that are in `out` already are kept. Ends the program when one fails.

    With a `choice`, points that are not chosen and not there are left out of the result. summaries: see `Summaries`.
    """
    choice, known = choice or Choice(os.cpu_count() or 1), Summaries(summaries)
    points = {
        name: [
            SweepPoint(f"{name}/{point.name}", point.options)
            for point in SweepPlan(base=grid.base, grid=grid.axes, seeds=list(grid.seeds), out=out).points()
        ]
        for name, grid in grids.items()
    }
    for name in filter(choice.drops, points):
        shutil.rmtree(out / name, ignore_errors=True)
    found = {
        point.name: result for name, several in points.items() if not choice.drops(name)
        for point in several if kept_run(out, point) is None and (result := known.of(point, out)) is not None
    }
    wanted = [
        point for name, several in points.items() for point in several if point.name not in found
        and (choice.runs(name, point.options.get("seed", 0)) or kept_run(out, point) is not None)
    ]
    results = run_points(wanted, out, simulate_options, max(1, choice.workers), CONSOLE)
    failed = [result for result in results if result.error]
    if failed:
        raise SystemExit("\n".join(f"{result.name}: {result.error}" for result in failed))
    by_name = found | {result.name: result for result in results}
    known.write(by_name.values())
    return {
        name: [by_name[point.name] for point in several if point.name in by_name] for name, several in points.items()
    }


def by(results: Iterable[PointResult], *keys: str) -> Cells:
    """Summaries of the points that agree in `keys` (their seeds), in the grid's order."""
    cells: Cells = defaultdict(list)
    for result in results:
        if result.summary:
            cells[tuple(result.options.get(key) for key in keys)].append(result.summary)
    return dict(cells)


def mean_of(summaries: list[dict[str, Any]], key: str) -> float:
    """Mean over seeds; a measure without a value counts as 0."""
    return mean(summary[key] or 0.0 for summary in summaries)


def with_spread(summaries: list[dict[str, Any]], key: str, digits: int = 2) -> str:
    """Mean over seeds with the smallest and the largest, for a table's cell."""
    values = [summary[key] or 0.0 for summary in summaries]
    text = f"{mean(values):.{digits}f}"
    return text if len(values) == 1 else f"{text} ({min(values):.{digits}f}–{max(values):.{digits}f})"


def best(cells: Cells, key: str, choose: Callable[..., Any] = min) -> tuple[Any, ...]:
    """The cell with the best mean over seeds."""
    chosen: tuple[Any, ...] = choose(cells, key=lambda cell: mean_of(cells[cell], key))
    return chosen
