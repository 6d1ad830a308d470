"""CSV and Parquet: a header or schema names the columns."""

import csv
import io
import json
from collections.abc import Iterator
from typing import Any, BinaryIO

from svbatch.corpus.manifests.row import NAMES, STARTS, Numbered, WrongLine, row_of_columns

ROWS_AT_ONCE = 1024
_AS_THEY_ARE = {*NAMES, *STARTS, "end", "duration"}


def iter_csv(stream: BinaryIO) -> Iterator[Numbered]:
    """Every row below the header, by the line on which it ends. A row whose quotes are wrong ends the reading."""
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.reader(text, strict=True)
    try:
        header = next(rows, [])
        if wrong := _wrong_header(header):
            yield max(rows.line_num, 1), WrongLine(wrong)
            return
        for row in rows:
            if not row:
                continue
            if len(row) != len(header):
                yield rows.line_num, WrongLine(f"has {len(row)} values for {len(header)} columns")
                continue
            try:
                yield rows.line_num, row_of_columns(dict(zip(header, row, strict=True)))
            except WrongLine as wrong_row:
                yield rows.line_num, wrong_row
    except csv.Error as error:
        yield rows.line_num, WrongLine(f"is not CSV ({error})")
    finally:
        text.detach()


def iter_parquet(stream: BinaryIO) -> Iterator[Numbered]:
    """Every row, by its number. A file that is not Parquet is one wrong line."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = 0
    try:
        with pq.ParquetFile(stream, pre_buffer=False) as file:
            if wrong := _wrong_header(file.schema_arrow.names):
                yield 1, WrongLine(wrong)
                return
            for batch in file.iter_batches(ROWS_AT_ONCE, use_threads=False):
                columns = {name: _values(name, batch.column(name)) for name in batch.schema.names}
                for values in zip(*columns.values(), strict=True):
                    number += 1
                    try:
                        yield number, row_of_columns(dict(zip(columns, values, strict=True)))
                    except WrongLine as wrong_row:
                        yield number, wrong_row
    except (pa.ArrowException, OSError, ValueError) as error:
        yield number + 1, WrongLine(f"cannot be read as Parquet ({' '.join(str(error).split())[:200]})")


def _values(name: str, column: Any) -> list[Any]:
    """A column's values; those of metadata as text where Arrow can write it, so that a time reads as a time."""
    import pyarrow as pa

    if isinstance(column, pa.DictionaryArray):
        column = column.dictionary_decode()
    kind = column.type
    is_bytes = pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_fixed_size_binary(kind)
    if name not in _AS_THEY_ARE and not is_bytes:
        try:
            return list(column.cast(pa.string()).to_pylist())
        except (pa.ArrowNotImplementedError, pa.ArrowInvalid):
            pass
    return list(column.to_pylist())


def _wrong_header(names: list[str]) -> str | None:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        return f"names column {json.dumps(twice[0])} twice"
    if not any(name in NAMES for name in names):
        shown = ", ".join(json.dumps(name[:60]) for name in names[:20]) or "nothing"
        return f"has no column with the recordings, one of {', '.join(NAMES)}; found {shown}"
    return None
