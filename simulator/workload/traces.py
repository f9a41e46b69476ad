"""Request traces on disk, read row by row: CSV and Parquet in three column layouts, ShareGPT's and Mooncake's JSON."""

import csv
import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import count, islice
from pathlib import Path
from typing import Any, Literal, NamedTuple, TextIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from scheduler.model.workload import Lengths, token_count
from simulator.workload.prompts import Piece, Pieces

TraceFormat = Literal["auto", "headrace", "azure", "burstgpt", "sharegpt", "mooncake", "parquet"]

_BATCH_ROWS = 8192
_CHUNK_CHARACTERS = 1 << 16
_LONGEST_ENTRY_CHARACTERS = 1 << 26
_LONGEST_MESSAGE = 200
MOONCAKE_BLOCK_TOKENS = 512
_PIECES = 2**63
"""A piece's number is a token's id, of 64 bits with a sign; longer hashes are reduced to that."""
_LATEST_MS = 1e300
_BETWEEN_ENTRIES = re.compile(r"[\s,]*")


class TraceRow(NamedTuple):
    """One request: where it stands in the file, when it came (from any origin; None: not known), its lengths, and what
    its prompt is made of (None: the file does not say)."""

    where: str
    timestamp_s: float | None
    prompt_tokens: int
    output_tokens: int
    pieces: Pieces | None = None


class BadRow(NamedTuple):
    """Where a row stands, and why it is not a request."""

    message: str


class _Columns(NamedTuple):
    """A layout of tables: the names of its columns, and how a time is written."""

    timestamp: str
    prompt: str
    output: str
    seconds: Callable[[str], float]


def _iso_seconds(text: str) -> float:
    """Seconds since 1970 of an ISO date and time, UTC unless it names a zone; digits beyond microseconds are cut."""
    moment = datetime.fromisoformat(text)
    return (moment if moment.tzinfo else moment.replace(tzinfo=UTC)).timestamp()


_LAYOUTS = {
    "headrace": _Columns("arrived_at", "num_prefill_tokens", "num_decode_tokens", float),
    "azure": _Columns("TIMESTAMP", "ContextTokens", "GeneratedTokens", _iso_seconds),
    "burstgpt": _Columns("Timestamp", "Request tokens", "Response tokens", float),
}


@dataclass(frozen=True)
class Trace:
    """A trace file of known format; `open_trace` makes it.

    `notes` are remarks for a reader of its numbers. `rows()` reads the file from its beginning: each row is a
    request or a `BadRow` with the reason, in order, in memory that does not grow with the file.
    """

    path: Path
    layout: str
    has_timestamps: bool
    notes: tuple[str, ...]
    rows: Callable[[], Iterator[TraceRow | BadRow]]


def open_trace(path: str | Path, trace_format: TraceFormat = "auto", tokenizer: str | Path | None = None) -> Trace:
    """Open a trace file and detect its format.

    headrace   CSV with num_prefill_tokens, num_decode_tokens and, if requests have times, arrived_at in seconds
    azure      CSV with TIMESTAMP (ISO date and time), ContextTokens, GeneratedTokens
    burstgpt   CSV with Timestamp in seconds, Request tokens, Response tokens; 0 response tokens is a failed request
    sharegpt   JSON array of {"conversations": [{"from": "human" or "gpt", "value": text}, …]}; every gpt turn right
               after a human turn is a request of their two lengths
    mooncake   JSON lines with timestamp in milliseconds, input_length, output_length and hash_ids: a number for each
               512 tokens of the prompt (the last may be fewer), equal where requests share a prefix
    parquet    Parquet with one of the three column layouts
    auto       by the file's suffix (.parquet, .pq, .json, .jsonl) or else by the CSV's first line

    Other columns are ignored, and Parquet may be named by its layout if its suffix says it is Parquet. `tokenizer` is
    a folder that transformers can read, for sharegpt only; without one a token is taken to be 4 bytes of UTF-8.

    Raises ValueError when the columns are of no known layout or a Parquet file is invalid, OSError when the file cannot
    be read.
    """
    path = Path(path)
    if trace_format == "sharegpt" or (trace_format == "auto" and path.suffix == ".json"):
        return _open_sharegpt(path, tokenizer)
    if tokenizer is not None:
        raise ValueError(f"tokenizer is {str(tokenizer)!r}; {path} is no sharegpt trace, it counts tokens")
    if trace_format == "mooncake" or (trace_format == "auto" and path.suffix == ".jsonl"):
        return _open_mooncake(path)
    is_parquet = trace_format == "parquet" or path.suffix in (".parquet", ".pq")
    columns = _parquet_columns(path) if is_parquet else _csv_columns(path)
    layout = _layout(path, columns, trace_format)
    read = _parquet_rows if is_parquet else _csv_rows
    return Trace(path, layout, _LAYOUTS[layout].timestamp in columns, (), lambda: read(path, layout))


