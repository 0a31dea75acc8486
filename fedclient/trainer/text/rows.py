"""Rows of a data file: jsonl, csv, parquet or txt, one dict at a time."""

from __future__ import annotations

import csv
import importlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

Row = Mapping[str, Any]
"""Values by column."""

_LONGEST_FIELD = 1 << 27
_BATCH = 1024


class DataError(ValueError):
    """The site's data cannot be used; the text names the file and the row, and quotes no value."""


def read_rows(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    """The rows of a file, by its ending: .jsonl (or .ndjson), .csv (or .tsv), .parquet, .txt.

    A .txt file is one row with the whole text in the first of the columns.

    Args:
        path: the file.
        columns: those that are wanted; others may be left out.

    Raises:
        DataError: it is not there, of another kind, damaged, or a row lacks a column.
    """
    ending = path.suffix.lower()
    if ending not in _READERS:
        raise DataError(f"{path}: its name ends in none of {', '.join(_READERS)}")
    if ending == ".txt" and len(columns) > 1:
        raise DataError(f"{path}: a text file has no columns; {', '.join(columns)} need jsonl, csv or parquet")
    try:
        for number, row in enumerate(_READERS[ending](path, columns), 1):
            for name in columns:
                if row.get(name) is None:
                    raise DataError(f"{path}, row {number}: it has no {name!r}; it has {_names(row)}")
            yield row
    except UnicodeDecodeError:
        raise DataError(f"{path} is not UTF-8") from None
    except OSError as e:
        raise DataError(f"{path}: {e.strerror or 'cannot be read'}") from None


def _names(row: Row) -> str:
    return ", ".join(sorted(name for name, value in row.items() if name and value is not None)[:20]) or "nothing"


def _jsonl(path: Path, _: Sequence[str]) -> Iterator[Row]:
    with path.open(encoding="utf-8-sig") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            if not isinstance(row, dict):
                raise DataError(f"{path}, line {number} is not a JSON object")
            yield row


def _csv(path: Path, _: Sequence[str]) -> Iterator[Row]:
    csv.field_size_limit(_LONGEST_FIELD)
    with path.open(encoding="utf-8-sig", newline="") as f:
        reader = csv.DictReader(f, delimiter="\t" if path.suffix.lower() == ".tsv" else ",")
        try:
            yield from reader
        except csv.Error as e:
            raise DataError(f"{path}, line {reader.line_num}: {e}") from None


def _parquet(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise DataError(f"{path}: parquet needs pyarrow; install it with: pip install 'fedlink[text]'") from None
    try:
        with parquet.ParquetFile(path) as file:
            wanted = [name for name in columns if name in file.schema_arrow.names]
            for batch in file.iter_batches(batch_size=_BATCH, columns=wanted):
                yield from batch.to_pylist()
    except ValueError as e:  # pyarrow's errors about a file's content derive from it
        if isinstance(e, DataError):
            raise
        raise DataError(f"{path} is not a parquet file, or damaged") from None


def _text(path: Path, columns: Sequence[str]) -> Iterator[Row]:
    yield {columns[0]: path.read_text(encoding="utf-8-sig")}


_READERS: Mapping[str, Callable[[Path, Sequence[str]], Iterator[Row]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".csv": _csv,
    ".tsv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
