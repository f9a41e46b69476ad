"""The survival of output lengths: what it says between its points, and its form on the wire."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import TypeAdapter

from scheduler.model.workload import Lengths
from scheduler.survival import Survival
from scheduler.thresholds import InvalidThresholds, parse_thresholds, thresholds_as_dict

PAIRS = [[0, 1.0], [99, 0.5], [100, 0.0]]
FLUID = {"time_model": {"d0_s": 0.01, "d1_s_per_kv_token": 1e-6}, "kv_limit_tokens": 1000}


def test_it_is_linear_between_points_and_zero_beyond_the_last():
    survival = Survival(((0, 1.0), (100, 0.5), (101, 0.0)))
    assert survival.at([0, 50, 100, 101, 5000]).tolist() == [1.0, 0.75, 0.5, 0.0, 0.0]


def test_survival_holds_at_every_length_of_few():
    points = dict(Survival.of(Lengths.from_pairs([(1, 5), (1, 5), (1, 9), (1, 20)])).points)
    assert points == {0: 1.0, 4: 1.0, 5: 0.5, 8: 0.5, 9: 0.25, 19: 0.25, 20: 0.0}


@given(st.lists(st.tuples(st.just(1), st.integers(1, 40)), min_size=1, max_size=30))
def test_of_few_lengths_it_is_exact(pairs):
    lengths = Lengths.from_pairs(pairs)
    survival = Survival.of(lengths)
    at = np.array([x for x, _ in survival.points])
    assert survival.at(at) == pytest.approx([np.mean([output > x for _, output in pairs]) for x in at])
    assert survival.mean == pytest.approx(lengths.mean_output_tokens, rel=0.02)


@pytest.mark.parametrize(
    "points", [(), ((1, 1.0),), ((0, 1.0), (0, 0.5)), ((0, 0.5), (1, 0.6)), ((0, 1.1),), ((0, 1.0), (1, -0.1))]
)
def test_points_that_are_no_survival_are_an_error_in_words(points):
    with pytest.raises(ValueError, match="survival must be pairs"):
        Survival(points)


def test_on_the_wire_it_is_the_bare_pairs():
    adapter = TypeAdapter(Survival)
    survival = adapter.validate_python(PAIRS)
    assert survival == Survival(tuple((x, p) for x, p in PAIRS))
    assert adapter.dump_python(survival, mode="json") == PAIRS
    assert adapter.validate_json(adapter.dump_json(survival)) == survival
    thresholds = parse_thresholds({"policy": "fluid", "fluid": FLUID | {"survival": PAIRS}})
    assert thresholds_as_dict(thresholds)["fluid"]["survival"] == PAIRS
    assert parse_thresholds(thresholds_as_dict(thresholds)) == thresholds


@pytest.mark.parametrize(
    ("pairs", "field"),
    [([[0, 1.0], [0, 0.5]], "fluid.survival"), ([[0, "1"]], "fluid.survival[0][1]"), ([], "fluid.survival")],
)
def test_a_wrong_one_is_named_by_its_place(pairs, field):
    with pytest.raises(InvalidThresholds) as caught:
        parse_thresholds({"policy": "fluid", "fluid": FLUID | {"survival": pairs}})
    assert str(caught.value).startswith(f"thresholds.{field} = ")
