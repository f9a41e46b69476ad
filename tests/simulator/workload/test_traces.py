"""Trace files in every format, with rows that are wrong."""

import json
import sys
from datetime import UTC, datetime
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from simulator.workload.traces import BadRow, TraceRow, open_trace, sample_rows

HEADRACE = "arrived_at,num_prefill_tokens,num_decode_tokens\n"
AZURE = "TIMESTAMP,ContextTokens,GeneratedTokens\n"
BURSTGPT = "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"


@pytest.fixture
def write(tmp_path):
    def write_file(text, name="trace.csv"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


def good(path, *args):
    return [row[1:4] for row in open_trace(path, *args).rows() if isinstance(row, TraceRow)]


def bad(path, *args):
    return [row.message for row in open_trace(path, *args).rows() if isinstance(row, BadRow)]


def conversation(*turns):
    return {"id": "x", "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}


def test_headrace_csv(write):
    path = write("\ufeffnum_decode_tokens,arrived_at,model,num_prefill_tokens\n20,0.5,a,512\n\n7,1.5,b,8\n")
    trace = open_trace(path)
    assert (trace.layout, trace.has_timestamps, trace.notes) == ("headrace", True, ())
    assert list(trace.rows()) == [TraceRow("line 2", 0.5, 512, 20), TraceRow("line 4", 1.5, 8, 7)]


def test_headrace_csv_without_times(write):
    path = write("num_prefill_tokens,num_decode_tokens\n1,2\n")
    assert not open_trace(path).has_timestamps
    assert good(path) == [(None, 1, 2)]


def test_azure_csv(write):
    path = write(AZURE + "2023-11-16 18:15:46.6805900,374,44\n2024-05-10 00:00:00.009930+00:00,396,109\n")
    assert open_trace(path).layout == "azure"
    (first_s, *first), (second_s, *second) = good(path)
    assert (first, second) == ([374, 44], [396, 109])
    assert first_s == pytest.approx(datetime(2023, 11, 16, 18, 15, 46, 680590, UTC).timestamp(), abs=1e-6)
    assert second_s == pytest.approx(datetime(2024, 5, 10, 0, 0, 0, 9930, UTC).timestamp(), abs=1e-6)


def test_burstgpt_csv_old_and_new(write):
    assert good(write(BURSTGPT + "5,ChatGPT,472,18,490,Conversation log\n")) == [(5.0, 472, 18)]
    new = "Timestamp,Session ID,Elapsed time,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
    path = write(new + "5.5,9,1.25,GPT-4,472,18,490,API log\n6,9,0,GPT-4,10,0,10,API log\n")
    assert open_trace(path).layout == "burstgpt"
    assert good(path) == [(5.5, 472, 18)]
    assert bad(path) == ["line 3: Response tokens is 0, a failed request"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0,x,1", "num_prefill_tokens is 'x'; it must be an integer between 1 and 2147483647"),
        ("0,1,", "num_decode_tokens is ''"),
        ("0,0,1", "num_prefill_tokens is '0'"),
        ("0,1,-1", "num_decode_tokens is '-1'"),
        ("0,1.5,1", "num_prefill_tokens is '1.5'"),
        ("0,1,9999999999", "num_decode_tokens is '9999999999'"),
        ("0,1", "it has 2 columns instead of 3"),
        ("0,1,1,1", "it has 4 columns instead of 3"),
        ("soon,1,1", "arrived_at is 'soon'; it must be a number of seconds"),
        ("nan,1,1", "arrived_at is 'nan'"),
        ("0,\udcff,1", "num_prefill_tokens is"),
    ],
)
def test_a_bad_row_is_named_and_the_rest_is_read(tmp_path, row, message):
    path = tmp_path / "trace.csv"
    path.write_bytes(f"{HEADRACE}1,2,3\n{row}\n4,5,6\n".encode("utf-8", "surrogateescape"))
    assert good(path) == [(1, 2, 3), (4, 5, 6)]
    (explained,) = bad(path)
    assert explained.startswith(f"line 3: {message}")


def test_a_bad_iso_time(write):
    path = write(AZURE + "yesterday,1,1\n2023-11-16 18:15:46,1,1\n")
    assert bad(path) == ["line 2: TIMESTAMP is 'yesterday'; it must be an ISO date and time"]
    assert len(good(path)) == 1


def test_lines_that_an_open_quote_swallows_are_named(write):
    path = write(HEADRACE + '1,2,3\n1,"2,3\n' + "4,5,6\n" * 3)
    assert good(path) == [(1, 2, 3)]
    assert bad(path) == ["line 3 to 6: it has 2 columns instead of 3"]


def test_reading_goes_on_after_a_field_too_long_for_csv(write):
    path = write(HEADRACE + "1,2,3\n1," + "9" * 140_000 + ",3\n4,5,6\n")
    assert good(path) == [(1, 2, 3), (4, 5, 6)]
    assert bad(path)[0].startswith("line 3: field larger than")


def test_a_message_stays_short(write):
    assert len(bad(write(HEADRACE + "1," + "x" * 5000 + ",3\n"))[0]) < 250


@pytest.mark.parametrize(
    ("header", "cells", "layout"),
    [
        (HEADRACE, [[0.5, 2.0, None], [7, 8, 9], [4, 5, 6]], "headrace"),
        (AZURE, [[datetime(2023, 1, 1), datetime(2023, 1, 2), None], [7, 8, 9], [4, 5, 6]], "azure"),
        (BURSTGPT, [[5, 6, None], ["m"] * 3, [7, 8, 9], [4, 5, 6], [11, 13, 15], ["API log"] * 3], "burstgpt"),
    ],
)
@pytest.mark.parametrize("trace_format", ["auto", "parquet"])
def test_parquet_in_every_layout(tmp_path, header, cells, layout, trace_format):
    path = tmp_path / "trace.parquet"
    pq.write_table(pa.table(dict(zip(header.strip().split(","), cells, strict=True))), path)
    trace = open_trace(path, trace_format)
    assert trace.layout == layout
    first, second, third = trace.rows()
    assert (first[2:4], second[2:4]) == ((7, 4), (8, 5))
    assert second.timestamp_s - first.timestamp_s == {"headrace": 1.5, "azure": 86_400, "burstgpt": 1}[layout]
    assert third.message.startswith("row 3: ")


def test_parquet_of_floats_with_holes_and_nanoseconds(tmp_path):
    path = tmp_path / "trace.parquet"
    times = pa.array([1_700_000_000_123_456_789, 1_700_000_001_000_000_001], pa.timestamp("ns"))
    pq.write_table(pa.table({"TIMESTAMP": times, "ContextTokens": [3.0, None], "GeneratedTokens": [4.0, 5.0]}), path)
    assert good(path) == [(pytest.approx(1_700_000_000.123456, abs=1e-6), 3, 4)]
    assert bad(path) == ["row 2: ContextTokens is ''; it must be an integer between 1 and 2147483647"]


def test_parquet_row_numbers_go_on_across_batches(tmp_path):
    path, rows = tmp_path / "trace.pq", 20_000
    outputs = [1] * (rows - 1) + [0]
    pq.write_table(pa.table({"num_prefill_tokens": list(range(1, rows + 1)), "num_decode_tokens": outputs}), path)
    assert [row[1] for row in good(path)] == list(range(1, rows))
    assert bad(path)[0].startswith("row 20000: ")


def test_sharegpt_estimates_tokens_and_says_so(write):
    entries = [
        conversation(("human", "a" * 9), ("gpt", "é" * 4), ("human", "b"), ("gpt", "c"), ("human", "left alone")),
        conversation(("system", "s"), ("human", "abcd"), ("gpt", "x" * 40)),
    ]
    path = write(json.dumps(entries), "chat.json")
    trace = open_trace(path)
    assert (trace.layout, trace.has_timestamps) == ("sharegpt", False)
    assert [note.startswith("chat.json: tokens are estimated") for note in trace.notes] == [True]
    assert good(path) == [(None, 3, 2), (None, 1, 1), (None, 1, 10)]


def test_sharegpt_bad_entries(write):
    entries = [
        7,
        {"id": "no turns"},
        conversation(("gpt", "hello")),
        conversation(("human", ""), ("gpt", "b"), ("human", "c"), ("gpt", None)),
        conversation(("human", "a"), ("gpt", "b")),
    ]
    path = write(json.dumps(entries), "chat.json")
    assert good(path) == [(None, 1, 1)]
    assert bad(path) == [
        "entry 1: it has no list of conversations",
        "entry 2: it has no list of conversations",
        "entry 3: no human turn is followed by a gpt turn",
        "entry 4, turns 1 and 2: one of the two has no text",
        "entry 4, turns 3 and 4: one of the two has no text",
    ]


@pytest.mark.parametrize("indent", [None, 2])
def test_sharegpt_entries_across_chunks(write, indent):
    lengths = [4 * n for n in (1, 70_000, 5, 16_384, 3, 200_000)] * 2
    entries = [conversation(("human", "x" * n), ("gpt", "\\\"é")) for n in lengths]
    path = write(json.dumps(entries, indent=indent), "chat.json")
    assert [row[1] for row in good(path)] == [n // 4 for n in lengths]


@pytest.mark.parametrize("end", ["", ",", ', {"conversations": [', " ]]"])
def test_a_cut_sharegpt_file_gives_what_it_holds(write, end):
    path = write("[" + json.dumps(conversation(("human", "a"), ("gpt", "b"))) + end, "chat.json")
    assert good(path) == [(None, 1, 1)]
    messages = bad(path)
    assert len(messages) == (end != " ]]")
    assert all(m.startswith("entry 2: ") and m.endswith("nothing from there on is read") for m in messages)


def test_sharegpt_with_a_tokenizer(write, monkeypatch):
    class Words:
        @classmethod
        def from_pretrained(cls, folder, local_files_only):
            assert (folder, local_files_only) == ("tok", True)
            return cls()

        def encode(self, text, add_special_tokens):
            assert not add_special_tokens
            return text.split()

    monkeypatch.setitem(sys.modules, "transformers", SimpleNamespace(AutoTokenizer=Words))
    path = write(json.dumps([conversation(("human", "a b c"), ("gpt", "d e"))]), "chat.json")
    assert open_trace(path, "auto", "tok").notes == ()
    assert good(path, "auto", "tok") == [(None, 3, 2)]


@pytest.mark.parametrize(
    ("text", "name", "args", "message"),
    [
        ("a,b\n1,2\n", "t.csv", (), r"has the columns \['a', 'b'\].*headrace: arrived_at.*azure: .*burstgpt: "),
        ("", "t.csv", (), r"has the columns \[\]"),
        (HEADRACE, "t.csv", ("azure",), r"not those of a known format \(azure: TIMESTAMP, Con[^;]*$"),
        ("{}", "t.json", (), "is not a JSON array"),
        ("no", "t.parquet", (), "t.parquet is not a Parquet file"),
        (HEADRACE, "t.csv", ("auto", "tok"), "tokenizer is 'tok'; .* is no sharegpt trace"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(write, text, name, args, message):
    with pytest.raises(ValueError, match=message):
        open_trace(write(text, name), *args)


def test_a_missing_file_is_an_os_error(tmp_path):
    for name in ("no.csv", "no.json", "no.parquet"):
        with pytest.raises(FileNotFoundError):
            open_trace(Path(tmp_path / name))


def test_a_sample_keeps_every_row_with_the_same_chance():
    def rows():
        return (TraceRow("", float(n), n, n + 1) for n in range(1, 20_001))

    sample = sample_rows(rows(), np.random.default_rng(0), most=4000)
    assert (sample.rows, sample.span_s, sample.prompt_tokens.size) == (20_000, 19_999.0, 4000)
    assert sample.prompt_tokens.dtype == np.int32
    assert np.array_equal(sample.output_tokens, sample.prompt_tokens + 1)
    assert np.unique(sample.prompt_tokens).size == 4000
    counts, _ = np.histogram(sample.prompt_tokens, 5, (0, 20_001))
    assert counts == pytest.approx(np.full(5, 800), rel=0.1)
    whole = sample_rows(islice(rows(), 100), np.random.default_rng(0), most=4000)
    assert np.array_equal(whole.prompt_tokens, np.arange(1, 101))
