"""How much of a prompt each replica probably holds in its prefix cache. No Ray.

For each replica the blocks (`replicas.prompt_blocks`) of the prompts that this ingress sent there are remembered: the
latest ones, as many as its KV cache holds, and of one prompt the last ones are forgotten first, as vLLM evicts them. So
equal beginnings are stored once, one dictionary answers for all replicas at once, and what is remembered is bounded.
What other ingresses sent there is remembered likewise, by the few blocks that the replica tells (`replicas.marks`).

It is an estimate: answers and evictions for running requests are not seen, and what others sent is known up to a second
late. So a replica's own count of the prompt tokens it found cached corrects it (`Trust`).
"""

from __future__ import annotations

import threading
from collections.abc import Collection, Hashable, Sequence
from itertools import accumulate, islice
from typing import Generic, NamedTuple, TypeVar

from replicas.marks import Marks
from replicas.prompt_blocks import BLOCK_TOKENS

_MOST_BLOCKS = 1 << 19
"""Remembered for all replicas together, in some 100 MB."""
_MOST_MARKS = 1 << 17
"""Told, for all replicas together, in some 25 MB."""
_PARTS = 64
_USUAL_BLOCKS = 8192
"""Of a replica that does not say how much its KV cache holds."""
_REMEMBERED = 0.95
"""Of the counts of hits, from one report to the next: those of the last twenty seconds or so decide."""
_PRIOR_TOKENS = 500.0
"""Prompt tokens of hits that came as foretold, before any was counted."""
_Name = TypeVar("_Name", bound=Hashable)


class _Holders(Generic[_Name]):
    """Which replicas hold a block, each replica as a bit; safe from several threads."""

    def __init__(self) -> None:
        self._bits: dict[_Name, int] = {}
        self._holders: list[dict[int, int]] = [{} for _ in range(_PARTS)]
        """Of a block: the bits of the replicas that hold it. In parts, by `block % _PARTS`: one great dictionary would
        stop a request for tens of milliseconds whenever it grows."""
        self._lock = threading.Lock()

    def _places(self, replicas: Sequence[_Name]) -> dict[int, int]:
        """Of the bits of those that hold something: which of the replicas it is."""
        places = {self._bits.get(name, 0): place for place, name in enumerate(replicas)}
        places.pop(0, None)
        return places

    def _bit(self, replica: _Name) -> int:
        if replica not in self._bits:
            self._bits[replica] = _free_bit(self._bits.values())
        return self._bits[replica]

    def _add(self, block: int, bit: int) -> None:
        holders = self._holders[block % _PARTS]
        holders[block] = holders.get(block, 0) | bit

    def _drop(self, block: int, bit: int) -> bool:
        """It no longer holds this block; whether nobody does."""
        holders = self._holders[block % _PARTS]
        left = holders[block] & ~bit
        if left:
            holders[block] = left
        else:
            del holders[block]
        return not left


