"""`headrace report`: a Markdown table and figures that compare runs."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.compute as pc
from rich.console import Console
from rich.progress import track

from simulator.output.figures import (
    REPLICAS_SHOWN,
    Curve,
    Line,
    RatePanel,
    Series,
    TimePanel,
    draw_against_rate,
    draw_ecdfs,
    draw_over_time,
    ecdf,
    thin,
)
from simulator.output.metrics import request_delays_s
from simulator.output.run_files import REQUESTS_FILE, Run, RunError, read_run

MOST_TIMELINES = 6
MOST_RATES = 6

# Differences in these do not make another system under test.
_NOT_A_SETTING = {
    "policy", "thresholds_in_force", "workload.name", "workload.rate_rps", "workload.seed", "workload.requests",
}
_DELAYS = {"latency": "latency (s)", "ttft": "time to first token (s)", "tpot": "time per output token (s)"}
_COLUMNS: dict[str, str] = {
    "requests": "requests", "goodput /s": "goodput_rps", "throughput /s": "throughput_rps",
    "mean latency s": "latency_mean_s", "p99 latency s": "latency_p99_s", "mean TTFT s": "ttft_mean_s",
    "p99 TTFT s": "ttft_p99_s", "p50 TPOT s": "tpot_p50_s", "p99 TPOT s": "tpot_p99_s", "preemptions": "preemptions",
    "recomputed tokens": "recomputed_tokens", "KV peak": "kv_peak_fraction",
}


@dataclass(frozen=True)
class _Entry:
    """A run with what places it in a figure; `label` is its policy, and its settings where runs of a policy differ."""

    run: Run
    policy: str
    label: str
    workload: str
    rate_rps: float | None
    seed: int | None

    @property
    def title(self) -> str:
        rate = "" if self.rate_rps is None else f", {self.rate_rps:g} requests/s"
        return f"{self.label}, {self.workload}{rate}" + ("" if self.seed is None else f", seed {self.seed}")

    def target_s(self, name: str) -> float | None:
        return (self.run.config.get("slo") or {}).get(f"{name}_s")


@dataclass(frozen=True)
class _Drawing:
    heading: str
    name: str
    draw: Callable[[Path], None]


def find_runs(folders: Sequence[Path]) -> list[Path]:
    """The given folders that are runs, and the runs one or two levels below the others, each once.

    Raises:
        RunError: a folder neither is nor holds a run.
    """
    found: list[Path] = []
    for folder in folders:
        below = [folder] if (folder / REQUESTS_FILE).is_file() else _runs_below(folder)
        if not below:
            raise RunError(f"{folder} neither is a run nor holds one: no {REQUESTS_FILE} in it or two levels below")
        found += below
    return list(dict.fromkeys(path.resolve() for path in found))


def _runs_below(folder: Path) -> list[Path]:
    return sorted(path.parent for depth in ("*", "*/*") for path in folder.glob(f"{depth}/{REQUESTS_FILE}"))


def make_report(
    runs: Sequence[Path], out: Path, console: Console | None = None, *, over_time: Sequence[Path] | None = None
) -> Path:
    """Write `out`/report.md and `out`/figures for runs (or folders of runs); returns the report's path.

    For every workload, the measures against rate and the distributions of delays, a line a policy (and settings, where
    these differ), seeds averaged; over time, the runs of `over_time`, or when None all up to MOST_TIMELINES and else
    each policy's at its highest rate. A progress bar goes to `console`.

    Raises:
        RunError: see `find_runs` and `read_run`.
    """
    entries = _entries([read_run(folder) for folder in find_runs(runs)])
    selected = find_runs(over_time) if over_time is not None else None
    drawings = [*_comparisons(entries), *_timelines(entries, selected)]
    figures = out / "figures"
    figures.mkdir(parents=True, exist_ok=True)
    for drawing in track(drawings, "drawing", console=console, transient=True, disable=console is None):
        drawing.draw(figures / drawing.name)
    report = out / "report.md"
    report.write_text("\n".join(_markdown(entries, drawings)).rstrip() + "\n", encoding="utf-8")
    return report


def _entries(runs: list[Run]) -> list[_Entry]:
    """The runs, by workload, policy, settings, rate and seed, with the labels that tell their settings apart."""
    peers: dict[tuple[str, str], list[_Entry]] = {}
    for entry in map(_entry, runs):
        peers.setdefault((entry.workload, entry.policy), []).append(entry)
    labelled = [entry for group in peers.values() for entry in _labelled(group)]
    return sorted(labelled, key=lambda e: (e.workload, e.label, e.rate_rps or 0, e.seed or 0))


def _labelled(peers: list[_Entry]) -> Iterator[_Entry]:
    settings = [_settings(entry.run.config) for entry in peers]
    keys = sorted({key for own in settings for key in own})
    telling = [key for key in keys if any(own.get(key) != settings[0].get(key) for own in settings)]
    for entry, own in zip(peers, settings, strict=True):
        extra = ", ".join(f"{key.removeprefix('workload.')}={own.get(key)}" for key in telling)
        yield replace(entry, label=f"{entry.policy} ({extra})" if extra else entry.policy)


def _entry(run: Run) -> _Entry:
    workload = run.config.get("workload") or {}
    policy = str(run.config.get("policy") or run.summary.get("policy") or "unknown policy")
    rate_rps = workload.get("rate_rps") or run.summary.get("rate_rps")
    return _Entry(run, policy, policy, str(workload.get("name") or "workload"), rate_rps, workload.get("seed"))


def _settings(config: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in config.items():
        name = f"{prefix}{key}"
        if name in _NOT_A_SETTING:
            continue
        flat |= _settings(value, f"{name}.") if isinstance(value, dict) else {name: value}
    return flat


def _comparisons(entries: list[_Entry]) -> Iterator[_Drawing]:
    for workload in dict.fromkeys(entry.workload for entry in entries):
        group = [entry for entry in entries if entry.workload == workload]
        slug = _slug(workload)
        if any(entry.rate_rps is not None for entry in group):
            for name, panels in _rate_figures(group).items():
                yield _Drawing(
                    f"{workload}: against the arrival rate", f"{slug}-{name}",
                    partial(draw_against_rate, title=workload, panels=panels),
                )
        for name in _DELAYS:
            yield _Drawing(
                f"{workload}: distributions", f"{slug}-{name}-ecdf", partial(_draw_delays, entries=group, name=name)
            )


def _rate_figures(group: list[_Entry]) -> dict[str, list[RatePanel]]:
    def panel(y_label: str, key: str, target: str) -> RatePanel:
        return RatePanel(y_label, _lines(group, key), target=_shared_target_s(group, target))

    return {
        "goodput": [RatePanel("goodput (requests/s)", _lines(group, "goodput_rps"), offered=True)],
        "latency-mean": [panel("mean latency (s)", "latency_mean_s", "latency")],
        "ttft-p99": [panel("p99 time to first token (s)", "ttft_p99_s", "ttft")],
        "tpot": [panel(f"{q} time per output token (s)", f"tpot_{q}_s", "tpot") for q in ("p50", "p99")],
    }


def _lines(group: list[_Entry], key: str) -> list[Line]:
    lines = []
    for label in dict.fromkeys(entry.label for entry in group):
        by_rate: dict[float, list[float]] = {}
        for entry in group:
            if entry.label == label and entry.rate_rps is not None:
                value = entry.run.summary.get(key)
                by_rate.setdefault(entry.rate_rps, []).extend([] if value is None else [value])
        seeds = [values or [np.nan] for _, values in sorted(by_rate.items())]
        lines.append(
            Line(
                label, np.array(sorted(by_rate)), np.array([np.mean(values) for values in seeds]),
                np.array([min(values) for values in seeds]), np.array([max(values) for values in seeds]),
            )
        )
    return lines


def _shared_target_s(group: list[_Entry], name: str) -> float | None:
    targets_s = {entry.target_s(name) for entry in group}
    return targets_s.pop() if len(targets_s) == 1 else None


def _draw_delays(stem: Path, entries: list[_Entry], name: str) -> None:
    rates = sorted({entry.rate_rps for entry in entries}, key=lambda rate: -(rate or 0))[:MOST_RATES]
    labels = list(dict.fromkeys(entry.label for entry in entries))
    panels = {
        "own arrival times" if rate is None else f"{rate:g} requests/s": _delay_curves(
            [entry for entry in entries if entry.rate_rps == rate], name
        )
        for rate in rates
    }
    draw_ecdfs(stem, entries[0].workload, _DELAYS[name], labels, panels, _shared_target_s(entries, name))


def _delay_curves(entries: list[_Entry], name: str) -> dict[str, Curve]:
    curves = {}
    for label in dict.fromkeys(entry.label for entry in entries):
        delays_s = np.concatenate([_delays_s(entry.run, name) for entry in entries if entry.label == label])
        if delays_s.size:
            curves[label] = ecdf(delays_s)
    return curves


def _delays_s(run: Run, name: str) -> Any:
    window = {key: run.summary.get(f"window_{key}") for key in ("from_s", "to_s")}
    delays_s = request_delays_s(run.folder, **{key: value for key, value in window.items() if value is not None})[name]
    return delays_s[~np.isnan(delays_s)]


def _timelines(entries: list[_Entry], selected: list[Path] | None) -> Iterator[_Drawing]:
    chosen = _highest_rates(entries) if selected is None else [e for e in entries if e.run.folder in selected]
    for number, entry in enumerate((e for e in chosen if e.run.has_iterations), start=1):
        yield _Drawing("Over time", f"over-time-{number}-{_slug(entry.title)}", partial(_draw_timeline, entry=entry))


def _highest_rates(entries: list[_Entry]) -> list[_Entry]:
    if len(entries) <= MOST_TIMELINES:
        return entries
    highest: dict[tuple[str, str], _Entry] = {}
    for entry in entries:
        held = highest.setdefault((entry.workload, entry.label), entry)
        if (entry.rate_rps or 0) > (held.rate_rps or 0):
            highest[entry.workload, entry.label] = entry
    return list(highest.values())[:MOST_TIMELINES]


def _draw_timeline(stem: Path, entry: _Entry) -> None:
    run, kv_tokens = entry.run, entry.run.config.get("kv_tokens")
    used = _series(run, "kv_used_tokens", scale=1 / kv_tokens if kv_tokens else 1.0)
    panels = [
        TimePanel("KV cache used" if kv_tokens else "KV tokens used", {"used": used}, top=1.05 if kv_tokens else None),
        TimePanel("requests", {"running": _series(run, "running")}, {"cap": _series(run, "max_running")}),
        TimePanel("requests", {"waiting": _series(run, "waiting"), "held": _series(run, "held")}),
        TimePanel(
            "tokens an iteration", {"computed": _series(run, "prefill_tokens", "decode_tokens")},
            {"budget": _series(run, "token_budget")},
        ),
    ]
    replicas = run.config.get("replicas") or 1
    shown = f" (replicas 0 to {REPLICAS_SHOWN - 1} of {replicas})" if replicas > REPLICAS_SHOWN else ""
    draw_over_time(stem, entry.title + shown, panels)


def _series(run: Run, *columns: str, scale: float = 1.0) -> list[Series]:
    """The sum of the columns over time on each replica that is shown."""
    rows = run.iterations(["replica", "start_s", *columns])
    series = []
    for replica in range(REPLICAS_SHOWN):
        own = rows.filter(pc.equal(rows["replica"], replica))
        if own.num_rows:
            values = np.sum([np.asarray(own[column].to_numpy(), np.float64) for column in columns], axis=0) * scale
            series.append(Series(*thin(own["start_s"].to_numpy(), values)))
    return series


def _markdown(entries: list[_Entry], drawings: list[_Drawing]) -> Iterator[str]:
    yield "# Simulation report\n"
    for versions in dict.fromkeys(tuple(entry.run.versions.items()) for entry in entries):
        yield "Run with " + ", ".join(f"{name} {version}" for name, version in versions) + ".\n"
    headers = ["policy", "workload", "rate /s", "seed", *_COLUMNS]
    yield _row(headers)
    yield _row(["---", "---", *["---:"] * (len(headers) - 2)])
    for entry in entries:
        values = [entry.rate_rps, entry.seed, *(entry.run.summary.get(key) for key in _COLUMNS.values())]
        yield _row([entry.label, entry.workload, *map(_number, values)])
    yield ""
    heading = ""
    for drawing in drawings:
        if drawing.heading != heading:
            heading = drawing.heading
            yield f"## {heading}\n"
        yield f"![{drawing.name}](figures/{drawing.name}.png)\n"
    without = [entry.title for entry in entries if not entry.run.has_iterations]
    if without:
        yield f"Kept no iterations: {'; '.join(without)}."


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float | None) -> str:
    if value is None:
        return "–"
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:.0f}"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9.]+", "-", text.lower()).strip("-")
