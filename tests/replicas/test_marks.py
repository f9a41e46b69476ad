"""What a replica tells of the prompts that it took lately, and how it is read."""

from __future__ import annotations

import struct
from typing import Any

import pytest

from replicas import marks
from replicas.marks import LatestMarks, Marks, depths


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def told_hashes(latest: LatestMarks) -> list[int]:
    return [mark for mark, _ in latest.told().after(0)]


def chain(name: int, blocks: int) -> list[int]:
    """Blocks of a prompt: number 7 of prompt 3 is 3007."""
    return [1000 * name + depth for depth in range(1, blocks + 1)]


@pytest.mark.parametrize(("blocks", "told"), [
    (0, []), (1, [1]), (2, [2, 1]), (3, [3, 2, 1]), (16, [16, 8, 4, 2, 1]), (30, [30, 16, 8, 4, 2, 1]),
])
def test_of_a_prompt_few_blocks_are_told_and_always_the_last(blocks: int, told: list[int]) -> None:
    assert depths(blocks) == told


def test_a_mark_comes_with_the_blocks_that_no_prompt_before_had() -> None:
    latest = LatestMarks()
    latest.note(chain(1, 20))
    assert latest.told().after(0) == [(1020, 4), (1016, 8), (1008, 4), (1004, 2), (1002, 1), (1001, 1)]
    latest.note(chain(1, 28))
    assert latest.told().after(6) == [(1028, 8)], "the others are told, and up to 20 it has been here"
    latest.note(chain(1, 34))
    assert latest.told().after(7) == [(1034, 2), (1032, 4)]
    assert sum(came for _, came in latest.told().after(0)) == 34


def test_a_beginning_that_two_prompts_share_is_told_to_its_last_block() -> None:
    """As of a system prompt of 15 blocks, for which depths of powers of two say 8 only."""
    latest = LatestMarks()
    latest.note([*chain(1, 15), *chain(2, 5)])
    latest.note([*chain(1, 15), *chain(3, 5)])
    assert (1015, 0) in latest.told().after(0)
    assert sum(came for _, came in latest.told().after(0)) == 25


def test_a_reader_takes_what_it_has_not_read_whatever_it_missed_or_got_twice() -> None:
    latest = LatestMarks()
    latest.note([1])
    first = latest.told()
    latest.note([2])
    latest.note([3])
    second = latest.told()
    assert [mark for mark, _ in first.after(0)] == [1]
    assert [mark for mark, _ in second.after(first.number)] == [2, 3]
    assert second.after(second.number) == []
    assert [mark for mark, _ in second.after(0)] == [1, 2, 3]


def test_marks_are_told_for_some_seconds_and_again_when_their_prompt_comes_again() -> None:
    clock = Clock()
    latest = LatestMarks(clock)
    latest.note([1, 2])
    clock.now_s += 4.0
    latest.note([1, 9])
    assert told_hashes(latest) == [2, 1, 9]
    clock.now_s += 2.0
    assert told_hashes(latest) == [9]
    latest.note([1, 2])
    assert latest.told().after(3) == [(2, 1), (1, 1)], "with the blocks that came with them"
    clock.now_s += 6.0
    assert latest.told() == Marks(5, b"")


def test_a_report_is_bounded_and_so_is_what_a_replica_remembers() -> None:
    latest = LatestMarks()
    for number in range(3 * marks._MOST_KNOWN):
        latest.note([7, 100 + number])
    told = latest.told()
    assert len(told.packed) == 1536 and told.number > 3 * marks._MOST_KNOWN
    assert len(latest._known) == marks._MOST_KNOWN
    hashes = told_hashes(latest)
    assert hashes[-1] == 100 + number or hashes[-2] == 100 + number
    assert 7 in hashes, "what all share is told again when it would be lost"
    assert len(set(hashes)) == len(hashes)


def test_a_prompt_shorter_than_a_block_tells_nothing() -> None:
    latest = LatestMarks()
    latest.note([])
    assert latest.told() == Marks(0, b"")


def test_the_longest_prompt_fits() -> None:
    latest = LatestMarks()
    latest.note(range(1, 200_001))
    assert max(came for _, came in latest.told().after(0)) == 2**16 - 1


@pytest.mark.parametrize("told", [
    None, 3, "text", b"", {}, (), (1,), (1, "abcdef"), ("1", b""), (True, b"abcdef"), (1.5, b""), (-1, b""),
    (1, b"abcdefg"), (1, b"abcdef" * 2), (1, b"", 2), (float("nan"), b""),
])
def test_what_is_in_another_form_tells_nothing(told: Any) -> None:
    assert Marks.read(told) is None


def test_a_report_of_a_release_that_tells_more_is_read_up_to_the_bound() -> None:
    many = b"".join(struct.pack("<IH", number, 1) for number in range(5000))
    read = Marks.read([5000, many])
    assert read is not None and [mark for mark, _ in read.after(0)] == list(range(4744, 5000))
