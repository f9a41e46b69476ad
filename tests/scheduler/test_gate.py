"""The gate as vLLM's waiting queue: what is visible, what is counted, what is remembered."""

import pytest
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.request_queue import SchedulingPolicy, create_request_queue
from vllm.v1.request import Request

from scheduler.fair_queue import Tenant
from scheduler.gate import GatedQueue
from scheduler.policies import QueueView


def request(name, *, prompt=8, priority=0, arrival_time=0.0):
    return Request(
        request_id=name, prompt_token_ids=[1] * prompt, sampling_params=SamplingParams(max_tokens=4),
        pooling_params=None, priority=priority, arrival_time=arrival_time,
    )


class Gate:
    """A gate whose types are "short" (prompts of at most `short` tokens) and "long"."""

    def __init__(self, order=SchedulingPolicy.FCFS):
        self.now_s, self.short, self.holds = 0.0, 10, []
        self.queue = GatedQueue(order, self.classify, lambda: self.now_s, self.holds.append)

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
def gate():
    return Gate()


def names(queue):
    return [each.request_id for each in queue]


def test_a_held_request_is_counted_and_listed_but_not_visible(gate):
    gate.add(request("a"), request("b"))
    assert len(gate.queue) == 2 and names(gate.queue) == ["a", "b"]
    assert not gate.queue and gate.queue.held == 2 and gate.queue.released == 0
    with pytest.raises(IndexError):
        gate.queue.pop_request()


def test_release_lets_the_first_through_and_tells_how_long_they_were_held(gate):
    gate.add(request("a"), request("b"), request("c"))
    gate.now_s = 0.5
    gate.queue.release("short", 2)
    assert gate.holds == [0.5, 0.5]
    assert gate.queue and len(gate.queue) == 3 and (gate.queue.held, gate.queue.released) == (1, 2)
    assert gate.queue.peek_request().request_id == "a"
    assert gate.pop_all() == ["a", "b"] and names(gate.queue) == ["c"]


def test_release_of_more_than_wait_or_of_an_unknown_type_is_harmless(gate):
    gate.add(request("a"))
    gate.queue.release("long", 5)
    gate.queue.release("short", 5)
    assert gate.pop_all() == ["a"]


def test_views_tell_length_and_age_by_type(gate):
    gate.add(request("a"))
    gate.now_s = 1.0
    gate.add(request("b"), request("L", prompt=50))
    assert gate.queue.views() == {"short": QueueView(2, 0.0), "long": QueueView(1, 1.0)}
    gate.queue.release("short", 1)
    assert gate.queue.views()["short"] == QueueView(1, 1.0)
    gate.queue.release("short", 1)
    assert list(gate.queue.views()) == ["long"], "empty queues are left out"


def test_a_request_comes_back_in_front_and_never_waits_twice(gate):
    first, second = request("a"), request("b")
    gate.add(first, second)
    gate.queue.release("short", 2)
    assert gate.queue.pop_request() is first
    gate.queue.prepend_request(first)  # preempted
    assert gate.queue.held == 0 and gate.pop_all() == ["a", "b"]
    gate.queue.add_request(first)  # vLLM enqueues it anew
    assert gate.queue.held == 0 and gate.pop_all() == ["a"]


def test_skipped_requests_come_back_in_front(gate):
    a, b, c = (request(name) for name in "abc")
    gate.add(a, b, c)
    gate.queue.release("short", 3)
    skipped = create_request_queue(SchedulingPolicy.FCFS)
    for _ in range(2):
        skipped.prepend_request(gate.queue.pop_request())
    gate.queue.prepend_requests(skipped)
    assert gate.pop_all() == ["a", "b", "c"]


@pytest.mark.parametrize("order", list(SchedulingPolicy))
def test_requests_are_removed_wherever_they_wait(order):
    gate = Gate(order)
    held, let_through, elsewhere = request("held"), request("through", prompt=50), request("elsewhere")
    gate.add(let_through)
    gate.queue.release("long", 1)
    gate.add(held)
    gate.queue.remove_requests([held, let_through, elsewhere])
    assert len(gate.queue) == 0 and not gate.queue and gate.queue.views() == {} and names(gate.queue) == []


def test_remove_one(gate):
    a, b = request("a"), request("b")
    gate.add(a, b)
    gate.queue.remove_request(a)
    gate.queue.release("short", 2)
    gate.queue.remove_request(b)
    assert len(gate.queue) == 0 and gate.holds == [0.0], "only b was let through"


