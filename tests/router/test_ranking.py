"""Where a request goes, by what the replicas reported and by what the router has sent since."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest

from replicas.marks import LatestMarks
from replicas.routing_stats import RoutingStats
from router import ranking
from router.places import Taken, of_all
from router.prefixes import BLOCK_TOKENS
from router.ranking import Asked, Sent, best_first
from scheduler.messages import Outlook

USUAL = RoutingStats(
    slots=100, occupied=50, kv_used_fraction=0.5, at_s=100.0,
    outlook=Outlook(wait_s=0.1, prompt_s=1e-4, token_s=0.05, added_s=2e-4, limit_s=0.0, output_tokens=200.0),
)
REQUEST = Asked(1000.0)


class View:
    """One router's view of some replicas at a time; the reports are of second 100."""

    def __init__(self, *, seed: int = 0, ingresses: int = 1, **reports: RoutingStats | None) -> None:
        self.now_s = 100.5
        self.sent: Sent[str] = Sent(lambda: self.now_s, lambda: self.now_s)
        self.reports, self.ingresses, self.rng, self.number = reports, ingresses, random.Random(seed), 0
        self.ongoing: Counter[str] = Counter()

    def ranked(self, asked: Asked = REQUEST) -> str:
        return "".join(best_first(
            sorted(self.reports), self.reports.get, str, self.sent, asked, ongoing=lambda name: self.ongoing[name],
            ingresses=self.ingresses, rng=self.rng,
        ))

    def send(self, replica: str, asked: Asked = REQUEST) -> str:
        self.number += 1
        self.sent.sent(str(self.number), replica, asked)
        return str(self.number)


def like(stats: RoutingStats = USUAL, **changed: float) -> RoutingStats:
    assert stats.outlook is not None
    return replace(stats, outlook=stats.outlook._replace(**changed))


def slots(free: int, of: int = 10) -> RoutingStats:
    """Of a policy that predicts nothing."""
    return RoutingStats(slots=of, occupied=of - free, kv_used_fraction=0.0, at_s=100.0)


def test_a_request_goes_where_it_ends_first() -> None:
    assert View(a=like(wait_s=2.0), b=USUAL, c=like(wait_s=1.0)).ranked() == "bca"
    assert View(a=like(token_s=0.06), b=like(token_s=0.04), c=USUAL).ranked() == "bca", "at the pace of the replica"
    assert View(a=like(prompt_s=1e-3), b=USUAL).ranked() == "ba"


def test_a_wait_is_weighed_against_the_pace() -> None:
    slower, waiting = like(token_s=0.06), like(wait_s=1.6)
    assert View(s=slower, w=waiting).ranked() == "ws", "0.01 s for each of 200 tokens are 2 s, the wait 1.5 s more"
    assert View(s=slower, w=waiting).ranked(Asked(1000.0, output_tokens=20.0)) == "sw", "of a short answer they are 0.2"
    assert View(s=slower, w=waiting).ranked(Asked(1000.0, output_tokens=5000.0)) == "ws", "a bound is no length"


def test_a_pace_with_slack_counts_for_less() -> None:
    def ranked(limit_s: float) -> str:
        waiting, slower = like(wait_s=1.0, limit_s=limit_s), like(token_s=0.052, limit_s=limit_s)
        return View(w=waiting, s=slower).ranked(Asked(0.0))

    assert ranked(0.055) == "ws", "0.002 s for each of 200 tokens, when the pace is next to its target"
    assert ranked(0.2) == "sw", "0.5 s of waiting"


def test_what_a_replica_has_seen_of_answers_says_nothing_of_this_one() -> None:
    assert View(a=like(output_tokens=100.0, wait_s=0.6), b=like(output_tokens=300.0, wait_s=0.5)).ranked() == "ba"


def test_a_full_replica_comes_after_all_with_room_however_idle_it_looks() -> None:
    full = replace(like(wait_s=0.0, token_s=0.01), room=0)
    assert View(a=full, b=like(wait_s=9.0), c=USUAL).ranked() == "cba"
    assert View(a=replace(USUAL, room=3), b=replace(like(wait_s=1.0), room=3)).ranked() == "ab"


