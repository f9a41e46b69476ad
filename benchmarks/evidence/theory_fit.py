"""What the parts of theory.py share: slopes and tables."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray


def loglog_slope(x: NDArray[np.float64], y: NDArray[np.float64], y_errors: NDArray[np.float64]) -> tuple[float, float]:
    """Least-squares slope of ln y against ln x, and its standard error from those of y."""
    centred = np.log(x) - np.log(x).mean()
    weights = centred / (centred @ centred)
    return float(weights @ np.log(y)), float(np.linalg.norm(weights * y_errors / y))


def table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in (header, ("---",) * len(header), *rows))
