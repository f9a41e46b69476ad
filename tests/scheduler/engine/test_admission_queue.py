"""The admission queue as vLLM's waiting queue: what is visible, counted and remembered."""

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request

from scheduler.engine.admission_queue import AdmissionQueue
from scheduler.engine.fair_queue import Tenant
from scheduler.policies import QueueView


def request(name, *, prompt=8, priority=0, arrival_time=0.0):
    return Request(
        request_id=name, prompt_token_ids=[1] * prompt, sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None, priority=priority, arrival_time=arrival_time,
    )


class Gate:
    """An admission queue whose types are "short" (prompts of at most `short` tokens) and "long"."""

    def __init__(self, order=SchedulingPolicy.FCFS):
        self.now_s, self.short, self.holds = 0.0, 10, []
        self.queue = AdmissionQueue(order, self.classify, lambda: self.now_s, self.holds.append)

    def classify(self, request):
        return "short" if request.num_prompt_tokens <= self.short else "long"

    def add(self, *requests):
        for each in requests:
            self.queue.add_request(each)

    def pop_all(self):
        popped = []
        while self.queue:
            popped.append(self.queue.pop_request().request_id)
        return popped


@pytest.fixture
def admission_queue():
    return Gate()


def names(queue):
    return [each.request_id for each in queue]


def test_a_held_request_is_counted_and_listed_but_not_visible(admission_queue):
    admission_queue.add(request("a"), request("b"))
    assert len(admission_queue.queue) == 2 and names(admission_queue.queue) == ["a", "b"]
    assert not admission_queue.queue and admission_queue.queue.held == 2 and admission_queue.queue.released == 0
    with pytest.raises(IndexError):
        admission_queue.queue.pop_request()


def test_release_lets_the_first_through_and_tells_how_long_they_were_held(admission_queue):
    admission_queue.add(request("a"), request("b"), request("c"))
    admission_queue.now_s = 0.5
    admission_queue.queue.release("short", 2)
    assert admission_queue.holds == [0.5, 0.5]
    assert (
        admission_queue.queue
        and len(admission_queue.queue) == 3
        and (admission_queue.queue.held, admission_queue.queue.released) == (1, 2)
    )
    assert admission_queue.queue.peek_request().request_id == "a"
    assert admission_queue.pop_all() == ["a", "b"] and names(admission_queue.queue) == ["c"]


def test_release_of_more_than_wait_or_of_an_unknown_type_is_harmless(admission_queue):
    admission_queue.add(request("a"))
    admission_queue.queue.release("long", 5)
    admission_queue.queue.release("short", 5)
    assert admission_queue.pop_all() == ["a"]


def test_views_tell_length_and_age_by_type(admission_queue):
    admission_queue.add(request("a"))
    admission_queue.now_s = 1.0
    admission_queue.add(request("b"), request("L", prompt=50))
    assert admission_queue.queue.views() == {"short": QueueView(2, 0.0), "long": QueueView(1, 1.0)}
    admission_queue.queue.release("short", 1)
    assert admission_queue.queue.views()["short"] == QueueView(1, 1.0)
    admission_queue.queue.release("short", 1)
    assert list(admission_queue.queue.views()) == ["long"], "empty queues are left out"


def test_a_request_is_new_until_a_decision_has_seen_it(admission_queue):
    def new():
        view = admission_queue.queue.views()["short"]
        return [waiting.request_id for waiting in view.heads() if view.is_new(waiting)]

    admission_queue.add(request("a"), request("b"))
    assert new() == ["a", "b"]
    admission_queue.queue.seen()
    admission_queue.add(request("c"))
    admission_queue.queue.reclassify([])  # as new parameters do
    assert new() == ["c"]


def test_a_request_comes_back_in_front_and_never_waits_twice(admission_queue):
    first, second = request("a"), request("b")
    admission_queue.add(first, second)
    admission_queue.queue.release("short", 2)
    assert admission_queue.queue.pop_request() is first
    admission_queue.queue.prepend_request(first)  # preempted
    assert admission_queue.queue.held == 0 and admission_queue.pop_all() == ["a", "b"]
    admission_queue.queue.add_request(first)  # vLLM enqueues it anew
    assert admission_queue.queue.held == 0 and admission_queue.pop_all() == ["a"]


def test_skipped_requests_come_back_in_front(admission_queue):
    a, b, c = (request(name) for name in "abc")
    admission_queue.add(a, b, c)
    admission_queue.queue.release("short", 3)
    skipped = create_request_queue(SchedulingPolicy.FCFS)
    for _ in range(2):
        skipped.prepend_request(admission_queue.queue.pop_request())
    admission_queue.queue.prepend_requests(skipped)
    assert admission_queue.pop_all() == ["a", "b", "c"]


@pytest.mark.parametrize("order", list(SchedulingPolicy))
def test_requests_are_removed_wherever_they_wait(order):
    admission_queue = Gate(order)
    held, let_through, elsewhere = request("held"), request("through", prompt=50), request("elsewhere")
    admission_queue.add(let_through)
    admission_queue.queue.release("long", 1)
    admission_queue.add(held)
    admission_queue.queue.remove_requests([held, let_through, elsewhere])
    assert (
        len(admission_queue.queue) == 0
        and not admission_queue.queue
        and admission_queue.queue.views() == {}
        and names(admission_queue.queue) == []
    )