def test_what_was_sent_since_the_report_takes_room_and_time() -> None:
    view = View(a=replace(USUAL, room=2), b=replace(like(wait_s=0.9), room=2))
    first = view.send("a")
    assert view.ranked() == "ab"
    second = view.send("a")
    assert view.ranked() == "ba", "its room is used up"
    view.sent.ended(first, "a")
    assert view.ranked() == "ab"
    view.sent.ended(second, "b")
    assert view.ranked() == "ab", "it is not there"
    view = View(a=like(wait_s=0.5), b=like(wait_s=1.0))
    for _ in range(3):
        view.send("a", Asked(4000.0))
    assert view.ranked() == "ba", "the prompts that are ahead now take 1.2 s"


def test_prompts_sent_are_computed_as_time_passes() -> None:
    view = View(a=like(wait_s=0.5), b=like(wait_s=1.0))
    for _ in range(3):
        view.send("a", Asked(4000.0))
    view.now_s = 102.0
    assert view.ranked(Asked()) == "ba", "both have worked through their prompts, but more decode at a"
    view.reports["a"] = like(replace(USUAL, at_s=101.9), wait_s=0.0, token_s=0.049)
    assert view.ranked(Asked()) == "ab", "the report knows of what was sent before it"


def test_a_prompt_sent_just_now_is_not_computed_because_the_report_is_old() -> None:
    view = View(a=like(wait_s=0.0), b=like(wait_s=0.1))
    view.now_s = 100.95
    view.send("a", Asked(2000.0))
    assert view.ranked(Asked()) == "ba", "0.2 s of work were sent now"
    view.now_s = 101.1
    assert view.ranked(Asked(output_tokens=1.0)) == "ba", "0.05 s of it are left; the other has had time to finish"
    view.now_s = 101.2
    assert {View(seed=seed, a=like(wait_s=0.0), b=USUAL).ranked(Asked(output_tokens=0.0)) for seed in range(20)} != {
        "ba"
    }


def conversation(number: int, blocks: int, shared: int = 0) -> Asked:
    """A prompt whose first `shared` blocks are those of every conversation."""
    own = (hash((number, place)) % 2**32 for place in range(blocks - shared))
    return Asked(float(blocks * BLOCK_TOKENS), blocks=[*range(shared), *own])


def accept(view: View, replica: str, asked: Asked) -> str:
    number = view.send(replica, asked)
    view.sent.accepted(number, replica)
    return number


def test_prompts_of_requests_that_are_never_accepted_do_not_stay() -> None:
    view = View(a=USUAL)
    for number in range(ranking._MOST_WITH_BLOCKS + 10):
        view.sent.sent(f"r{number}", "a", conversation(1, 4))
    kept = [at for at in view.sent._at.values() if at.asked.blocks]
    assert len(kept) == ranking._MOST_WITH_BLOCKS
    assert len(view.sent._at) == ranking._MOST_WITH_BLOCKS + 10, "where they are is still known"


def later(view: View, **reports: RoutingStats) -> None:
    """Everything sent so far is done, and the replicas have just reported."""
    for number in range(1, view.number + 1):
        for replica in view.reports:
            view.sent.ended(str(number), replica)
    view.now_s += 3.0
    for name, stats in (view.reports | reports).items():
        assert stats is not None
        view.reports[name] = replace(stats, at_s=view.now_s)


def test_a_conversation_stays_while_that_saves_more_than_the_wait() -> None:
    view = View(a=USUAL, b=USUAL, c=USUAL)
    accept(view, "b", conversation(1, 30))
    later(view)
    assert view.ranked(conversation(1, 32))[0] == "b"
    later(view, b=like(wait_s=5.0))
    assert view.ranked(conversation(1, 32))[0] == "b", "1920 tokens would take 0.192 s of each of 50 requests elsewhere"
    later(view, b=like(wait_s=12.0))
    assert view.ranked(conversation(1, 32))[0] != "b"


def test_where_nobody_runs_a_conversation_only_saves_its_own_time() -> None:
    view = View(a=replace(USUAL, occupied=0), b=USUAL)
    accept(view, "b", conversation(1, 30))
    later(view, b=like(wait_s=0.25))
    assert view.ranked(conversation(1, 32)) == "ba", "1920 tokens are 0.192 s, its wait 0.15 s more"
    later(view, b=like(wait_s=0.35))
    assert view.ranked(conversation(1, 32)) == "ab", "0.25 s more"


def test_a_new_conversation_goes_where_it_ends_first() -> None:
    view = View(a=USUAL, b=USUAL, c=USUAL)
    accept(view, "b", conversation(1, 30))
    later(view, b=like(wait_s=0.11), c=like(wait_s=0.12))
    assert view.ranked(conversation(2, 30)) == "abc"


