"""The server as a client sees it: its models, and one streamed completion with the time of every token."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, NamedTuple, Self

import httpx

from loadgen.stream import StreamError, TokenStream
from scheduler.config_errors import CommandFailed
from scheduler.settings import EXPECTED_OUTPUT_TOKENS
from simulator.output.rows import COMPLETED, REJECTED
from simulator.workload.requests import SimRequest

FAILED, TIMED_OUT, CANCELLED = "failed", "timed_out", "cancelled"
_TOO_MANY_REQUESTS = 429
_LONGEST_MESSAGE = 300
_SETUP_TIMEOUT_S = 15.0
_KEEP_IDLE_S = 2.0  # shorter than servers keep theirs (uvicorn: 5 s), so that none closes under a new request


class Ending(StrEnum):
    """How a response ended, by its bytes alone. MARKED: a finish reason or `[DONE]`; UNMARKED: neither, though HTTP
    ended well; ERROR: an HTTP error or one in the stream; BROKEN: the connection failed."""

    MARKED = "marked"
    UNMARKED = "unmarked"
    ERROR = "error"
    BROKEN = "broken"


class ServerError(CommandFailed):
    """The server cannot be measured: nothing answers, or not as an OpenAI-style server; the message says what to do."""


class Model(NamedTuple):
    """A model that the server lists; `max_model_len` None: not stated."""

    id: str
    max_model_len: int | None


@dataclass
class Exchange:
    """One request and its outcome. Times are seconds since the measurement began.

    sent_s: when the last byte of the request was handed to the network. token_s: when each token came. ended_s:
    when the outcome was known; None while it is under way. outcome: see docs/bench.md; cancelled until then.
    status: of HTTP. prompt_tokens: as the server counted them. ending: None when the client ended it.
    """

    index: int
    asked: SimRequest
    sent_s: float | None = None
    token_s: list[float] = field(default_factory=list)
    ended_s: float | None = None
    outcome: str = CANCELLED
    status: int | None = None
    retry_after_s: float | None = None
    message: str | None = None
    prompt_tokens: int | None = None
    ending: Ending | None = None


class Server:
    """An OpenAI-style server at `url`; use it as an asynchronous context manager.

    Raises:
        ServerError: the URL is invalid.
    """

    def __init__(self, url: str, api_key: str | None = None) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        headers = {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {})
        # No limit here and no waiting for a free connection: every request has its own deadline, set by `OpenLoop`.
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None, keepalive_expiry=_KEEP_IDLE_S)
        try:
            if httpx.URL(self.url).scheme not in ("http", "https"):
                raise httpx.InvalidURL("it must begin with http:// or https://")
            self._http = httpx.AsyncClient(
                base_url=self.url, headers=headers, limits=limits, timeout=None, trust_env=False
            )
        except httpx.InvalidURL as error:
            allowed = "such as http://127.0.0.1:8000"
            raise ServerError(f"--url = {url!r} is not a URL: {error}; allowed: {allowed}") from error

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._http.aclose()

    async def models(self) -> list[Model]:
        """What `GET /v1/models` lists.

        Raises:
            ServerError: nothing answers, or no list of models.
        """
        try:
            response = await self._http.get("/v1/models", timeout=_SETUP_TIMEOUT_S)
        except httpx.HTTPError as error:
            raise ServerError(
                f"nothing answers at {self.url} ({_described(error)}); start a server there, such as with "
                "'headrace up', or give --url"
            ) from error
        if response.is_error:
            raise ServerError(f"{self.url}/v1/models: {_said(response.status_code, response.content)}")
        try:
            return [Model(card["id"], _context_of(card)) for card in response.json()["data"]]
        except (ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self.url} is no OpenAI-style server: /v1/models lists no models") from error

    async def model(self, wanted: str | None) -> Model:
        """The model of that id, or the first one.

        Raises:
            ServerError: the server has none or another; the message lists them.
        """
        models = await self.models()
        for model in models:
            if wanted in (None, model.id):
                return model
        known = ", ".join(model.id for model in models) or "none"
        raise ServerError(f"{self.url} has no model {wanted or ''!r}; its models are: {known}")

    async def complete(self, exchange: Exchange, body: bytes, clock_s: Callable[[], float]) -> None:
        """Send a completion and record the response in `exchange`. Raises only on cancellation."""

        async def trace(event: str, _: Any) -> None:
            if event.endswith("send_request_body.complete"):
                exchange.sent_s = clock_s()

        stream = TokenStream()
        exchange.token_s = stream.token_s  # what came before a failure stays
        try:
            async with self._http.stream(
                "POST", "/v1/completions", content=body, headers={"Content-Type": "application/json"},
                extensions={"trace": trace},
            ) as response:
                exchange.status = response.status_code
                if response.is_success:
                    async for data in response.aiter_raw():
                        stream.feed(data, clock_s())
                else:
                    exchange.retry_after_s = _seconds(response.headers.get("Retry-After"))
                    said = _said(response.status_code, await response.aread())
                    _end(exchange, Ending.ERROR, said, response.status_code)
                    return
        except StreamError as error:
            _end(exchange, Ending.ERROR, f"in the stream: {error}", error.code)
        except (httpx.HTTPError, OSError) as error:
            _end(exchange, Ending.BROKEN, _described(error))
        else:
            _judge(exchange, stream)
        finally:
            exchange.prompt_tokens = stream.prompt_tokens


def request_body(model: str, prompt: list[int], output_tokens: int, *, declare_length: bool) -> bytes:
    """A completion of exactly so many tokens; the last two of vLLM's own fields make it so."""
    body = {
        "model": model, "prompt": prompt, "max_tokens": output_tokens, "temperature": 0, "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "min_tokens": output_tokens, "ignore_eos": True,
    }
    if declare_length:
        body["vllm_xargs"] = {EXPECTED_OUTPUT_TOKENS: output_tokens}
    return json.dumps(body).encode()


