"""Specs of request lengths."""

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scheduler.model.workload import Lengths
from simulator.workload.lengths import lmsys_lengths, parse_lengths, trace_lengths

LMSYS_TRACE = Path(__file__).parents[3].parent / "shared/data/traces/lmsys_lengths.csv"

modest = settings(derandomize=True, deadline=None, max_examples=50)
mixes = st.dictionaries(
    st.tuples(st.integers(1, 9999), st.integers(1, 9999)), st.floats(0.001, 1000), min_size=1, max_size=5
)


def draw(text, n=20_000, arrival_s=None, seed=0):
    source = parse_lengths(text)
    arrival_s = np.zeros(n) if arrival_s is None else arrival_s
    prompt, output, name = source.draw(np.random.default_rng(seed), arrival_s)
    return prompt, output, np.array(source.names)[name]


@modest
@given(mixes)
def test_a_written_mix_is_read_back(mix):
    source = parse_lengths(" + ".join(f"{weight!r}:p{p}d{d}" for (p, d), weight in mix.items()))
    types = {t.name: t for t in source.types(1.0)}
    assert list(types) == [f"p{p}d{d}" for p, d in mix]
    for (prompt, output), weight in mix.items():
        component = types[f"p{prompt}d{output}"]
        assert component.lengths == Lengths.point(prompt, output)
        assert component.weight == pytest.approx(weight / sum(mix.values()))


def test_fixed_lengths():
    prompt, output, name = draw("p512d20", 10)
    assert (set(prompt), set(output), set(name)) == ({512}, {20}, {"p512d20"})


def test_a_mix_has_its_shares_and_names_match_lengths():
    prompt, output, name = draw("7:p512d20+3:p500d50")
    assert np.mean(name == "p512d20") == pytest.approx(0.7, abs=0.01)
    assert np.array_equal(name == "p512d20", (prompt == 512) & (output == 20))
    assert np.array_equal(name == "p500d50", (prompt == 500) & (output == 50))


def test_a_shift_changes_the_mix_from_its_time_on():
    arrival_s = np.array([0, 299.99, 300, 899.99, 900, 1e6])
    _, _, name = draw("p1d1; 300s: p2d2; 900s:0.5:p3d3+0.5:p3d4", arrival_s=arrival_s)
    assert list(name[:4]) == ["p1d1", "p1d1", "p2d2", "p2d2"]
    assert set(name[4:]) <= {"p3d3", "p3d4"}


def test_lognormal_lengths_have_the_means_and_the_spread_asked_for():
    prompt, output, name = draw("p2500~0.5d300~1.2", 200_000)
    assert set(name) == {"p2500~0.5d300~1.2"}
    assert prompt.mean() == pytest.approx(2500, rel=0.01)
    assert output.mean() == pytest.approx(300, rel=0.03)
    assert prompt.std() / prompt.mean() == pytest.approx(0.5, rel=0.05)
    assert output.std() / output.mean() == pytest.approx(1.2, rel=0.1)
    assert np.median(output) == pytest.approx(300 / np.sqrt(1 + 1.2**2), rel=0.02)
    assert abs(np.corrcoef(prompt, output)[0, 1]) < 0.01


def test_a_trace_s_joint_lengths_before_and_after_a_shift(tmp_path):
    path = tmp_path / "some.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n10,1\n20,2\n20,2\n0,5\n")
    arrival_s = np.repeat([0.0, 60.0, 120.0], 3000)
    prompt, output, name = draw(f"@{path}; 60s: p7d7; 120s: 0.5:@{path}+0.5:p7d7", arrival_s=arrival_s)
    assert set(zip(prompt[:3000], output[:3000], strict=True)) == {(10, 1), (20, 2)}, "the row without a prompt is none"
    assert np.mean(prompt[:3000] == 20) == pytest.approx(2 / 3, abs=0.03)
    assert set(name[:3000]) == {"@some"}
    assert set(prompt[3000:6000]) == {7}
    assert np.mean(name[6000:] == "@some") == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("content", [None, "a,b\n1,2\n", "num_prefill_tokens,num_decode_tokens\n0,1\n"])
def test_a_trace_that_gives_no_lengths_is_named(content, tmp_path):
    path = tmp_path / "some.csv"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=r"at '@.*some\.csv'"):
        parse_lengths(f"p1d1; 5s: @{path}")


def test_types_of_a_shifting_source_are_weighted_by_time():
    source = parse_lengths("p1d1; 30s: 0.5:p1d1+0.5:p2d2; 100s: p3d3")
    assert {t.name: t.weight for t in source.types(50.0)} == pytest.approx({"p1d1": 0.8, "p2d2": 0.2})
    assert {t.name: t.weight for t in source.types(200.0)} == pytest.approx({"p1d1": 0.325, "p2d2": 0.175, "p3d3": 0.5})