def test_a_beginning_that_all_share_spreads_over_the_replicas() -> None:
    view = View(a=USUAL, b=USUAL, c=USUAL, d=USUAL)
    accept(view, "a", conversation(0, 20, shared=20))
    later(view)
    went: Counter[str] = Counter()
    for number in range(1, 41):
        asked = conversation(number, 24, shared=20)
        first = view.ranked(asked)[0]
        accept(view, first, asked)
        went[first] += 1
    assert max(went.values()) < 16 and min(went.values()) > 5


def test_a_prompt_that_is_held_takes_little_time_of_those_behind_it() -> None:
    view = View(a=USUAL, b=USUAL)
    accept(view, "a", conversation(1, 40))
    later(view, b=like(wait_s=0.13))
    accept(view, "a", conversation(1, 40))
    assert view.ranked(Asked(output_tokens=0.0)) == "ab", "not 0.256 s"
    view.send("a", conversation(2, 40))
    assert view.ranked(Asked(output_tokens=0.0)) == "ba"


def test_a_replica_that_finds_less_than_foretold_is_trusted_less() -> None:
    view = View(a=USUAL, b=like(wait_s=0.2))
    accept(view, "b", conversation(1, 64))
    went = []
    for turn in range(12):
        later(view, b=replace(like(wait_s=0.2), prompt_tokens=turn * 64 * BLOCK_TOKENS, cached_tokens=0))
        went.append(view.ranked(conversation(1, 64))[0])
        later(view)
        accept(view, "b", conversation(1, 64))
    assert went[0] == "b" and went[10:] == ["a", "a"], "its prefix cache is off"


def test_a_replica_that_counts_from_0_again_holds_nothing() -> None:
    view = View(a=USUAL, b=replace(like(wait_s=0.2), prompt_tokens=9000, cached_tokens=8000))
    view.ranked()
    accept(view, "b", conversation(1, 64))
    later(view)
    assert view.ranked(conversation(1, 64)) == "ba"
    later(view, b=replace(like(wait_s=0.2), prompt_tokens=10))
    assert view.ranked(conversation(1, 64)) == "ab"


def test_a_conversation_that_another_ingress_sent_goes_where_it_is_held() -> None:
    latest = LatestMarks()
    latest.note(conversation(1, 30).blocks)
    view = View(ingresses=8, **dict.fromkeys("abcdefgh", USUAL))
    later(view, e=replace(USUAL, marks=latest.told()))
    assert {view.ranked(conversation(1, 33))[0] for _ in range(50)} == {"e"}
    assert len({view.ranked(conversation(2, 33))[0] for _ in range(50)}) > 4
    later(view, e=replace(like(wait_s=12.0), marks=latest.told()))
    assert "e" not in {view.ranked(conversation(1, 33))[0] for _ in range(50)}, "not whatever it costs"


def test_of_many_ingresses_each_looks_at_the_replica_that_holds_most() -> None:
    reports = dict.fromkeys("abcdefgh", USUAL)
    view = View(ingresses=8, **reports)
    accept(view, "e", conversation(1, 40))
    later(view)
    assert {view.ranked(conversation(1, 42))[0] for _ in range(50)} == {"e"}
    assert len({view.ranked(conversation(2, 42))[0] for _ in range(50)}) > 4


def test_what_has_ended_since_the_report_makes_room() -> None:
    reports = {"a": replace(USUAL, at_s=101.0), "b": replace(USUAL, at_s=101.0)}
    view = View(**reports)
    numbers = [view.send("b") for _ in range(20)]
    view.now_s = 101.5
    for number in numbers:
        view.sent.ended(number, "b")
    assert {View(seed=seed, **reports).ranked() for seed in range(20)} == {"ab", "ba"}
    for _ in range(10):
        assert view.ranked() == "ba", "twenty of its fifty are gone"
        view.send("b", Asked(0.0))
    view = View(a=USUAL, b=like(token_s=0.051))
    view.ongoing["a"] = 40
    assert view.ranked() == "ab", "Serve's count is no higher than what the engine said"


def test_a_request_that_went_elsewhere_is_counted_there() -> None:
    view = View(a=USUAL, b=USUAL)
    for replica in ("a", "a", "b", "a", "b"):
        view.sent.sent("r", replica, REQUEST)
    view.sent.sent("r", "a")
    assert (view.sent.since("a", 100.0)[:2], view.sent.since("b", 100.0)[:2]) == ((1, 1000.0), (0, 0.0))


