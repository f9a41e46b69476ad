"""The page of `real_traffic.py` from its runs: conclusion, figures in words, the grid behind them."""
from __future__ import annotations

from pathlib import Path
from typing import Any

Point = tuple[str, str, float, int]
def write_page(path: Path, found: dict[str, dict[str, Any]], results: dict[Point, dict[str, Any]]) -> None:
    print(len(results))
