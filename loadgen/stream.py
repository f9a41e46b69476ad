"""A streamed output: OpenAI-style server-sent events, and the time of each token."""

from __future__ import annotations

import json
from typing import Any


class StreamError(Exception):
    """The server said inside the stream that the request failed; `code` is its status, if it named one."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


class TokenStream:
    """The tokens of one output.

    An event may carry several tokens. vLLM sends the count so far with each (`continuous_usage_stats`). Without it
    an event with text counts as one token until the closing `usage` gives the true count; missing tokens then get the
    last event's time.

    token_s: when each token came. ended: the server marked the output as complete. finish_reason,
    prompt_tokens: as the server reported them, None before.
    """

    def __init__(self) -> None:
        self.token_s: list[float] = []
        self.ended = False
        self.finish_reason: str | None = None
        self.prompt_tokens: int | None = None
        self._rest = b""
        self._latest_s = 0.0

    def feed(self, data: bytes, now_s: float) -> None:
        """Read what the network brought at `now_s`.

        Raises:
            StreamError: the server reports an error, or sends what is no event.
        """
        # Lines end with \n only: a token's text may hold the other characters that str.splitlines takes for an end.
        *lines, self._rest = (self._rest + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._event(line.removeprefix(b"data:").strip(), now_s)

    def _event(self, data: bytes, now_s: float) -> None:
        if data == b"[DONE]":
            self.ended = True
            return
        try:
            event = json.loads(data)
        except ValueError as error:
            raise StreamError(f"an event is no JSON: {data[:80]!r}") from error
        if not isinstance(event, dict):
            raise StreamError(f"an event is no JSON object: {data[:80]!r}")
        if event.get("error") is not None:
            raise _reported(event["error"])
        usage = event.get("usage") or {}
        self.prompt_tokens = usage.get("prompt_tokens", self.prompt_tokens)
        so_far = usage.get("completion_tokens")
        if choices := event.get("choices"):
            self._latest_s = now_s
            self.finish_reason = choices[0].get("finish_reason") or self.finish_reason
            self._count(len(self.token_s) + bool(choices[0].get("text")) if so_far is None else so_far)
        elif so_far is not None:
            self._count(so_far)

    def _count(self, tokens: int) -> None:
        """Make the tokens so many; when there were fewer than events, the first and the last keep their times."""
        missing = tokens - len(self.token_s)
        if missing < 0 and tokens > 1:
            self.token_s[tokens - 1] = self.token_s[-1]
        del self.token_s[tokens:]
        self.token_s.extend([self._latest_s] * missing)


def _reported(error: Any) -> StreamError:
    if not isinstance(error, dict):
        return StreamError(str(error))
    code = error.get("code")
    return StreamError(str(error.get("message", error)), code if isinstance(code, int) else None)