def test_choices_and_prompts_are_requests_of_their_own() -> None:
    view = View(a=replace(USUAL, room=16), b=replace(like(wait_s=9.0), room=16))
    number = view.send("a", replace(REQUEST, requests=16))
    assert view.ranked() == "ba"
    view.sent.ended(number, "a")
    assert view.ranked() == "ab"


def test_an_engine_that_hangs_but_reports_attracts_no_more() -> None:
    view = View(a=replace(USUAL, occupied=0), b=USUAL)
    went: Counter[str] = Counter()
    for tenth in range(100):
        view.now_s = 101.0 + tenth / 10
        view.reports["a"] = replace(like(wait_s=0.0), occupied=0, at_s=float(100 + tenth // 10))
        view.reports["b"] = replace(USUAL, occupied=0, at_s=float(100 + tenth // 10))
        first = view.ranked()[0]
        went[first] += 1
        view.ongoing["a"] += first == "a"
        view.send(first)
    assert went["a"] < 30, "its count at Serve grows, whatever it says itself"


def test_a_replica_that_predicts_nothing_yet_is_taken_when_it_is_empty() -> None:
    new = replace(USUAL, outlook=None, occupied=0)
    view = View(a=new, b=USUAL)
    assert view.ranked() == "ab"
    view.send("a")
    assert view.ranked() == "ba"


def test_a_replica_that_is_gone_is_forgotten() -> None:
    view = View(a=USUAL, b=USUAL)
    view.send("a")
    view.sent.keep(["b"])
    assert view.sent.since("a", 100.0) == (0, 0.0, ())


def test_a_clock_that_runs_ahead_or_behind_costs_a_replica_nothing() -> None:
    for ahead_s in (-3600.0, 3600.0):
        view = View(a=replace(USUAL, at_s=100.0 + ahead_s), b=like(wait_s=0.8))
        assert view.ranked() == "ab"
        for _ in range(3):
            view.send("a", Asked(4000.0))
        assert view.ranked() == "ba", "what was sent since counts"


def test_a_replica_that_fell_silent_comes_last_until_it_reports_again() -> None:
    view = View(a=USUAL, b=like(wait_s=30.0))
    view.ranked()
    for second in range(1, 12):
        view.now_s = 100.5 + second
        view.reports["b"] = replace(like(wait_s=30.0), at_s=100.0 + second)
        assert view.ranked() == ("ab" if second <= 5 else "ba")
    view.reports["a"] = replace(USUAL, at_s=111.0)
    assert view.ranked() == "ab"


def test_a_replica_that_does_not_say_when_it_reported_is_taken_to_be_one_period_old() -> None:
    view = View(a=replace(USUAL, at_s=None), b=like(wait_s=30.0))
    for second in range(0, 30, 5):
        view.now_s = 100.5 + second
        view.reports["b"] = replace(like(wait_s=30.0), at_s=view.now_s)
        assert view.ranked() == "ab"
    view.send("a", Asked(400_000.0))
    assert view.ranked() == "ba"


def test_each_of_several_ingresses_takes_its_requests_for_a_part() -> None:
    alone = View(a=replace(USUAL, room=4), b=like(wait_s=9.0))
    alone.send("a")
    assert alone.ranked() == "ab"
    one_of_four = View(a=replace(USUAL, room=4), b=like(wait_s=9.0), ingresses=4)
    one_of_four.send("a")
    assert one_of_four.ranked() == "ba", "the others have sent as many, so that the room is used up"
    new = View(a=replace(USUAL, outlook=None, occupied=0), b=USUAL, ingresses=4)
    accept(new, "b", conversation(1, 4))
    assert new.ranked(conversation(1, 8)) == "ab", "the others may have sent it one: no reason never to try it"


def test_of_few_requests_what_one_ingress_sent_says_little_of_the_others() -> None:
    def ahead(sends: int) -> float:
        """Of what one ingress of 16 sent to the first of two replicas: how much more it is than at the other."""
        own = [Taken(sends, 100.0 * sends, ((0.1, 100.0),) * sends), Taken(0, 0.0)]
        first, other = of_all(own, [0.5, 0.5], 16, spread=False)
        assert first.requests + other.requests == pytest.approx(16 * sends), "as many as by this one from each"
        assert first.tokens == pytest.approx(100 * first.requests) and first.prompts == own[0].prompts
        return (first.requests - other.requests) / sends

    assert 5 < ahead(1) < ahead(4) < ahead(100) < 16
    assert ahead(100) > 15
    alone = [Taken(3, 5.0), Taken(-1, 0.0)]
    assert of_all(alone, [0.5, 0.5], 1, spread=False) == alone and of_all([], [], 16, spread=False) == []


def test_a_replica_that_has_just_reported_is_thought_to_have_got_little_since() -> None:
    """Three were sent to the one whose report is a second old; of what others sent, the new report says nearly all."""
    own = [Taken(3, 300.0, ((0.1, 100.0),) * 3), Taken(0, 0.0)]
    old, new = of_all(own, [1.0, 0.01], 16, spread=False)
    assert new.requests < 0.1 * old.requests and new.tokens < 0.1 * old.tokens
    assert old.requests + new.requests == pytest.approx(16 * 3)


def test_a_beginning_that_every_replica_holds_does_not_stop_spreading() -> None:
    """The first has 0.9 s less to wait; sixteen prompts of 0.1 s would have used that up."""
    busy = replace(like(wait_s=2.0), occupied=5)
    view = View(ingresses=16, c=like(busy, wait_s=1.1), **dict.fromkeys("abd", busy))
    for place in "abcd":
        accept(view, place, conversation(1, 30))
    later(view)
    view.now_s += 0.1
    view.send("c", Asked(1000.0))
    assert "c" not in {view.ranked(conversation(1, 32))[0] for _ in range(20)}


def test_one_of_many_ingresses_does_not_send_a_conversation_away_for_a_prompt_of_its_own() -> None:
    view = View(ingresses=16, **dict.fromkeys("abcd", replace(USUAL, occupied=5)))
    accept(view, "c", conversation(1, 30))
    later(view)
    view.now_s += 0.1
    view.send("c", Asked(1000.0))
    assert {view.ranked(conversation(1, 32))[0] for _ in range(20)} == {"c"}, "its 0.1 s, not 1.6 s of sixteen"
    assert "c" not in {view.ranked(conversation(2, 32))[0] for _ in range(20)}, "what is held nowhere goes elsewhere"


def test_several_ingresses_do_not_all_choose_the_same_replica() -> None:
    reports = {name: like(wait_s=1.0 + 0.1 * place) for place, name in enumerate("abcdefgh")}

    def first(ingresses: int) -> Counter[str]:
        return Counter(View(seed=seed, ingresses=ingresses, **reports).ranked()[0] for seed in range(200))

    assert first(1) == {"a": 200}
    assert max(first(4).values()) < 100 and set(first(4)) == set("abcdefg"), "the better of two at random"
    full = {name: replace(stats, room=int(name == "h")) for name, stats in reports.items()}
    assert {View(seed=seed, ingresses=4, **full).ranked()[0] for seed in range(20)} == {"h"}, "the only one with room"


def test_without_predictions_the_share_of_free_slots_decides() -> None:
    assert View(a=slots(2), b=slots(9), c=slots(5)).ranked() == "bca"
    assert View(a=slots(4), b=slots(30, of=100)).ranked() == "ab", "the share of free slots, not their number"
    assert View(a=slots(2), b=USUAL).ranked() == "ba", "one that predicts comes first"
    view = View(a=slots(8), b=slots(6))
    for _ in range(3):
        view.send("a")
    assert view.ranked() == "ba"


def test_replicas_that_have_not_reported_come_last_the_least_busy_first() -> None:
    view = View(a=None, b=like(wait_s=9.0), c=None, d=USUAL)
    view.ongoing["a"] = 1
    assert view.ranked() == "dbca"


@pytest.mark.parametrize("stats", [USUAL, slots(5), None])
def test_equal_replicas_share_the_load(stats: RoutingStats | None) -> None:
    firsts = Counter(View(seed=seed, a=stats, b=stats, c=stats).ranked()[0] for seed in range(60))
    assert min(firsts[name] for name in "abc") > 8


def test_the_replicas_given_stay_in_their_order() -> None:
    replicas = ["a", "b", "c"]
    best_first(replicas, lambda _: None, str, Sent(lambda: 0.0, lambda: 0.0), Asked())
    assert replicas == ["a", "b", "c"]