def _layout(path: Path, columns: Sequence[str], trace_format: TraceFormat) -> str:
    candidates = [trace_format] if trace_format in _LAYOUTS else list(_LAYOUTS)
    for name in candidates:
        if {_LAYOUTS[name].prompt, _LAYOUTS[name].output} <= set(columns):
            return name
    known = "; ".join(f"{name}: {', '.join(_LAYOUTS[name][:3])}" for name in candidates)
    raise ValueError(f"{path} has the columns {list(columns)}, which are not those of a known format ({known})")


def _wanted(layout: str, columns: Sequence[str]) -> list[str]:
    """Timestamp (if there is one), prompt and output."""
    return [name for name in _LAYOUTS[layout][:3] if name in columns]


def _row(layout: str, where: str, cells: Sequence[str]) -> TraceRow | BadRow:
    """A row from its wanted cells."""
    columns = _LAYOUTS[layout]
    *timestamp, prompt, output = cells
    try:
        if layout == "burstgpt" and output == "0":
            raise ValueError(f"{columns.output} is 0, a failed request")
        prompt_tokens, output_tokens = token_count(columns.prompt, prompt), token_count(columns.output, output)
        timestamp_s = _timestamp_s(columns, timestamp[0]) if timestamp else None
        return TraceRow(where, timestamp_s, prompt_tokens, output_tokens)
    except ValueError as error:
        return _bad_row(where, str(error))


def _timestamp_s(columns: _Columns, text: str) -> float:
    try:
        timestamp_s = columns.seconds(text)
    except (ValueError, OverflowError):
        timestamp_s = math.nan
    if not math.isfinite(timestamp_s):
        kind = "an ISO date and time" if columns.seconds is _iso_seconds else "a number of seconds"
        raise ValueError(f"{columns.timestamp} is {text!r}; it must be {kind}")
    return timestamp_s


def _bad_row(where: str, why: str) -> BadRow:
    return BadRow(f"{where}: {why if len(why) <= _LONGEST_MESSAGE else why[:_LONGEST_MESSAGE] + '…'}")


def _open_text(path: Path) -> TextIO:
    return open(path, newline="", encoding="utf-8-sig", errors="replace")


def _csv_columns(path: Path) -> list[str]:
    with _open_text(path) as file:
        try:
            return next(csv.reader(file), [])
        except csv.Error as error:
            raise ValueError(f"{path}, line 1: {error}") from error


def _csv_rows(path: Path, layout: str) -> Iterator[TraceRow | BadRow]:
    with _open_text(path) as file:
        reader = csv.reader(file)
        columns = next(reader)
        wanted = [columns.index(name) for name in _wanted(layout, columns)]
        while True:
            first_line = reader.line_num + 1
            try:
                cells = next(reader)
                problem = f"it has {len(cells)} columns instead of {len(columns)}" if len(cells) != len(columns) else ""
            except StopIteration:
                return
            except csv.Error as error:
                cells, problem = [""], str(error)
            # An unclosed quote can swallow lines; naming them all says how many.
            where = f"line {first_line}" + (f" to {reader.line_num}" if reader.line_num > first_line else "")
            if problem and cells:
                yield _bad_row(where, problem)
            elif cells:
                yield _row(layout, where, [cells[index] for index in wanted])


def _parquet_columns(path: Path) -> list[str]:
    try:
        return list(pq.read_schema(path).names)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{path} is not a Parquet file: {error}") from error


def _parquet_rows(path: Path, layout: str) -> Iterator[TraceRow | BadRow]:
    with pq.ParquetFile(path) as file:
        wanted = _wanted(layout, file.schema_arrow.names)
        numbers = count(1)
        for batch in file.iter_batches(_BATCH_ROWS, columns=wanted):
            columns = [_cells(batch.column(name)) for name in wanted]
            for cells, number in zip(zip(*columns, strict=True), numbers, strict=False):
                yield _row(layout, f"row {number}", cells)


