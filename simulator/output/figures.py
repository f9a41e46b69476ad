"""Figures of runs: measures against the arrival rate, one run over time, distributions of delays.

Each drawing function writes STEM.png and STEM.svg; the same data give the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.style
import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Curve = tuple[Floats, Floats]
MOST_POINTS = 2000
REPLICAS_SHOWN = 4

# Okabe and Ito's colours, which colour-blind readers can tell apart, without the yellow that white paper swallows.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
_MARKERS = "os^DvPX"
_DASHES = ("-", "--", ":", "-.")
_TARGET: dict[str, Any] = {"color": "0.2", "linewidth": 1.0, "linestyle": ":", "label": "target"}
_STYLE: list[Any] = [
    "default",
    {
        "svg.hashsalt": "headrace", "svg.fonttype": "none", "font.size": 9, "axes.titlesize": 9, "axes.grid": True,
        "grid.alpha": 0.3, "grid.linewidth": 0.5, "lines.linewidth": 1.2, "axes.spines.top": False,
        "axes.spines.right": False, "legend.frameon": False, "legend.fontsize": 8, "text.parse_math": False,
        "savefig.dpi": 110,
    },
]


@dataclass(frozen=True)
class Line:
    """One policy's measure against rate: `y` with the range `low` to `high` over seeds; all of one length."""

    label: str
    rate_rps: Floats
    y: Floats
    low: Floats
    high: Floats


@dataclass(frozen=True)
class RatePanel:
    """One set of axes against rate. `offered` draws the arrival rate itself; `target` is a line to stay below."""

    y_label: str
    lines: Sequence[Line]
    offered: bool = False
    target: float | None = None


@dataclass(frozen=True)
class Series:
    """Values over time on one replica; a value holds until the next, NaN leaves a gap."""

    time_s: Floats
    values: Floats


@dataclass(frozen=True)
class TimePanel:
    """One set of axes over time: series by replica under each name; limits likewise, dashed, their values named.

    `top` is the axis's end; None is where the values end.
    """

    y_label: str
    series: Mapping[str, Sequence[Series]]
    limits: Mapping[str, Sequence[Series]] = field(default_factory=dict)
    top: float | None = None


def thin(x: Floats, y: Floats, most: int = MOST_POINTS) -> Curve:
    """At most `most` (>= 3) of the points, in order: of each bin of neighbours the least, the greatest and the last y,
    so that no peak is lost."""
    if len(x) <= most:
        return x, y
    kept: set[int] = set()
    for bin_ in np.array_split(np.arange(len(x)), most // 3):
        known = bin_[~np.isnan(y[bin_])]
        if known.size:
            kept |= {int(known[y[known].argmin()]), int(known[y[known].argmax()])}
        kept.add(int(bin_[-1]))
    chosen = np.array(sorted(kept))
    return x[chosen], y[chosen]


def ecdf(values: Floats, most: int = MOST_POINTS) -> Curve:
    """Sorted values and the share at or below each, thinned to at most `most` points with both ends among them."""
    ordered = np.sort(values)
    chosen = np.unique(np.linspace(0, len(ordered) - 1, min(most, len(ordered))).round().astype(np.int64))
    return ordered[chosen], (chosen + 1) / max(len(ordered), 1)


def draw_against_rate(stem: Path, title: str, panels: Sequence[RatePanel]) -> None:
    """A row of panels with one line a policy, all panels in the same order; a band where seeds differ."""
    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(4.6 * len(panels), 3.4), layout="constrained")
        figure.suptitle(title, fontsize=10)
        all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
        for axes, panel in zip(all_axes, panels, strict=True):
            for line, style in zip(panel.lines, _styles(len(panel.lines), markers=True), strict=True):
                axes.plot(line.rate_rps, line.y, label=line.label, markersize=4, **style)
                if np.any(line.low < line.high):
                    axes.fill_between(line.rate_rps, line.low, line.high, color=style["color"], alpha=0.2, linewidth=0)
            if panel.offered:
                rates = np.unique(np.concatenate([line.rate_rps for line in panel.lines]))
                axes.plot(rates, rates, color="0.5", linewidth=0.7, label="offered")
            if panel.target is not None:
                axes.axhline(panel.target, **_TARGET)
            _scale_up(axes, panel)
            axes.set(xlabel="arrival rate (requests/s)", ylabel=panel.y_label)
            axes.legend()
        _save(figure, stem)


