"""Who changes something over `/admin`, and why: bounded, printable, as events and pins keep it."""

from __future__ import annotations

import time
from typing import Annotated, Any

from pydantic import AfterValidator, Field

LONGEST_NAME, LONGEST_REASON = 80, 200


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters are allowed, and no line ends")
    return text


Name = Annotated[str, Field(max_length=LONGEST_NAME), AfterValidator(_printable)]
"""What an operator calls itself."""
Reason = Annotated[str, Field(max_length=LONGEST_REASON), AfterValidator(_printable)]


def author(by: str, key: str, reason: str) -> dict[str, Any]:
    """by: the operator's name for itself; key: the key of the request ("operator key" or "anonymous"); now."""
    return {"by": by, "key": key, "at_unix_s": time.time(), "reason": reason}
