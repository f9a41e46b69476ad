"""The HTTP reference is what the ingress registers, which needs Ray to be read."""

from __future__ import annotations

import pytest

from tools.docs.reference import COMMAND, FOLDER, http_page

pytestmark = [pytest.mark.ray, pytest.mark.engine]


def test_the_page_is_up_to_date_and_every_key_has_a_meaning() -> None:
    page = http_page()
    assert (FOLDER / "http.md").read_text("utf-8") == page, f"run: {COMMAND}"
    assert "PUT /admin/thresholds" in page
    assert not [line for line in page.splitlines() if line.startswith("| `") and line.endswith("|  |")]