class Prefixes(_Holders[_Name]):
    """The blocks that each replica was sent; safe from several threads. most_blocks: of all replicas together."""

    def __init__(self, most_blocks: int = _MOST_BLOCKS) -> None:
        super().__init__()
        self._most_blocks = most_blocks
        self._kept: dict[_Name, dict[int, None]] = {}
        """The least recent first. Plain, since Python's garbage collector passes over a dictionary of numbers."""
        self._uses: list[dict[int, int]] = [{} for _ in range(_PARTS)]
        """Of a block: prompts that found it since a replica came to hold it last; in parts, too."""

    def held(self, blocks: Sequence[int], replicas: Sequence[_Name]) -> list[int]:
        """How many of these blocks, from the first on, each of the replicas holds."""
        found = [0] * len(replicas)
        with self._lock:
            places = self._places(replicas)
            left = sum(places)
            for number, block in enumerate(blocks):
                holders = left & self._holders[block % _PARTS].get(block, 0)
                if holders != left:
                    _note(found, places, left ^ holders, number)
                    left = holders
                    if not left:
                        return found
            _note(found, places, left, len(blocks))
        return found

    def worth(self, blocks: Sequence[int]) -> list[float]:
        """Sums, from none to all of these blocks, of how much it speaks against another copy of each: 1, and less with
        every prompt that has found it since the last copy, for so many would share the work of one more."""
        with self._lock:
            uses = [self._uses[block % _PARTS].get(block, 0) for block in blocks]
        return list(accumulate((1 / (1 + several) for several in uses), initial=0.0))

    def sent(self, blocks: Sequence[int], replica: _Name, most: int) -> None:
        """A prompt of these blocks went to a replica, whose KV cache holds `most` blocks."""
        if not blocks:
            return
        with self._lock:
            bit, kept = self._bit(replica), self._kept.setdefault(replica, {})
            for block in reversed(blocks):  # the last one becomes the oldest
                uses = self._uses[block % _PARTS]
                if block in kept:
                    del kept[block]
                    uses[block] += 1
                else:
                    self._add(block, bit)
                    uses[block] = 0
                kept[block] = None
            most = min(most, self._most_blocks // len(self._kept))
            for block in list(islice(kept, max(0, len(kept) - most))):
                del kept[block]
                self._forget(block, bit)

    def forget(self, replica: _Name) -> None:
        """It holds nothing any more."""
        with self._lock:
            bit = self._bits.pop(replica, 0)
            for block in self._kept.pop(replica, ()):
                self._forget(block, bit)

    def __len__(self) -> int:
        """Blocks remembered, over all replicas."""
        return sum(map(len, self._kept.values()))

    def _forget(self, block: int, bit: int) -> None:
        if self._drop(block, bit):
            del self._uses[block % _PARTS][block]


class Told(_Holders[_Name]):
    """The marks that each replica told. most_marks: of all replicas together."""

    def __init__(self, most_marks: int = _MOST_MARKS) -> None:
        super().__init__()
        self._most_marks = most_marks
        self._kept: dict[_Name, dict[int, int]] = {}
        """Of a mark, the least recent first: the blocks that came with it."""
        self._blocks: dict[_Name, int] = {}
        self._read: dict[_Name, int] = {}

    def held(self, blocks: Sequence[int], replicas: Sequence[_Name]) -> list[int]:
        """How many of these blocks, from the first on, each of the replicas has told. One that has told a block has
        told those at depths 1, 2, 4, … before it: so few are looked for where nothing is held, and a hash that is that
        of another block by chance is hardly ever met."""
        found = [0] * len(replicas)
        with self._lock:
            places = self._places(replicas)
            left, told, depth = sum(places), 0, 1
            while left and depth <= len(blocks):
                there = left & self._holders[blocks[depth - 1] % _PARTS].get(blocks[depth - 1], 0)
                if told and there != left:
                    self._between(found, places, left ^ there, blocks, told, depth)
                left, told, depth = there, depth, 2 * depth
            if left and told:
                self._between(found, places, left, blocks, told, len(blocks) + 1)
        return found

    def _between(
        self, found: list[int], places: dict[int, int], bits: int, blocks: Sequence[int], told: int, end: int
    ) -> None:
        """The replicas of these bits hold `told` blocks, or more, but less than `end`."""
        for number in range(end - 1, told, -1):
            there = bits & self._holders[blocks[number - 1] % _PARTS].get(blocks[number - 1], 0)
            if there:
                _note(found, places, there, number)
                bits ^= there
                if not bits:
                    return
        _note(found, places, bits, told)

    def told(self, replica: _Name, marks: Marks, most: int) -> None:
        """A replica, whose KV cache holds `most` blocks, tells these. One that numbers them anew has started again."""
        with self._lock:
            read = self._read.get(replica, 0)
            if marks.number < read:
                self._forget(replica)
                read = 0
            self._read[replica] = marks.number
            new = marks.after(read)
            if not new:
                return
            bit, kept = self._bit(replica), self._kept.setdefault(replica, {})
            sum_blocks = self._blocks.get(replica, 0)
            for mark, came in new:
                if mark in kept:
                    sum_blocks -= kept.pop(mark)
                else:
                    self._add(mark, bit)
                kept[mark] = came
                sum_blocks += came
            most_marks = min(most, self._most_marks // len(self._kept))
            too_many: list[int] = []
            for mark, came in kept.items():
                if sum_blocks <= most and len(kept) - len(too_many) <= most_marks:
                    break
                too_many.append(mark)
                sum_blocks -= came
            for mark in too_many:
                del kept[mark]
                self._drop(mark, bit)
            self._blocks[replica] = sum_blocks

    def forget(self, replica: _Name) -> None:
        """It holds nothing any more of what it has told."""
        with self._lock:
            self._forget(replica)

    def keep(self, replicas: Collection[_Name]) -> None:
        """The others are gone: one of their names would tell anew."""
        with self._lock:
            for replica in self._read.keys() - set(replicas):
                self._forget(replica)
                del self._read[replica]

    def _forget(self, replica: _Name) -> None:
        bit = self._bits.pop(replica, 0)
        self._blocks.pop(replica, None)
        for mark in self._kept.pop(replica, ()):
            self._drop(mark, bit)

    def __len__(self) -> int:
        """Marks remembered, over all replicas."""
        return sum(map(len, self._kept.values()))


def _note(found: list[int], places: dict[int, int], bits: int, number: int) -> None:
    """The replicas of these bits hold `number` blocks."""
    while bits:
        bit = bits & -bits
        found[places[bit]] = number
        bits ^= bit


def _free_bit(taken: Collection[int]) -> int:
    bit, all_taken = 1, sum(taken)
    while bit & all_taken:
        bit <<= 1
    return bit


class Trust:
    """How many of the prompt tokens that were thought to be held were found there lately: a share, 1 at most.

    Compared are shares of the prompt tokens, since others may send to the same replica.
    """

    def __init__(self) -> None:
        self._totals: tuple[float, float] | None = None
        self._found = self._foretold = (0.0, 0.0)

    def foretell(self, prompt_tokens: float, held_tokens: float) -> None:
        """A prompt went to the replica that was thought to hold so much of it."""
        self._foretold = self._foretold[0] + prompt_tokens, self._foretold[1] + held_tokens

    def count(self, prompt_tokens: float, found_tokens: float) -> bool:
        """The replica's totals since it started; False when they are of another start than the ones before."""
        before, self._totals = self._totals, (prompt_tokens, found_tokens)
        if before is None:
            return True
        if prompt_tokens < before[0]:
            return False
        more = prompt_tokens - before[0], found_tokens - before[1]
        self._found = _faded(self._found, more)
        self._foretold = _faded(self._foretold, (0.0, 0.0))
        return True

    @property
    def share(self) -> float:
        """Of what is thought to be held."""
        prompts, held = self._foretold
        expected = self._found[0] * held / prompts if prompts else 0.0
        return min(1.0, (self._found[1] + _PRIOR_TOKENS) / (expected + _PRIOR_TOKENS))


def _faded(before: tuple[float, float], more: tuple[float, float]) -> tuple[float, float]:
    return _REMEMBERED * before[0] + more[0], _REMEMBERED * before[1] + more[1]


class Held(NamedTuple):
    """Of a prompt, by replica: the tokens that it holds; and those that it would compute although another holds them,
    fewer where prompts of many requests begin alike, which would share that work."""

    tokens: list[float]
    again: list[float]


class PrefixCaches(Generic[_Name]):
    """What the prefix caches of some replicas hold, as one router knows; safe from several threads."""

    def __init__(self) -> None:
        self._prefixes: Prefixes[_Name] = Prefixes()
        self._told: Told[_Name] = Told()
        self._trust: dict[_Name, Trust] = {}
        self._most: dict[_Name, int] = {}
        self._lock = threading.Lock()

    def held(self, blocks: Sequence[int], replicas: Sequence[_Name]) -> Held:
        """Of a prompt of these blocks."""
        found = self._found(blocks, replicas)
        if not any(found):
            return Held([0.0] * len(replicas), [0.0] * len(replicas))
        with self._lock:
            shares = [
                self._trust[name].share if number and name in self._trust else 1.0
                for number, name in zip(found, replicas, strict=True)
            ]
        tokens = [BLOCK_TOKENS * number * share for number, share in zip(found, shares, strict=True)]
        best = max(range(len(replicas)), key=tokens.__getitem__)
        worth = self._prefixes.worth(blocks[: found[best]])
        each = BLOCK_TOKENS * shares[best]
        return Held(tokens, [each * (worth[-1] - worth[min(number, found[best])]) for number in found])

    def sent(self, blocks: Sequence[int], prompt_tokens: float, replica: _Name) -> None:
        """A prompt has gone to a replica."""
        held = self._found(blocks, [replica])[0]
        with self._lock:
            self._trust.setdefault(replica, Trust()).foretell(prompt_tokens, min(prompt_tokens, held * BLOCK_TOKENS))
            most = self._most.get(replica, _USUAL_BLOCKS)
        self._prefixes.sent(blocks, replica, most)

    def _found(self, blocks: Sequence[int], replicas: Sequence[_Name]) -> list[int]:
        """Of these blocks, how many each of the replicas is thought to hold. Told may be what this router sent itself:
        that is the same blocks, and no more of them."""
        if not blocks:
            return [0] * len(replicas)
        return list(map(max, self._prefixes.held(blocks, replicas), self._told.held(blocks, replicas)))

    def reported(
        self, replica: _Name, kv_capacity_tokens: int, prompt_tokens: int, found_tokens: int,
        marks: Marks | None = None,
    ) -> None:
        """A replica says how much its KV cache holds (0: it does not say), of its prompt tokens so far, how many it
        found there, and which prompts came lately (None: it does not say). One that counts from 0 again has started
        again and holds nothing."""
        with self._lock:
            if kv_capacity_tokens:
                self._most[replica] = kv_capacity_tokens // BLOCK_TOKENS
            most = self._most.get(replica, _USUAL_BLOCKS)
            runs_on = self._trust.setdefault(replica, Trust()).count(prompt_tokens, found_tokens)
            if not runs_on:
                self._trust[replica] = Trust()
        if not runs_on:
            self._prefixes.forget(replica)
            self._told.forget(replica)
        if marks is not None:
            self._told.told(replica, marks, most)

    def keep(self, replicas: Collection[_Name]) -> None:
        """Forget what all but these replicas hold."""
        with self._lock:
            gone = (self._trust.keys() | self._most.keys()) - set(replicas)
            for replica in gone:
                self._trust.pop(replica, None)
                self._most.pop(replica, None)
        for replica in gone:
            self._prefixes.forget(replica)
        self._told.keep(replicas)