def draw_over_time(stem: Path, title: str, panels: Sequence[TimePanel]) -> None:
    """Panels under each other on one time axis, a line a replica (the first REPLICAS_SHOWN)."""
    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(8, 1.7 * len(panels) + 0.6), layout="constrained")
        figure.suptitle(title, fontsize=10)
        all_axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, panel in zip(all_axes, panels, strict=True):
            _plot_series(axes, panel)
            axes.set_ylabel(panel.y_label)
            if len(axes.get_lines()) > 1:
                axes.legend(loc="upper left", bbox_to_anchor=(1, 1))
        all_axes[-1].set_xlabel("virtual time (s)")
        _save(figure, stem)


def draw_ecdfs(
    stem: Path, title: str, x_label: str, labels: Sequence[str], panels: Mapping[str, Mapping[str, Curve]],
    target: float | None = None,
) -> None:
    """A panel a key of `panels`, three in a row; in each, the curves (see `ecdf`) under the labels it has.

    `labels` are those of all panels, in the order that gives them their colours.
    """
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    styles = dict(zip(labels, _styles(len(labels)), strict=True))
    ends = np.array([values[i] for curves in panels.values() for values, _ in curves.values() for i in (0, -1)])
    with matplotlib.style.context(_STYLE):
        figure = Figure(figsize=(3.4 * columns, 2.8 * rows + 0.3), layout="constrained")
        figure.suptitle(title, fontsize=10)
        all_axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
        for axes in all_axes[len(panels) :]:
            axes.set_visible(False)
        for axes, (name, curves) in zip(all_axes, panels.items(), strict=False):
            for label, curve in curves.items():
                axes.plot(*curve, drawstyle="steps-post", label=label, **styles[label])
            if target is not None:
                axes.axvline(target, **_TARGET)
            axes.set(title=name, xlabel=x_label, ylabel="share of requests", ylim=(0, 1.02))
            if _spans_decades(ends):
                axes.set_xscale("log")
                _plain_decades(axes.xaxis)
            axes.tick_params(labelbottom=True)
            if curves:
                axes.legend(loc="lower right")
        _save(figure, stem)


def _plot_series(axes: Any, panel: TimePanel) -> None:
    limits = {f"{name} {_range(several)}": several for name, several in panel.limits.items() if _highest(several) > 0}
    names = {**panel.series, **limits}
    for (name, several), style in zip(names.items(), _styles(len(names)), strict=True):
        for replica, series in enumerate(several[:REPLICAS_SHOWN]):
            axes.plot(
                series.time_s, series.values, drawstyle="steps-post", linewidth=0.7, color=style["color"],
                linestyle="--" if name in limits else "-", alpha=1 - 0.2 * replica, label="_" if replica else name,
            )
    highest = max(_highest(several) for several in panel.series.values())
    # A limit far above would flatten the rest; its value is in the legend.
    near = [limit for limit in map(_highest, limits.values()) if limit <= 3 * highest]
    axes.set_ylim(0, panel.top or 1.1 * max([highest, *near]) or 1)


def _highest(several: Sequence[Series]) -> float:
    return max((float(np.nanmax(s.values)) for s in several if not np.isnan(s.values).all()), default=0.0)


def _range(several: Sequence[Series]) -> str:
    lowest = min(float(np.nanmin(s.values)) for s in several if not np.isnan(s.values).all())
    highest = _highest(several)
    return f"{highest:g}" if lowest == highest else f"{lowest:g}–{highest:g}"


def _scale_up(axes: Any, panel: RatePanel) -> None:
    """Delays that explode with the rate are drawn on a logarithmic axis, anything else from zero."""
    values = np.concatenate([line.y[~np.isnan(line.y)] for line in panel.lines])
    if not panel.offered and _spans_decades(values):
        axes.set_yscale("log")
        _plain_decades(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)


def _spans_decades(values: Floats) -> bool:
    return bool(values.size and values.min() > 0 and values.max() > 20 * values.min())


def _plain_decades(axis: Any) -> None:
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter(NullFormatter())


def _styles(count: int, *, markers: bool = False) -> list[dict[str, Any]]:
    styles: list[dict[str, Any]] = []
    for i in range(count):
        style = {"color": _COLOURS[i % len(_COLOURS)], "linestyle": _DASHES[i // len(_COLOURS) % len(_DASHES)]}
        styles.append(style | {"marker": _MARKERS[i % len(_MARKERS)]} if markers else style)
    return styles


def _save(figure: Figure, stem: Path) -> None:
    # Dates and version strings would make equal figures differ.
    figure.savefig(f"{stem}.png", metadata={"Software": None})
    figure.set_layout_engine("none")  # it is laid out, and that is the slow part
    figure.savefig(f"{stem}.svg", metadata={"Date": None, "Creator": None})
