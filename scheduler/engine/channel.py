"""The control channel of an engine-core process: thresholds and settings in, telemetry out, while it serves.

The engine-core process answers no calls of ours, so the scheduler opens a ZeroMQ socket of its own, served by one
daemon thread. The engine's loop only reads a reference each iteration and does not wait for that thread. Every answer
carries the id of its question, so late and duplicate answers are dropped. Messages are the JSON of `scheduler.wire`.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import itertools
import logging
import os
import shutil
import tempfile
import threading
import uuid
from collections.abc import Callable
from pathlib import Path

import zmq
import zmq.asyncio

from scheduler.engine import segments
from scheduler.messages import Ack, Apply, Configure, Drain, Report, Stats, Telemetry
from scheduler.thresholds import InvalidThresholds, Thresholds
from scheduler.wire import (
    OtherSchema,
    QuestionFailed,
    UnreadableMessage,
    answer_of,
    offer_of,
    read_answer,
    read_question,
    telemetry_question,
)

FOLDER = "headrace-channel"
_locks: dict[str, int] = {}
"""By endpoint that this process made: the descriptor of its folder, which holds the lock."""
_LARGEST_QUESTION_BYTES = 1 << 20
logger = logging.getLogger(__name__)


class ChannelClosed(RuntimeError):
    """The engine did not answer in time, or the channel is closed; serving goes on either way."""


def new_endpoint(label: str = "") -> str:
    """A fresh private endpoint on this machine, in a folder only this user may enter; `label` is part of its name.

    The folder is locked while this process lives. Folders without a live lock are removed here, with the shared memory
    that a killed engine left; unlike process ids, the lock is also valid where containers share the folder for
    temporary files.
    """
    remove_abandoned_endpoints()
    # A folder gets its final name only once locked, or a replica that starts at the same time would remove it.
    nascent = Path(tempfile.mkdtemp(prefix=f".{FOLDER}-{label}-" if label else f".{FOLDER}-"))
    lock = os.open(nascent, os.O_RDONLY | os.O_DIRECTORY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = nascent.rename(nascent.with_name(nascent.name.removeprefix(".")))
    endpoint = f"ipc://{folder}/engine"
    _locks[endpoint] = lock
    return endpoint


def remove_abandoned_endpoints() -> None:
    """Remove the folders on this machine whose makers have ended."""
    for folder in Path(tempfile.gettempdir()).glob(f"{FOLDER}-*"):
        _remove_unless_held(folder)


def _remove_unless_held(folder: Path) -> None:
    with contextlib.suppress(OSError):  # held, gone already, or another user's
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            segments.remove_noted(folder)
            shutil.rmtree(folder, ignore_errors=True)
        finally:
            os.close(descriptor)


def rank_endpoint(endpoint: str, rank: int) -> str:
    """The endpoint of a data-parallel rank; rank 0 uses `endpoint` itself, the others a socket in the same folder."""
    return endpoint if rank == 0 else f"{endpoint}-rank{rank}"


def folder_of(endpoint: str) -> Path:
    """The folder that `new_endpoint` made for an endpoint; what else lies in it is removed with it."""
    return Path(endpoint.removeprefix("ipc://")).parent


def remove_endpoint(endpoint: str) -> None:
    """Remove what `new_endpoint` made, and noted segments; absent files are fine."""
    folder = folder_of(endpoint)
    segments.remove_noted(folder)
    shutil.rmtree(folder, ignore_errors=True)
    lock = _locks.pop(endpoint, None)
    if lock is not None:
        os.close(lock)


class ChannelServer:
    """Answers questions at `endpoint` from a daemon thread until closed.

    apply, configure: accept or reject thresholds or settings with an Ack; report: the telemetry after a cursor; stats:
    the `Stats`; drain: begins to drain. An unreadable question is answered with an error and changes nothing.

    Raises:
        RuntimeError: the endpoint cannot be bound.
    """

    def __init__(
        self, endpoint: str, apply: Callable[[Apply], Ack], report: Callable[[Report], Telemetry],
        stats: Callable[[], Stats], configure: Callable[[Configure], Ack], drain: Callable[[Drain], Ack],
    ) -> None:
        self._apply, self._report, self._stats = apply, report, stats
        self._configure, self._drain = configure, drain
        self._context = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.MAXMSGSIZE, _LARGEST_QUESTION_BYTES)
        try:
            self._socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._context.destroy(linger=0)
            raise RuntimeError(f"cannot open the control channel at {endpoint}: {error}") from error
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="headrace-channel", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop answering and free the endpoint."""
        self._closing.set()
        self._thread.join(timeout=2.0)
        self._context.destroy(linger=0)

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                if not self._socket.poll(200):
                    continue
                frames = self._socket.recv_multipart()
                if len(frames) == 3:  # sender, question id, question
                    self._socket.send_multipart([frames[0], frames[1], self._answer(frames[2])], flags=zmq.NOBLOCK)
            except zmq.ZMQError as error:  # a vanished peer, or the context closing under us
                if error.errno in (zmq.ETERM, zmq.ENOTSOCK):
                    return
                logger.warning("control channel: %s", error)

    def _answer(self, question: bytes) -> bytes:
        code = "invalid"
        try:
            asked = read_question(question)
            if isinstance(asked, Apply):
                return answer_of(self._apply(asked))
            if isinstance(asked, Drain):
                return answer_of(self._drain(asked))
            if isinstance(asked, Configure):
                return answer_of(self._configure(asked))
            return answer_of(self._report(asked) if isinstance(asked, Report) else self._stats())
        except OtherSchema as error:
            code, rejection = "schema", str(error)
        except (InvalidThresholds, UnreadableMessage) as error:
            rejection = str(error)
        except Exception as error:  # one bad question must never silence the channel
            logger.exception("control channel: a question failed")
            rejection = f"internal error: {error!r}"
        return answer_of(Ack.without_version(rejection, code))