def _cells(column: Any) -> list[str]:
    """The values of an Arrow array as a CSV file would write them."""
    if pa.types.is_timestamp(column.type):
        # Python's datetime has no nanoseconds.
        column = column.cast(pa.timestamp("us", column.type.tz), safe=False)
    values = column.to_pylist()
    if pa.types.is_floating(column.type):
        values = [int(value) if value is not None and value.is_integer() else value for value in values]
    return ["" if value is None else str(value) for value in values]


def _open_mooncake(path: Path) -> Trace:
    with _open_text(path) as file:
        first = file.readline()
    row = _mooncake_row("line 1", first)
    if isinstance(row, BadRow) and not first.lstrip().startswith("{"):
        raise ValueError(f"{path} is not a mooncake trace, which has a JSON object on every line: {row.message}")
    return Trace(path, "mooncake", True, (), lambda: _mooncake_rows(path))


def _mooncake_rows(path: Path) -> Iterator[TraceRow | BadRow]:
    with _open_text(path) as file:
        for number, line in enumerate(file, 1):
            if line.strip():
                yield _mooncake_row(f"line {number}", line)


def _mooncake_row(where: str, line: str) -> TraceRow | BadRow:
    try:
        entry = json.loads(line)
        if not isinstance(entry, dict):
            raise ValueError("it is no JSON object")
        prompt_tokens = token_count("input_length", str(entry.get("input_length")))
        output_tokens = token_count("output_length", str(entry.get("output_length")))
        timestamp = entry.get("timestamp")
        if isinstance(timestamp, bool) or not isinstance(timestamp, int | float) or not abs(timestamp) < _LATEST_MS:
            raise ValueError(f"timestamp is {timestamp!r}; it must be a number of milliseconds")
        pieces = _mooncake_pieces(entry.get("hash_ids"), prompt_tokens)
    except (ValueError, RecursionError) as error:  # JSONDecodeError is one
        return _bad_row(where, str(error))
    return TraceRow(where, timestamp / 1000, prompt_tokens, output_tokens, pieces)


def _mooncake_pieces(hash_ids: object, prompt_tokens: int) -> Pieces:
    blocks, last_tokens = divmod(prompt_tokens - 1, MOONCAKE_BLOCK_TOKENS)
    whole = isinstance(hash_ids, list) and all(type(number) is int and number >= 0 for number in hash_ids)
    if not isinstance(hash_ids, list) or not whole or len(hash_ids) != blocks + 1:
        raise ValueError(
            f"hash_ids must be {blocks + 1} integers >= 0 for input_length {prompt_tokens}, one for each "
            f"{MOONCAKE_BLOCK_TOKENS} tokens"
        )
    sizes = [MOONCAKE_BLOCK_TOKENS] * blocks + [last_tokens + 1]
    return tuple(Piece(number % _PIECES, size) for number, size in zip(hash_ids, sizes, strict=True))


def _open_sharegpt(path: Path, tokenizer: str | Path | None) -> Trace:
    with _open_text(path) as file:
        if not file.read(_CHUNK_CHARACTERS).lstrip().startswith("["):
            raise ValueError(f"{path} is not a JSON array; a sharegpt trace is an array of conversations")
    if tokenizer is None:
        note = f"{path.name}: tokens are estimated as bytes of UTF-8 divided by 4; with a tokenizer they are counted"
        return Trace(path, "sharegpt", False, (note,), lambda: _sharegpt_rows(path, _estimated_tokens))
    from transformers import AutoTokenizer  # takes seconds, and few traces need it

    encode = AutoTokenizer.from_pretrained(str(tokenizer), local_files_only=True).encode

    def counted_tokens(text: str) -> int:
        return len(encode(text, add_special_tokens=False))

    return Trace(path, "sharegpt", False, (), lambda: _sharegpt_rows(path, counted_tokens))


def _estimated_tokens(text: str) -> int:
    return math.ceil(len(text.encode("utf-8", errors="replace")) / 4)