def test_remove_one(admission_queue):
    a, b = request("a"), request("b")
    admission_queue.add(a, b)
    admission_queue.queue.remove_request(a)
    admission_queue.queue.release("short", 2)
    admission_queue.queue.remove_request(b)
    assert len(admission_queue.queue) == 0 and admission_queue.holds == [0.0], "only b was let through"


def test_age_forgets_requests_that_left(admission_queue):
    admission_queue.add(request("a"))
    admission_queue.now_s = 1.0
    b = request("b")
    admission_queue.add(b)
    admission_queue.now_s = 2.0
    admission_queue.add(request("c"))
    admission_queue.queue.remove_request(b)
    admission_queue.queue.release("short", 1)
    assert admission_queue.queue.views() == {"short": QueueView(1, 2.0)}


def test_age_survives_a_request_id_used_again(admission_queue):
    a = request("a")
    admission_queue.add(a)
    admission_queue.now_s = 1.0
    admission_queue.add(request("b"))
    admission_queue.queue.remove_request(a)
    admission_queue.queue.forget(a)
    admission_queue.now_s = 2.0
    admission_queue.add(request("a"))
    assert admission_queue.queue.views() == {"short": QueueView(2, 1.0)}, "b has waited since 1.0"


def test_priority_decides_the_first_request_and_age_the_oldest():
    admission_queue = Gate(SchedulingPolicy.PRIORITY)
    admission_queue.add(request("late", priority=5))
    admission_queue.now_s = 1.0
    admission_queue.add(request("urgent", priority=0, arrival_time=1.0))
    assert admission_queue.queue.views() == {"short": QueueView(2, 0.0)}
    admission_queue.queue.release("short", 1)
    assert admission_queue.pop_all() == ["urgent"]
    assert admission_queue.queue.views() == {"short": QueueView(1, 0.0)}


def test_reclassify_sorts_the_held_anew_and_keeps_their_age(admission_queue):
    admission_queue.add(request("a", prompt=8))
    admission_queue.now_s = 1.0
    admission_queue.add(request("b", prompt=12), request("c", prompt=20))
    admission_queue.now_s = 2.0
    admission_queue.add(request("d", prompt=8))
    admission_queue.short = 15
    admission_queue.queue.reclassify([])
    assert admission_queue.queue.views() == {"short": QueueView(3, 0.0), "long": QueueView(1, 1.0)}
    admission_queue.queue.release("short", 3)
    assert admission_queue.pop_all() == ["a", "b", "d"], "by age, whatever their type was before"
    assert admission_queue.holds == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("short", [10, 1000])
def test_reclassify_changes_no_tenants_turn(short):
    """Tenant a has been served 400 tokens more; sorting anew, into the same queue or another, forgets none of it."""
    admission_queue = Gate()
    admission_queue.queue = AdmissionQueue(
        SchedulingPolicy.FCFS, admission_queue.classify, lambda: 0.0, admission_queue.holds.append,
        lambda each: Tenant(each.request_id[0], 1.0),
    )
    admission_queue.add(*(request(f"{tenant}{number}", prompt=100) for number in range(6) for tenant in "ab"))
    admission_queue.queue._ledger.charge(Tenant("a", 1.0), 400)
    admission_queue.short = short
    admission_queue.queue.reclassify([])
    admission_queue.queue.release("long" if short < 100 else "short", 12)
    assert "".join(name[0] for name in admission_queue.pop_all()) == "bbbbababaaaa"


def test_reclassify_covers_admitted_and_running_requests_too(admission_queue):
    let_through, running = request("t", prompt=12), request("s", prompt=12)
    admission_queue.add(running, let_through)
    admission_queue.queue.release("long", 2)
    assert admission_queue.queue.pop_request() is running
    admission_queue.short = 15
    admission_queue.queue.reclassify([running])
    assert admission_queue.queue.type_of("s") == "short" and admission_queue.queue.type_of("t") == "short"
    assert admission_queue.queue.held == 0, "no request is held again"


def test_nothing_is_remembered_of_the_forgotten(admission_queue):
    for place in range(50):
        each = request(f"r{place}")
        admission_queue.add(each)
        admission_queue.queue.release("short", 1)
        admission_queue.queue.pop_request()
        admission_queue.queue.forget(each)
    assert admission_queue.queue.type_of("r7") is None
    assert not admission_queue.queue._type_of and not admission_queue.queue._since_s


def test_a_request_let_through_out_of_its_turn_is_like_any_other(admission_queue):
    a, b, c = request("a"), request("0_b"), request("1_b")
    admission_queue.add(a, b, c)
    admission_queue.now_s = 0.25
    admission_queue.queue.let_through(b)
    assert admission_queue.pop_all() == ["0_b"] and admission_queue.holds == [0.25]
    assert names(admission_queue.queue) == ["a", "1_b"] and admission_queue.queue.held == 2


def test_a_choice_whose_sibling_was_let_through_is_not_among_those_to_reject(admission_queue):
    admission_queue.add(request("0_b"), request("a"), request("1_b"), request("2_b"))
    assert [each.request_id for each in admission_queue.queue.last("short", 2)] == ["2_b", "1_b"]
    admission_queue.queue.release("short", 1)
    assert [each.request_id for each in admission_queue.queue.last("short", 2)] == ["a"]
    view = admission_queue.queue.views()["short"]
    assert [waiting.request_id for waiting in view.aged()] == ["a"]
    assert [waiting.request_id for waiting in view.heads()] == ["a", "1_b", "2_b"], "it waits for its turn"