class ChannelClient:
    """Asks the engine behind `endpoint`; safe for concurrent use within one event loop."""

    def __init__(self, endpoint: str) -> None:
        self._endpoint = endpoint
        self._context = zmq.asyncio.Context(io_threads=1)
        self._ids = itertools.count(1)
        self._lock = asyncio.Lock()
        self._socket: zmq.asyncio.Socket | None = None

    async def apply(self, thresholds: Thresholds, *, automatic: bool = True, timeout_s: float = 5.0) -> Ack:
        """Offer thresholds; the answer has the version that is active now.

        Raises:
            ChannelClosed: no answer within `timeout_s`. Asking again is safe: a version is accepted once.
            UnreadableMessage: see `scheduler.wire.read_answer`.
        """
        return read_answer(await self.ask(offer_of(thresholds, automatic=automatic), timeout_s=timeout_s), Ack)

    async def report(self, cursor: int | None = 0, *, timeout_s: float = 5.0) -> Telemetry:
        """Telemetry with the records after `cursor` (None: without records).

        Raises:
            ChannelClosed: no answer within `timeout_s`, or one that is no telemetry.
            UnreadableMessage: see `scheduler.wire.read_answer`.
        """
        answer = await self.ask(telemetry_question(cursor), timeout_s=timeout_s)
        try:
            return read_answer(answer, Telemetry)
        except QuestionFailed as error:
            raise ChannelClosed(f"the engine at {self._endpoint} gave no telemetry: {error}") from error

    async def ask(self, question: bytes, *, timeout_s: float = 5.0) -> bytes:
        """The answer to a question, both as `scheduler.wire` writes them.

        Raises:
            ChannelClosed: no answer within `timeout_s`.
        """
        try:
            async with asyncio.timeout(timeout_s), self._lock:
                return await self._exchange(question)
        except (TimeoutError, zmq.ZMQError) as error:
            raise ChannelClosed(
                f"the engine did not answer at {self._endpoint} within {timeout_s:g} s; "
                "it is busy, starting or gone, and goes on with the thresholds it has"
            ) from error

    async def _exchange(self, question: bytes) -> bytes:
        question_id = str(next(self._ids)).encode()
        try:
            socket = self._connected()
            await socket.send_multipart([question_id, question])
            while True:
                answer_id, answer = await socket.recv_multipart()
                if answer_id == question_id:
                    return bytes(answer)
        except BaseException:  # the time is up: a fresh socket asks the next question
            self._disconnect()
            raise

    def _connected(self) -> zmq.asyncio.Socket:
        if self._socket is None:
            self._socket = self._context.socket(zmq.DEALER)
            self._socket.setsockopt(zmq.LINGER, 0)
            self._socket.connect(self._endpoint)
        return self._socket

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close(linger=0)
            self._socket = None

    def close(self) -> None:
        """Close the socket; the engine is not affected."""
        self._disconnect()
        with contextlib.suppress(zmq.ZMQError):
            self._context.destroy(linger=0)


def engine_id() -> str:
    """A unique id of one engine process: a restarted engine gets another, even under the same process id."""
    return str(uuid.uuid4())