def _judge(exchange: Exchange, stream: TokenStream) -> None:
    """The outcome of a stream that came to its end."""
    if not (stream.ended or stream.finish_reason):
        _end(exchange, Ending.UNMARKED, f"the stream broke off after {len(stream.token_s)} tokens")
    elif stream.finish_reason not in ("length", "stop", None):
        _end(exchange, Ending.ERROR, f"finish_reason is {stream.finish_reason!r}")
    elif not stream.token_s:
        _end(exchange, Ending.MARKED, "the stream ended without a token")
    else:
        exchange.outcome, exchange.ending = COMPLETED, Ending.MARKED


def _end(exchange: Exchange, ending: Ending, message: str, status: int | None = None) -> None:
    exchange.outcome = REJECTED if status == _TOO_MANY_REQUESTS else FAILED
    exchange.ending, exchange.message = ending, message[:_LONGEST_MESSAGE]


def _context_of(card: dict[str, Any]) -> int | None:
    """The context length in tokens; vLLM and Ray Serve LLM name it differently."""
    metadata = card.get("metadata") or {}
    context = card.get("max_model_len") or metadata.get("max_request_context_length")
    return context if isinstance(context, int) else None


def _said(status: int, content: bytes) -> str:
    """An error response in a line: its status and, in either of OpenAI's and vLLM's forms, its message."""
    said = content.decode(errors="replace").strip()
    with contextlib.suppress(ValueError, AttributeError, TypeError, KeyError):
        answer = json.loads(content)
        said = str(answer.get("error", answer)["message"])
    return f"HTTP {status}: {said}" if said else f"HTTP {status}"


def _described(error: BaseException) -> str:
    return str(error) or type(error).__name__


def _seconds(text: str | None) -> float | None:
    """`Retry-After` in seconds; as a date, which no serving engine sends, it is not read."""
    with contextlib.suppress(TypeError, ValueError):
        return float(text)  # type: ignore[arg-type]  # None raises, too
    return None
