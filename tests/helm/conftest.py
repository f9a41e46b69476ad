"""What the chart's tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from chart_examples import CHART
from helm_python import Chart


@pytest.fixture(scope="session")
def chart() -> Iterator[Chart]:
    with Chart.load(CHART) as loaded:
        yield loaded
