"""Marks: what a replica tells the routers of the prompts that it computed lately. No Ray.

A router knows what it has sent itself. A replica knows what all routers have sent it, and says so in the report that
they get anyway: of a prompt the blocks at depths 1, 2, 4, 8, …, the last whole one, and the last one that an earlier
prompt had as well (`replicas.prompt_blocks`), since a block vouches for all before it. So a prompt of n blocks is told
in log2(n) or so, less what it shares with others that were told just before.

A report holds the marks of some seconds, with the running number of the last one: a reader takes those that it has not
read yet, so that a report may be missed or come twice. They are packed into bytes, 6 a mark and 1536 at most, which
whoever carries a report can copy without knowing what it is.
"""

from __future__ import annotations

import struct
import time
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any, NamedTuple

_KEPT_S = 5.0
"""Some periods of Serve's reports."""
_MOST_MARKS = 256
_MOST_KNOWN, _MOST_SEEN = 8192, 32_768
"""Of one replica, marks and blocks, in some MB."""
_MARK = struct.Struct("<IH")
_MOST_BLOCKS = 2**16 - 1


def depths(blocks: int) -> list[int]:
    """Which of so many blocks are told, counted from 1, the deepest first."""
    found = [1 << power for power in range(blocks.bit_length())]
    if blocks and found[-1] != blocks:
        found.append(blocks)
    return found[::-1]


class Marks(NamedTuple):
    """number: the running number of the last of them; packed: of each its hash, and how many blocks came with it."""

    number: int
    packed: bytes

    def after(self, number: int) -> list[tuple[int, int]]:
        """The hash and the blocks of those that are later than this number, the earliest first."""
        marks = list(_MARK.iter_unpack(self.packed))
        return marks[max(0, len(marks) - max(0, self.number - number)) :]

    @classmethod
    def read(cls, told: Any) -> Marks | None:
        """What a replica told; None where it told nothing, or in another form."""
        if not isinstance(told, tuple | list) or len(told) != 2:
            return None
        number, packed = told
        usable = isinstance(number, int) and isinstance(packed, bytes) and not isinstance(number, bool)
        if not usable or len(packed) % _MARK.size or number < len(packed) // _MARK.size:
            return None
        return cls(number, packed[-_MOST_MARKS * _MARK.size :])


class LatestMarks:
    """The marks of the prompts that a replica computed lately; for one thread."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._number = clock, 0
        self._latest: deque[tuple[float, int, int]] = deque(maxlen=_MOST_MARKS)
        """Of each: when it was taken, its hash, and the blocks that came with it."""
        self._known: dict[int, tuple[int, int]] = {}
        """Of a hash, the least recent first: its running number when it was told last, and the blocks."""
        self._seen: dict[int, None] = {}
        """The blocks of all prompts, the least recent first."""

    def note(self, blocks: Sequence[int]) -> None:
        """A prompt of these blocks has been computed."""
        self._drop_old()
        shared = next((depth for depth in range(len(blocks), 0, -1) if blocks[depth - 1] in self._seen), 0)
        told = sorted({*depths(len(blocks)), *filter(None, [shared])}, reverse=True)
        for depth, before in zip(told, [*told[1:], 0], strict=False):  # the deepest first, which is forgotten first
            mark = blocks[depth - 1]
            number, came = self._known.pop(mark, (-1, min(_MOST_BLOCKS, max(0, depth - max(before, shared)))))
            if number <= self._number - len(self._latest):
                self._number += 1
                number = self._number
                self._latest.append((self._clock(), mark, came))
            self._known[mark] = number, came
        for block in blocks:
            self._seen.pop(block, None)
            self._seen[block] = None
        _trim(self._known, _MOST_KNOWN)
        _trim(self._seen, _MOST_SEEN)

    def told(self) -> Marks:
        """For a report."""
        self._drop_old()
        return Marks(self._number, b"".join(_MARK.pack(mark, came) for _, mark, came in self._latest))

    def _drop_old(self) -> None:
        oldest_s = self._clock() - _KEPT_S
        while self._latest and self._latest[0][0] < oldest_s:
            self._latest.popleft()


def _trim(kept: dict[int, Any], most: int) -> None:
    for oldest in list(islice(kept, max(0, len(kept) - most))):
        del kept[oldest]