def _sharegpt_rows(path: Path, tokens: Callable[[str], int]) -> Iterator[TraceRow | BadRow]:
    number = 0
    with _open_text(path) as file:
        try:
            for number, entry in enumerate(_array_entries(file), 1):
                yield from _conversation_rows(f"entry {number}", entry, tokens)
        except (json.JSONDecodeError, RecursionError) as error:
            yield _bad_row(f"entry {number + 1}", f"{getattr(error, 'msg', error)}; nothing from there on is read")


def _array_entries(file: TextIO) -> Iterator[object]:
    """The entries of a JSON array, reading on only as far as the next one needs."""
    decoder = json.JSONDecoder()
    buffer = file.read(_CHUNK_CHARACTERS).lstrip()
    at = 1
    while True:
        at = _BETWEEN_ENTRIES.match(buffer, at).end()  # type: ignore[union-attr]
        if buffer.startswith("]", at):
            return
        try:
            entry, at = decoder.raw_decode(buffer, at)
        except json.JSONDecodeError:
            left = len(buffer) - at
            # As much again, so that a long entry is not parsed from its start once per chunk.
            more = file.read(max(left, _CHUNK_CHARACTERS)) if left < _LONGEST_ENTRY_CHARACTERS else ""
            if not more:
                raise
            buffer, at = buffer[at:] + more, 0
        else:
            yield entry


def _conversation_rows(where: str, entry: object, tokens: Callable[[str], int]) -> Iterator[TraceRow | BadRow]:
    turns = entry.get("conversations") if isinstance(entry, dict) else None
    if not isinstance(turns, list):
        yield _bad_row(where, "it has no list of conversations")
        return
    speakers = [turn.get("from") if isinstance(turn, dict) else None for turn in turns]
    answers = [index for index in range(1, len(turns)) if speakers[index - 1 : index + 1] == ["human", "gpt"]]
    if not answers:
        yield _bad_row(where, "no human turn is followed by a gpt turn")
    for index in answers:
        place = f"{where}, turns {index} and {index + 1}"
        texts = [turn.get("value") for turn in turns[index - 1 : index + 1]]
        prompt_tokens, output_tokens = (tokens(text) if isinstance(text, str) else 0 for text in texts)
        if prompt_tokens and output_tokens:
            yield TraceRow(place, None, prompt_tokens, output_tokens)
        else:
            yield _bad_row(place, "one of the two has no text")


@dataclass(frozen=True)
class TraceSample:
    """At most a million of a trace's rows, as two int32 arrays of one size; `rows` and `span_s` are of all its rows.

    `pieces` are what their prompts are made of, one entry a row; empty where the trace does not say.
    """

    prompt_tokens: NDArray[np.int32]
    output_tokens: NDArray[np.int32]
    rows: int
    span_s: float
    pieces: Sequence[Pieces] = ()

    def lengths(self) -> Lengths:
        """The joint distribution of the sampled lengths."""
        tokens = self.prompt_tokens.astype(np.int64), self.output_tokens.astype(np.int64)
        return Lengths(*tokens, np.ones(self.prompt_tokens.size))


def sample_rows(rows: Iterator[TraceRow], rng: np.random.Generator, most: int = 1_000_000) -> TraceSample:
    """Keep `most` rows, every one with the same chance (reservoir sampling); all of them if there are fewer."""
    prompt_tokens, output_tokens = np.empty((2, most), np.int32)
    pieces: list[Pieces] = []
    seen, first_s, last_s = 0, None, None
    while block := list(islice(rows, _BATCH_ROWS)):
        position = np.arange(seen, seen + len(block))
        place = np.where(position < most, position, rng.integers(0, position + 1))
        kept = place < most
        prompt_tokens[place[kept]] = np.array([row.prompt_tokens for row in block])[kept]
        output_tokens[place[kept]] = np.array([row.output_tokens for row in block])[kept]
        if block[0].pieces is not None:
            pieces += [()] * (min(seen + len(block), most) - len(pieces))
            for index in np.flatnonzero(kept).tolist():
                pieces[place[index]] = block[index].pieces or ()
        first_s, last_s = block[0].timestamp_s if not seen else first_s, block[-1].timestamp_s
        seen += len(block)
    span_s = last_s - first_s if first_s is not None and last_s is not None else 0.0
    return TraceSample(prompt_tokens[:seen], output_tokens[:seen], seen, span_s, pieces)
