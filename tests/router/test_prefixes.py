"""What each replica probably holds of a prompt."""

from __future__ import annotations

import threading

import pytest

from router.prefixes import Prefixes, blocks_of

TEXT = "".join(f"{number} " for number in range(400))


def held(prefixes: Prefixes[str], blocks: list[int], replicas: str = "abc") -> list[int]:
    return prefixes.held(blocks, list(replicas))


def test_prompts_agree_in_a_block_only_if_they_agree_in_all_before_it() -> None:
    one, other = blocks_of(TEXT, 64), blocks_of(TEXT[:200] + "x" + TEXT[201:], 64)
    assert len(one) == len(TEXT) // 64
    assert [a == b for a, b in zip(one, other, strict=True)] == [True] * 3 + [False] * (len(one) - 3)
    assert blocks_of(TEXT, 64, start="adapter")[0] != one[0], "an adapter's cache is its own"
    assert blocks_of([1, 2, 3, 4, 5], 2) == blocks_of((1, 2, 3, 4, 9), 2) != blocks_of([1, 2, 4, 3], 2)
    assert blocks_of("short", 64) == blocks_of("", 64) == []


def test_a_replica_holds_the_blocks_up_to_the_first_that_it_was_not_sent() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prefixes.sent([1, 2, 3], "a", 100)
    prefixes.sent([1, 2, 9], "b", 100)
    assert held(prefixes, [1, 2, 3, 4]) == [3, 2, 0]
    assert held(prefixes, [1, 2, 9], "cba") == [0, 3, 2]
    assert held(prefixes, [3, 8]) == [1, 0, 0]
    assert held(prefixes, []) == [0, 0, 0]


def test_the_least_recent_prompts_are_forgotten_and_of_one_the_last_blocks_first() -> None:
    prefixes: Prefixes[str] = Prefixes()
    prefixes.sent([1, 2, 3], "a", 5)
    prefixes.sent([7, 8, 9], "a", 5)
    assert (held(prefixes, [1, 2, 3], "a"), held(prefixes, [7, 8, 9], "a")) == ([2], [3])
    prefixes.sent([1, 2], "a", 5)
    prefixes.sent([5, 6], "a", 5)
    assert (held(prefixes, [1, 2, 3], "a"), held(prefixes, [7, 8, 9], "a")) == ([2], [1]), "used again, kept"
    assert len(prefixes) == 5


def test_what_is_remembered_is_bounded_over_all_replicas() -> None:
    prefixes: Prefixes[str] = Prefixes(most_blocks=120)
    for number in range(2000):
        prefixes.sent([number * 4 + place for place in range(4)], "abcdef"[number % 6], 1000)
    assert len(prefixes) <= 120
    known = (sum(map(len, part)) for part in (prefixes._holders, prefixes._uses))
    assert set(known) == {len(prefixes)}, "nor does anything stay of what was forgotten"
    assert held(prefixes, [1999 * 4], "b") == [1]


def test_a_replica_that_is_forgotten_holds_nothing_and_the_others_what_they_did() -> None:
    prefixes: Prefixes[str] = Prefixes()
    for name in "ab":
        prefixes.sent([1, 2], name, 100)
    prefixes.forget("a")
    prefixes.forget("never heard of")
    assert held(prefixes, [1, 2]) == [0, 2, 0]
    prefixes.sent([1], "c", 100)
    assert held(prefixes, [1, 2]) == [0, 2, 1]


@pytest.mark.parametrize("replicas", [1, 64, 300])
def test_any_number_of_replicas_is_told_apart(replicas: int) -> None:
    prefixes: Prefixes[int] = Prefixes()
    for number in range(replicas):
        prefixes.sent(list(range(number % 7 + 1)), number, 100)
    assert prefixes.held(list(range(9)), range(replicas)) == [number % 7 + 1 for number in range(replicas)]


def test_several_threads_may_use_it_at_once() -> None:
    prefixes: Prefixes[int] = Prefixes(most_blocks=300)
    failed: list[BaseException] = []

    def work(name: int) -> None:
        try:
            for number in range(300):
                prefixes.sent(list(range(number, number + 20)), name, 50)
                prefixes.held(list(range(number, number + 20)), range(4))
                if number % 50 == 0:
                    prefixes.forget((name + 1) % 4)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failed
    assert set().union(*prefixes._holders) == set().union(*prefixes._kept.values())
