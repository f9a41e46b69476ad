"""Counting and timing the tokens of a stream, whatever pieces it comes in."""

from itertools import pairwise

import pytest
from fake_server import DONE, event
from hypothesis import given, settings
from hypothesis import strategies as st

from loadgen.stream import StreamError, TokenStream


def fed(*pieces):
    """A stream that got these pieces at 1 s, 2 s, …"""
    stream = TokenStream()
    for second, data in enumerate(pieces, 1):
        stream.feed(data, float(second))
    return stream


def test_one_token_an_event():
    stream = fed(event(so_far=1, prompt=7), event(so_far=2, finish="length"), event(None, 2, prompt=7), DONE)
    assert stream.token_s == [1.0, 2.0]
    assert (stream.ended, stream.finish_reason, stream.prompt_tokens) == (True, "length", 7)


def test_an_event_with_several_tokens_is_told_by_the_usage_so_far():
    assert fed(event(so_far=1), event("bcd", so_far=4), event("e", so_far=5)).token_s == [1.0, 2.0, 2.0, 2.0, 3.0]


def test_a_token_without_text_counts_when_the_usage_says_so():
    assert fed(event(so_far=1), event("", so_far=2), event("c", so_far=3)).token_s == [1.0, 2.0, 3.0]


def test_without_usage_so_far_the_closing_one_gives_the_count():
    assert fed(event(), event("bc"), event("", finish="stop"), event(None, 3), DONE).token_s == [1.0, 2.0, 3.0]


def test_without_any_usage_an_event_with_text_is_a_token():
    assert fed(event(), event(), event("", finish="stop"), DONE).token_s == [1.0, 2.0]


def test_more_events_than_tokens_keep_the_first_and_the_last_time():
    assert fed(event(), event(), event(), event(), event(None, 2)).token_s == [1.0, 4.0]
    assert fed(event(), event(), event(None, 1)).token_s == [1.0]


def test_several_events_at_once_have_one_time():
    assert fed(event(so_far=1) + event(so_far=2), event(so_far=3)).token_s == [1.0, 1.0, 2.0]


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 400), max_size=12))
def test_where_the_network_cuts_does_not_matter(cuts):
    # U+2028 and U+0085 end a line for str.splitlines, but not in an event stream.
    whole = b": a comment\n\n" + b"".join(event(text, n) for n, text in enumerate("a\u2028\u0085é\r", 1)) + DONE
    edges = [0, *sorted(cut for cut in cuts if cut < len(whole)), len(whole)]
    stream = fed(*(whole[a:b] for a, b in pairwise(edges)))
    assert len(stream.token_s) == 5
    assert stream.token_s == sorted(stream.token_s)
    assert stream.ended


@pytest.mark.parametrize(
    ("data", "said", "code"),
    [
        (b'data: {"error": {"message": "out of memory", "code": 500}}\n', "out of memory", 500),
        (b'data: {"error": {"message": "queue is full", "code": 429}}\n', "queue is full", 429),
        (b'data: {"error": "gone"}\n', "gone", None),
        (b"data: <html>\n", "no JSON", None),
        (b"data: [1]\n", "no JSON object", None),
    ],
)
def test_an_error_inside_the_stream(data, said, code):
    with pytest.raises(StreamError, match=said) as raised:
        fed(event(so_far=1), data)
    assert raised.value.code == code
