"""What a client may say of its request: taken where it makes sense, and otherwise as if it were not there."""

import math
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scheduler.engine.client_input import declared_output_tokens, tenant_of
from scheduler.engine.fair_queue import DEFAULT_TENANT, Tenant
from scheduler.settings import EXPECTED_OUTPUT_TOKENS, TENANT, TENANT_WEIGHT

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=5,
)


def request(extra_args):
    return SimpleNamespace(sampling_params=SimpleNamespace(extra_args=extra_args))


@given(JSON, JSON, JSON)
def test_no_value_raises(name, weight, length):
    one = request({TENANT: name, TENANT_WEIGHT: weight, EXPECTED_OUTPUT_TOKENS: length})
    tenant, declared = tenant_of(one), declared_output_tokens(one)
    assert tenant.name == name or tenant == DEFAULT_TENANT
    assert 0 < tenant.weight <= 1000
    assert declared is None or declared >= 1


@pytest.mark.parametrize("one", [request(None), request([]), request("x"), SimpleNamespace(sampling_params=None)])
def test_a_request_without_arguments_says_nothing(one):
    assert tenant_of(one) == DEFAULT_TENANT and declared_output_tokens(one) is None


@pytest.mark.parametrize(
    ("name", "weight", "tenant"),
    [
        ("team", 2, Tenant("team", 2.0)), ("team", 0.5, Tenant("team", 0.5)),
        ("n" * 64, 1000, Tenant("n" * 64, 1000.0)),
        ("team", 0, None), ("team", -1, None), ("team", math.nan, None), ("team", 1001, None), ("team", "2", None),
        ("team", True, None), ("", 1, None), ("n" * 65, 1, None), (7, 1, None),
    ],
)
def test_a_tenant_is_believed_within_the_limits_of_the_configuration(name, weight, tenant):
    assert tenant_of(request({TENANT: name, TENANT_WEIGHT: weight})) == (tenant or DEFAULT_TENANT)


def test_a_tenant_without_a_weight_has_the_usual_one():
    assert tenant_of(request({TENANT: "team"})) == Tenant("team", 1.0)
