"""The tables of a Markdown page as data, so that a page's conclusion is computed from what the page shows.

A generator writes its tables first and its conclusion from them. A page without its runs can thus be concluded anew
(`python benchmarks/evidence/conclusions.py`), and a test compares each page with its own conclusion.
"""

from __future__ import annotations

import re
import textwrap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from simulator.output.figures import Line, RatePanel, draw_against_rate

BEGIN, END = "<!-- conclusion: begin -->\n", "<!-- conclusion: end -->\n"
_NUMBER = re.compile(r"[-+−]?\d[\d ,]*(?:\.\d+)?(?:e[-+]?\d+)?")


@dataclass(frozen=True)
class Table:
    """A table below a heading. Each row maps the head's cells, in their order, to its own."""

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]

    def column(self, name: str) -> list[str]:
        """The cells of a column. Raises ValueError for a name that the head lacks."""
        place = self.head.index(name)
        return [row[place] for row in self.rows]

    def numbers(self, name: str) -> list[float | None]:
        """The first number of each cell of a column; None where there is none."""
        return [number(cell) for cell in self.column(name)]

    def pairs(self, key: str, name: str) -> list[tuple[float, float]]:
        """Rows that have a number in both columns."""
        both = zip(self.numbers(key), self.numbers(name), strict=True)
        return [(x, y) for x, y in both if x is not None and y is not None]


def tables(text: str) -> list[Table]:
    """All tables of a page, in order, each under its nearest heading."""
    found, title, lines = [], "", []
    for line in [*text.splitlines(), ""]:
        if line.startswith("|"):
            lines.append(tuple(cell.strip() for cell in line.strip()[1:-1].split("|")))
            continue
        if lines:
            head, rows = lines[0], [row for row in lines[2:] if len(row) == len(lines[0])]
            found.append(Table(title, head, tuple(rows)))
            lines = []
        if line.startswith("#"):
            title = line.lstrip("# ")
    return found


def number(cell: str) -> float | None:
    """The first number of a cell, None where there is none."""
    match = _NUMBER.search(cell)
    return None if match is None else float(re.sub("[ ,]", "", match[0]).replace("−", "-"))


def titled(several: list[Table], title: str) -> Table:
    """The first table below a heading that begins like this. Raises LookupError without one."""
    for table in several:
        if table.title.startswith(title):
            return table
    raise LookupError(f"no table under {title!r}; there is {[table.title for table in several]}")


def with_conclusion(text: str, conclude: Callable[[list[Table]], str]) -> str:
    """The page with what follows from its tables, one paragraph, between its two comments `conclusion`."""
    before, rest = text.split(BEGIN)
    _, after = rest.split(END)
    said = textwrap.fill(conclude(tables(text)), 120, break_long_words=False, break_on_hyphens=False)
    return f"{before}{BEGIN}{said}\n{END}{after}"


def listed(parts: list[str]) -> str:
    """A, B and C."""
    if not parts:
        return "none"
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def percent(share: float, form: str = "+.0") -> str:
    """A relative difference, signed and in whole per cent unless `form` says otherwise."""
    return f"{share:{form}%}"


def draw_goodput(
    stem: Path, title: str, panels: dict[str, tuple[Table, float]], policies: tuple[str, ...]
) -> None:
    """Goodput against the arrival rate; a panel: a table with a column per policy, and the requests/s of load 1."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    drawn = [
        RatePanel(f"goodput (requests/s), {name}", list(_lines(table, policies, rate)), offered=True)
        for name, (table, rate) in panels.items()
    ]
    draw_against_rate(stem, title, drawn)


def _lines(table: Table, policies: tuple[str, ...], rate: float) -> Iterator[Line]:
    for policy in policies:
        points = np.array(table.pairs("load", policy), dtype=float).reshape(-1, 2)
        if points.size:
            yield Line(policy, points[:, 0] * rate, points[:, 1], points[:, 1], points[:, 1])
