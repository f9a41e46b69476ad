"""What each replica probably holds of a prompt."""

from __future__ import annotations

import threading

import pytest

from replicas.marks import LatestMarks, Marks
from router.prefixes import BLOCK_TOKENS, PrefixCaches, Prefixes, Told


def held(prefixes: Prefixes[str], blocks: list[int], replicas: str = "abc") -> list[int]:
    return prefixes.held(blocks, list(replicas))


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


def chain(name: int, blocks: int) -> list[int]:
    """Blocks of a prompt: number 7 of prompt 3 is 3007."""
    return [1000 * name + depth for depth in range(1, blocks + 1)]


def marks_of(*prompts: list[int]) -> Marks:
    latest = LatestMarks()
    for prompt in prompts:
        latest.note(prompt)
    return latest.told()


@pytest.mark.parametrize("blocks", [1, 2, 3, 7, 8, 9, 30, 64, 100])
def test_the_last_block_that_was_told_vouches_for_all_before_it(blocks: int) -> None:
    told: Told[str] = Told()
    told.told("b", marks_of(chain(1, blocks)), 1000)
    assert told.held(chain(1, blocks), "abc") == [0, blocks, 0]
    assert told.held(chain(1, 3 * blocks), "abc") == [0, blocks, 0], "its next turn"
    assert told.held(chain(2, 3 * blocks), "abc") == told.held([], "abc") == [0, 0, 0]


def test_of_a_shared_beginning_as_much_is_known_as_was_told() -> None:
    told: Told[str] = Told()
    told.told("a", marks_of(chain(1, 30)), 1000)
    told.told("b", marks_of(chain(1, 12), chain(1, 5)), 1000)
    other = chain(1, 12) + chain(2, 20)
    assert told.held(other, "abc") == [8, 12, 0]
    assert told.held(chain(1, 6), "abc") == [4, 5, 0]


def test_a_hash_that_is_another_s_by_chance_says_nothing() -> None:
    told: Told[str] = Told()
    told.told("a", marks_of([1, 2, 3, 4, 5, 6, 7]), 1000)
    assert told.held([11, 12, 13, 4, 15, 16, 7], "a") == [0]
    assert told.held([1, 2, 13, 14, 7], "a") == [2]


def test_marks_are_forgotten_when_the_cache_has_room_for_no_more_blocks() -> None:
    told: Told[str] = Told()
    latest = LatestMarks()
    for name in range(1, 40):
        latest.note(chain(name, 20))
        told.told("a", latest.told(), 100)
    held_now = [told.held(chain(name, 20), "a")[0] for name in range(1, 40)]
    assert held_now[-5:] == [20] * 5 and not any(held_now[:-6]), "five prompts of 20 blocks fill it"
    assert 0 < held_now[-6] < 20 or held_now[-6] == 0
    assert set(told._holders[0]) <= set(told._kept["a"]), "nothing stays of what was forgotten"


def test_a_prompt_that_comes_again_stays() -> None:
    told: Told[str] = Told()
    now_s = [0.0]
    latest = LatestMarks(lambda: now_s[0])
    for name in range(2, 30):
        now_s[0] += 6.0
        latest.note(chain(1, 20))
        latest.note(chain(name, 20))
        told.told("a", latest.told(), 100)
    assert told.held(chain(1, 20), "a") == [20]
    assert told.held(chain(2, 20), "a") == [0]


def test_marks_are_bounded_over_all_replicas() -> None:
    told: Told[int] = Told(most_marks=120)
    latest = [LatestMarks() for _ in range(6)]
    for number in range(600):
        latest[number % 6].note([number])
        told.told(number % 6, latest[number % 6].told(), 10**6)
    assert len(told) == 120 == sum(map(len, told._holders))
    assert told.held([599], [5]) == [1]


def test_each_mark_is_read_once_and_all_anew_of_one_that_started_again() -> None:
    told: Told[str] = Told()
    latest = LatestMarks()
    latest.note(chain(1, 3))
    told.told("a", latest.told(), 100)
    told.forget("a")
    told.told("a", latest.told(), 100)
    assert told.held(chain(1, 3), "a") == [0], "a report that comes twice says nothing new"
    latest.note(chain(2, 3))
    told.told("a", latest.told(), 100)
    assert (told.held(chain(1, 3), "a"), told.held(chain(2, 3), "a")) == ([0], [3])
    told.told("a", marks_of(chain(3, 3)), 100)
    assert (told.held(chain(2, 3), "a"), told.held(chain(3, 3), "a")) == ([0], [3])
    told.keep([])
    assert (len(told), told._read) == (0, {})


def test_what_was_told_of_an_own_prompt_counts_once() -> None:
    caches: PrefixCaches[str] = PrefixCaches()
    caches.sent(chain(1, 20), 1300.0, "a")
    alone = caches.held(chain(1, 24), "ab")
    caches.reported("a", 100_000, 0, 0, marks_of(chain(1, 20)))
    assert caches.held(chain(1, 24), "ab") == alone
    assert alone.tokens == [20 * BLOCK_TOKENS, 0.0]
    caches.reported("a", 100_000, 0, 0, Marks(*marks_of(chain(1, 20), chain(1, 24))))
    assert caches.held(chain(1, 24), "ab").tokens == [24 * BLOCK_TOKENS, 0.0], "the deeper of the two"


def test_what_others_sent_is_foretold_and_found() -> None:
    """The replica finds half of what was told: then half of it counts."""
    caches: PrefixCaches[str] = PrefixCaches()
    latest = LatestMarks()
    prompts = found = 0
    for name in range(1, 200):
        latest.note(chain(name, 20))
        caches.reported("a", 10**9, prompts, found, latest.told())
        caches.sent(chain(name, 24), 24 * BLOCK_TOKENS, "a")
        prompts, found = prompts + 24 * BLOCK_TOKENS, found + 10 * BLOCK_TOKENS
    latest.note(chain(500, 20))
    caches.reported("a", 10**9, prompts, found, latest.told())
    (tokens,) = caches.held(chain(500, 24), "a").tokens
    assert tokens == pytest.approx(10 * BLOCK_TOKENS, rel=0.1)


def test_a_replica_that_starts_again_or_goes_takes_what_it_told_along() -> None:
    caches: PrefixCaches[str] = PrefixCaches()
    told = marks_of(chain(1, 20))
    for name in "ab":
        caches.reported(name, 100_000, 5000, 100, told)
    caches.reported("a", 100_000, 10, 0, told)
    assert caches.held(chain(1, 20), "ab").tokens == [0.0, 20 * BLOCK_TOKENS]
    caches.keep("a")
    assert caches.held(chain(1, 20), "ab").tokens == [0.0, 0.0]
    caches.reported("b", 100_000, 0, 0, told)
    assert caches.held(chain(1, 20), "ab").tokens == [0.0, 20 * BLOCK_TOKENS]