def test_blocks_of_any_size_give_one_sequence_whatever_the_times():
    source = parse_lengths("0.5:lmsys+0.5:p7d7")
    whole = source.draw(np.random.default_rng(3), np.zeros(100))
    rng = np.random.default_rng(3)
    parts = [source.draw(rng, np.full(size, 5.0)) for size in (1, 60, 39)]
    for array, blocks in zip(whole, zip(*parts, strict=True), strict=True):
        assert np.array_equal(array, np.concatenate(blocks))


def test_lmsys_has_the_published_statistics():
    lengths = lmsys_lengths()
    for tokens, mean, median in ((lengths.prompt_tokens, 58.6, 21), (lengths.output_tokens, 147.3, 116)):
        assert (tokens.min(), tokens.max()) == (1, 499)
        assert lengths.weights @ tokens == pytest.approx(mean, rel=1e-4)
        below, above = lengths.weights[tokens < median].sum(), lengths.weights[tokens > median].sum()
        assert below < 0.5
        assert above < 0.5
        assert below == pytest.approx(above, abs=1e-4)


def test_lmsys_prompt_and_output_are_independent():
    table = lmsys_lengths().weights.reshape(499, 499)
    assert np.allclose(table, np.outer(table.sum(axis=1), table.sum(axis=0)), atol=1e-15)


def test_lmsys_draws_follow_its_distribution():
    prompt, output, _ = draw("lmsys", 50_000)
    assert prompt.mean() == pytest.approx(58.6, rel=0.03)
    assert output.mean() == pytest.approx(147.3, rel=0.03)
    assert np.median(prompt) == pytest.approx(21, abs=1)
    assert np.median(output) == pytest.approx(116, abs=2)


@pytest.mark.skipif(not LMSYS_TRACE.exists(), reason="the shared trace folder is not here")
def test_lmsys_is_like_the_trace():
    """The trace ends prompts at 199 tokens, so prompts are compared below 200."""
    trace, generated = trace_lengths(str(LMSYS_TRACE)), lmsys_lengths()
    assert generated.mean_output_tokens == pytest.approx(trace.mean_output_tokens, rel=0.02)
    assert generated.output_quantile(0.5) == pytest.approx(trace.output_quantile(0.5), abs=1)
    short = Lengths(
        generated.prompt_tokens, generated.output_tokens, generated.weights * (generated.prompt_tokens < 200)
    )
    assert short.mean_prompt_tokens == pytest.approx(trace.mean_prompt_tokens, rel=0.05)
    medians = [x.prompt_tokens[np.searchsorted(np.cumsum(x.weights), 0.5)] for x in (short, trace)]
    assert medians[0] == pytest.approx(medians[1], abs=1)


def test_limits_condition_each_phase():
    source = parse_lengths("0.5:p100d5+0.5:lmsys; 9s: p10d1").limited(max_total_tokens=104, min_output_tokens=1)
    assert source.names == ("lmsys", "p10d1")
    assert source.left_out["p100d5"] == 1
    first = source.phases[0].components[0]
    assert (first.weight, first.lengths.max_total_tokens) == (1, 104)
    whole = lmsys_lengths()
    fits = whole.prompt_tokens + whole.output_tokens <= 104
    assert source.left_out["lmsys"] == pytest.approx(1 - whole.weights[fits].sum())
    with pytest.raises(ValueError, match="no request of p10d1 is left: .*min_output_tokens is 2"):
        source.limited(min_output_tokens=2)


def test_limits_keep_the_ratio_of_what_fits():
    source = parse_lengths("0.2:p1d1+0.6:p2d2+0.2:p9d9").limited(max_total_tokens=10)
    assert {t.name: t.weight for t in source.types(1.0)} == pytest.approx({"p1d1": 0.25, "p2d2": 0.75})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "at '': lengths are pPROMPTdOUTPUT"),
        ("p512", "at 'p512': lengths are"),
        ("p0d3", "at 'p0d3': lengths are"),
        ("p1d2.5", "at 'p1d2.5': lengths are"),
        ("0.5:p1d1+p2d2", "at 'p2d2': each part of a mix needs a weight"),
        ("0:p1d1+1:p2d2", "at '0:p1d1': the weight is '0'"),
        ("x:p1d1", "the weight is 'x'"),
        (":p1d1", "the weight is ''"),
        ("nan:p1d1", "the weight is 'nan'"),
        ("1:p1d1+2:p1d1", "at '2:p1d1': p1d1 is in the mix already"),
        ("1:p1d1+2:p01d1", "p1d1 is in the mix already"),
        ("p1d1; p2d2", "at 'p2d2': after a semicolon"),
        ("p1d1; 3: p2d2", "at '3: p2d2': after a semicolon"),
        ("p1d1; 0s: p2d2", "at '0s: p2d2': each shift must come later"),
        ("p1d1; 5s: p2d2; 5s: p3d3", "at '5s: p3d3': each shift must come later"),
        ("p1d1;", "after a semicolon"),
    ],
)
def test_a_wrong_spec_names_the_piece_and_shows_examples(text, message):
    with pytest.raises(ValueError, match=message) as error:
        parse_lengths(text)
    assert "examples: p512d20 | " in str(error.value)
