"""A request that is refused before it reaches an endpoint: its status, one sentence, and how to send them. No Ray."""

from __future__ import annotations

import json
from dataclasses import dataclass
from http import HTTPStatus
from typing import Any

from scheduler.openai_error import error_body

LONGEST_MESSAGE = 200
"""Characters of a message that may repeat a client's input."""


@dataclass(frozen=True, slots=True)
class Refusal(Exception):
    """status: of HTTP; message: one sentence; retry_after_s: for 429. closes: the connection ends too, since more of
    the request may follow. reason: a word for the metrics."""

    status: int
    message: str
    retry_after_s: int | None = None
    closes: bool = False
    reason: str = ""

    async def send(self, send: Any) -> None:
        """Answer over ASGI."""
        body = json.dumps(error_body(self.status, self.message)).encode()
        headers = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        if self.retry_after_s is not None:
            headers.append((b"retry-after", b"%d" % self.retry_after_s))
        if self.status == HTTPStatus.UNAUTHORIZED:
            headers.append((b"www-authenticate", b"Bearer"))
        if self.closes:
            headers.append((b"connection", b"close"))
        await send({"type": "http.response.start", "status": self.status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def shortened(text: str, longest: int = LONGEST_MESSAGE) -> str:
    """One line of at most `longest` characters, whatever a client sent."""
    line = " ".join(text.split()).encode("utf-8", "replace").decode()
    return line if len(line) <= longest else line[: longest - 1] + "…"
