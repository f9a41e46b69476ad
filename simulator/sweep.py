"""`headrace sweep`: a grid of simulations on all cores, resumed where it was interrupted."""

from __future__ import annotations

import copy
import hashlib
import json
import multiprocessing
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from scheduler.config_errors import describe
from simulator.config import SimulationError
from simulator.output.run_files import read_run

OPTIONS_FILE = "options.json"
_LONGEST_VALUE = 60
_LONGEST_NAME = 200

Options = dict[str, Any]
RunPoint = Callable[[Options, Path], dict[str, Any]]


class SweepPoint(NamedTuple):
    """One simulation of a sweep: `name` (a file name, such as policy=wait,rate=22,seed=1) and its options."""

    name: str
    options: Options


@dataclass(frozen=True)
class PointResult:
    """The outcome of a point. `summary` is the run's, None for a failed point; `error` is the reason, else None."""

    name: str
    folder: Path
    options: Options
    status: Literal["done", "kept", "failed"]
    summary: dict[str, Any] | None = None
    error: str | None = None


class SweepPlan(BaseModel):
    """A sweep file. base: options of every point; grid: option → values to combine, `a.b` for an option within `a`;
    seeds: short for the last grid entry `seed`; out: the folder that gets a run's folder for every point."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    base: Options = Field(default_factory=dict)
    grid: dict[str, Annotated[list[Any], Field(min_length=1)]] = Field(default_factory=dict)
    seeds: list[int] = Field(default_factory=list)
    out: Path

    @field_validator("base")
    @classmethod
    def _base_is_json(cls, base: Options) -> Options:
        for key, value in base.items():
            _require_json(key, value)
        return base

    @field_validator("grid", "seeds")
    @classmethod
    def _axes_are_sound(cls, value: Any, info: ValidationInfo) -> Any:
        axes = {"seed": value} if info.field_name == "seeds" else value
        if info.field_name == "seeds" and value and "seed" in info.data.get("grid", {}):
            raise ValueError("grid has seed as well; keep one of the two")
        for key, choices in axes.items():
            _require_json(key, choices)
            names = [_value_name(choice) for choice in choices]
            twice = next((name for name in names if names.count(name) > 1), None)
            if twice is not None:
                raise ValueError(f"{key} has the value {twice} more than once")
            for choice in choices:
                _with_options(info.data.get("base", {}), {key: choice})
        return value

    def points(self) -> list[SweepPoint]:
        """Every combination of the grid over `base`: the file's order, its last entry changing fastest."""
        axes = self._axes()
        return [
            SweepPoint(_point_name(axes, values), _with_options(self.base, dict(zip(axes, values, strict=True))))
            for values in product(*axes.values())
        ]

    def _axes(self) -> dict[str, list[Any]]:
        return {**self.grid, **({"seed": list(self.seeds)} if self.seeds else {})}


def load_sweep(path: Path) -> SweepPlan:
    """Read and check a sweep file; its `out` is relative to the working directory.

    Raises:
        SimulationError: naming the file, the key and what is allowed.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SimulationError(f"cannot read {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise SimulationError(f"{path} is not YAML: {error}") from error
    if not isinstance(data, dict):
        raise SimulationError(f"{path} is empty or not a mapping; it must have the keys base, grid and out")
    try:
        return SweepPlan.model_validate(data)
    except ValidationError as error:
        raise SimulationError(f"{path}: {describe(error, SweepPlan)}") from error


def run_sweep(
    plan: SweepPlan, run_point: RunPoint, workers: int, console: Console | None = None
) -> list[PointResult]:
    """Run every point of the plan, see `run_points`."""
    return run_points(plan.points(), plan.out, run_point, workers, console)


def run_points(
    points: Sequence[SweepPoint], out: Path, run_point: RunPoint, workers: int, console: Console | None = None
) -> list[PointResult]:
    """Run points, named differently, in `workers` processes, each in a folder of its name; results keep their order.

    `run_point` gets a point's options and the folder to leave its run in, and returns the run's summary; it must be
    importable by name, as it is called in other processes. A point is kept if its folder holds a run of the same
    options. A point that fails, or loses its process, is reported and the others go on. Ctrl-C ends the workers and is
    raised on. A progress bar goes to `console`.

    Raises:
        ValueError: `workers` is not >= 1.
    """
    if workers < 1:
        raise ValueError(f"workers is {workers}; it must be >= 1")
    results = {point.name: kept for point in points if (kept := kept_run(out, point))}
    todo = [point for point in points if point.name not in results]
    # Closing the generator is what ends the workers when this loop is interrupted.
    with _bar(console) as bar, closing(_run_all(todo, out, run_point, workers)) as ended:
        task = bar.add_task("points", total=len(points), completed=len(results))
        for result in ended:
            results[result.name] = result
            if result.error and console:
                console.print(f"{result.name}: {result.error}", style="red", markup=False, soft_wrap=True)
            bar.advance(task)
    return [results[point.name] for point in points]


def kept_run(out: Path, point: SweepPoint) -> PointResult | None:
    """The point's run if it is in `out` already, whole and of the same options."""
    folder = out / point.name
    try:
        if json.loads((folder / OPTIONS_FILE).read_text(encoding="utf-8")) != json.loads(json.dumps(point.options)):
            return None
        return PointResult(point.name, folder, point.options, "kept", read_run(folder).summary)
    except (OSError, ValueError):  # RunError is one: an interrupted point is run again
        return None


