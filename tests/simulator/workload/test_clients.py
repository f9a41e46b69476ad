"""When clients come back that were rejected."""


import pytest

from simulator.config import SimulationError, simulation_config
from simulator.workload import clients
from simulator.workload.clients import IMPATIENT_PAUSE_S, IMPATIENT_RETRIES, Returns
from simulator.workload.requests import SimRequest

REQUEST = SimRequest(0.0, 10, 10, "t")


def pause(returns, attempt, retry_after_s, as_advised=False):
    """Seconds until the client comes back, or None."""
    if not returns.rejected(7, REQUEST, attempt, as_advised, 100.0, retry_after_s):
        return None
    (coming,) = returns.due(1e9)
    assert (coming.request_number, coming.number, coming.request) == (7, attempt + 1, REQUEST)
    return coming.at_s - 100.0


# The rules.


def test_the_rule_is_that_of_the_installed_openai_client():
    constants = pytest.importorskip("openai._constants")
    assert constants.DEFAULT_MAX_RETRIES == clients.OPENAI_RETRIES
    assert constants.MAX_RETRY_AFTER_DELAY == clients.OPENAI_LONGEST_S
    assert (constants.INITIAL_RETRY_DELAY, constants.MAX_RETRY_DELAY) == (0.5, 8.0)


def test_an_openai_client_waits_as_long_as_it_is_told_twice():
    returns = Returns("openai", 0)
    assert pause(returns, 0, 3) == 3.0
    assert pause(returns, 1, 60) == 60.0
    assert pause(returns, 2, 1) is None, "two retries"
    assert pause(returns, 0, 121) is None, "it gives up rather than wait so long"


def test_an_openai_client_that_is_told_nothing_backs_off():
    returns = Returns("openai", 0)
    for attempt, longest_s in ((0, 0.5), (1, 1.0)):
        pauses = [pause(returns, attempt, None) for _ in range(200)]
        assert 0.75 * longest_s <= min(pauses) < 0.8 * longest_s < 0.95 * longest_s < max(pauses) <= longest_s
    assert returns.totals.as_advised == 0


def test_impatient_clients_ignore_what_they_are_told():
    returns = Returns("impatient", 0)
    assert pause(returns, 0, 30) == pause(returns, IMPATIENT_RETRIES - 1, None) == IMPATIENT_PAUSE_S
    assert pause(returns, IMPATIENT_RETRIES, 1) is None


def test_who_came_back_when_told_is_counted_until_the_next_rejection():
    returns = Returns("openai", 0)
    for number in range(4):
        returns.rejected(number, REQUEST, 0, False, 0.0, 2)
    assert returns.next_s == 2.0
    assert len(list(returns.due(2.0))) == 4
    returns.rejected(0, REQUEST, 1, True, 3.0, 2)
    assert (returns.totals.attempts, returns.totals.as_advised, returns.totals.admitted_fraction) == (4, 4, 0.75)


def test_an_audit_needs_targets():
    with pytest.raises(SimulationError, match="audit needs slo_ttft_s"):
        simulation_config({"lengths": "p1d1", "rate_rps": 1.0, "requests": 5, "audit": 1})