def test_age_forgets_those_who_left(gate):
    gate.add(request("a"))
    gate.now_s = 1.0
    b = request("b")
    gate.add(b)
    gate.now_s = 2.0
    gate.add(request("c"))
    gate.queue.remove_request(b)
    gate.queue.release("short", 1)
    assert gate.queue.views() == {"short": QueueView(1, 2.0)}


def test_age_survives_a_request_id_used_again(gate):
    a = request("a")
    gate.add(a)
    gate.now_s = 1.0
    gate.add(request("b"))
    gate.queue.remove_request(a)
    gate.queue.forget(a)
    gate.now_s = 2.0
    gate.add(request("a"))
    assert gate.queue.views() == {"short": QueueView(2, 1.0)}, "b has waited since 1.0"


def test_priority_decides_who_is_first_and_age_who_is_oldest():
    gate = Gate(SchedulingPolicy.PRIORITY)
    gate.add(request("late", priority=5))
    gate.now_s = 1.0
    gate.add(request("urgent", priority=0, arrival_time=1.0))
    assert gate.queue.views() == {"short": QueueView(2, 0.0)}
    gate.queue.release("short", 1)
    assert gate.pop_all() == ["urgent"]
    assert gate.queue.views() == {"short": QueueView(1, 0.0)}


def test_reclassify_sorts_the_held_anew_and_keeps_their_age(gate):
    gate.add(request("a", prompt=8))
    gate.now_s = 1.0
    gate.add(request("b", prompt=12), request("c", prompt=20))
    gate.now_s = 2.0
    gate.add(request("d", prompt=8))
    gate.short = 15
    gate.queue.reclassify([])
    assert gate.queue.views() == {"short": QueueView(3, 0.0), "long": QueueView(1, 1.0)}
    gate.queue.release("short", 3)
    assert gate.pop_all() == ["a", "b", "d"], "by age, whatever their type was before"
    assert gate.holds == [2.0, 1.0, 0.0]


@pytest.mark.parametrize("short", [10, 1000])
def test_reclassify_changes_no_tenants_turn(short):
    """Tenant a has been served 400 tokens more; sorting anew, into the same queue or another, forgets none of it."""
    gate = Gate()
    gate.queue = GatedQueue(
        SchedulingPolicy.FCFS, gate.classify, lambda: 0.0, gate.holds.append,
        lambda each: Tenant(each.request_id[0], 1.0),
    )
    gate.add(*(request(f"{tenant}{number}", prompt=100) for number in range(6) for tenant in "ab"))
    gate.queue._ledger.charge(Tenant("a", 1.0), 400)
    gate.short = short
    gate.queue.reclassify([])
    gate.queue.release("long" if short < 100 else "short", 12)
    assert "".join(name[0] for name in gate.pop_all()) == "bbbbababaaaa"


def test_reclassify_names_the_type_of_those_let_through_and_in_service_too(gate):
    let_through, in_service = request("t", prompt=12), request("s", prompt=12)
    gate.add(in_service, let_through)
    gate.queue.release("long", 2)
    assert gate.queue.pop_request() is in_service
    gate.short = 15
    gate.queue.reclassify([in_service])
    assert gate.queue.type_of("s") == "short" and gate.queue.type_of("t") == "short"
    assert gate.queue.held == 0, "nobody is held again"


def test_nothing_is_remembered_of_the_forgotten(gate):
    for place in range(50):
        each = request(f"r{place}")
        gate.add(each)
        gate.queue.release("short", 1)
        gate.queue.pop_request()
        gate.queue.forget(each)
    assert gate.queue.type_of("r7") is None
    assert not gate.queue._type_of and not gate.queue._since_s


def test_a_request_let_through_out_of_its_turn_is_like_any_other(gate):
    a, b, c = request("a"), request("0_b"), request("1_b")
    gate.add(a, b, c)
    gate.now_s = 0.25
    gate.queue.let_through(b)
    assert gate.pop_all() == ["0_b"] and gate.holds == [0.25]
    assert names(gate.queue) == ["a", "1_b"] and gate.queue.held == 2


def test_a_choice_whose_sibling_was_let_through_is_not_among_those_to_reject(gate):
    gate.add(request("0_b"), request("a"), request("1_b"), request("2_b"))
    assert [each.request_id for each in gate.queue.last("short", 2)] == ["2_b", "1_b"]
    gate.queue.release("short", 1)
    assert [each.request_id for each in gate.queue.last("short", 2)] == ["a"]
    view = gate.queue.views()["short"]
    assert [waiting.request_id for waiting in view.aged()] == ["a"]
    assert [waiting.request_id for waiting in view.heads()] == ["a", "1_b", "2_b"], "it waits for its turn"