def _run_all(todo: list[SweepPoint], out: Path, run_point: RunPoint, workers: int) -> Generator[PointResult]:
    """Results as they come. A process that dies takes its pool along: the points it may have been at run alone then."""
    remaining = list(todo)
    while remaining:
        pool = _Pool(out, run_point, min(workers, len(remaining)))
        yield from pool.run(remaining)
        for point in pool.lost:
            alone = _Pool(out, run_point, 1)
            yield from alone.run([point])
            for lost in alone.lost:
                error = "its process died, perhaps for want of memory"
                yield PointResult(lost.name, out / lost.name, lost.options, "failed", error=error)


class _Pool:
    """Worker processes that take points off a list until it is empty or one of them dies; `lost` were then running."""

    def __init__(self, out: Path, run_point: RunPoint, workers: int) -> None:
        self.lost: list[SweepPoint] = []
        self._out, self._run_point, self._workers = out, run_point, workers

    def run(self, remaining: list[SweepPoint]) -> Iterator[PointResult]:
        others = set(multiprocessing.active_children())
        # Spawned workers import vLLM once each; a fork would inherit threads' locks.
        pool = ProcessPoolExecutor(
            self._workers, mp_context=multiprocessing.get_context("spawn"), initializer=_start_worker
        )
        try:
            yield from self._drain(pool, remaining)
        except BaseException:
            for child in set(multiprocessing.active_children()) - others:
                child.terminate()
            raise
        finally:
            pool.shutdown(cancel_futures=True)

    def _drain(self, pool: ProcessPoolExecutor, remaining: list[SweepPoint]) -> Iterator[PointResult]:
        running: dict[Future[PointResult], SweepPoint] = {}
        while running or (remaining and not self.lost):
            while remaining and len(running) < self._workers and not self.lost:
                point = remaining.pop(0)
                try:
                    running[pool.submit(_run_point, self._run_point, point, self._out / point.name)] = point
                except BrokenProcessPool:
                    self.lost.append(point)
            for future in wait(running, return_when=FIRST_COMPLETED).done:
                point = running.pop(future)
                if isinstance(future.exception(), BrokenProcessPool):
                    self.lost.append(point)
                else:
                    yield future.result()


def _run_point(run_point: RunPoint, point: SweepPoint, folder: Path) -> PointResult:
    """In a worker: run one point, and write its options beside the run once that is complete."""
    note = folder / OPTIONS_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        note.unlink(missing_ok=True)
        summary = run_point(copy.deepcopy(point.options), folder)
        note.write_text(json.dumps(point.options, indent=1), encoding="utf-8")
    except Exception as error:  # as text: not every exception survives the way to the parent
        return PointResult(point.name, folder, point.options, "failed", error=f"{type(error).__name__}: {error}")
    return PointResult(point.name, folder, point.options, "done", summary)


def _start_worker() -> None:
    """In a worker, before its first point."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process; the parent decides
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # an exception, so that half-written files are removed
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # every core has a worker of its own
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _bar(console: Console | None) -> Progress:
    return Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
        TimeRemainingColumn(), console=console, disable=console is None,
    )


def _with_options(base: Options, chosen: Mapping[str, Any]) -> Options:
    options = copy.deepcopy(base)
    for key, value in chosen.items():
        *path, last = key.split(".")
        place = options
        for part in path:
            place = place.setdefault(part, {})
            if not isinstance(place, dict):
                raise ValueError(f"{key} is within {part}, which is {place!r}; it must be a mapping")
        place[last] = copy.deepcopy(value)
    return options


def _require_json(key: str, value: Any) -> None:
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{key} is {value!r}; it must be finite numbers, texts, lists and mappings") from error


def _point_name(keys: Sequence[str] | Mapping[str, Any], values: Sequence[Any]) -> str:
    name = ",".join(f"{_safe(key)}={_value_name(value)}" for key, value in zip(keys, values, strict=True))
    return _shortened(name or "base", _LONGEST_NAME)


def _value_name(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value, sort_keys=True, separators=(",", ":"))
    safe = _safe(text)
    # Two values must not share a folder because their differences are not fit for file names.
    return _shortened(safe, _LONGEST_VALUE) if safe == text else _shortened(f"{safe}-{_digest(text)}", _LONGEST_VALUE)


def _shortened(name: str, most: int) -> str:
    return name if len(name) <= most else f"{name[: most - 9]}-{_digest(name)}"


def _safe(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9._+:-]+", "_", text).strip("_")


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:8]
