"""The page docs/evidence/overload.md from the runs of `overload.py`."""

from __future__ import annotations

def page(cases, contenders, bounds, runs):
    return ""
