"""Manifests as tests write and list them."""

import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from svbatch.corpus.recording import Recording
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError

Row = dict[str, Any]


def json_lines(path: Path, rows: list[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def csv_file(path: Path, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def parquet(path: Path, rows: list[Row]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    pq.write_table(pa.table({name: [row.get(name) for row in rows] for name in names}), path)


FORMATS: dict[str, Callable[[Path, list[Row]], None]] = {"a.jsonl": json_lines, "a.csv": csv_file, "a.parquet": parquet}
formats = pytest.mark.parametrize("name", FORMATS)


def listed(path: Path, **options: Any) -> list[Recording]:
    return list(iter_recordings([path.name], path.parent, **options))


def rows_of(folder: Path, name: str, *rows: Row) -> list[Recording]:
    FORMATS[name](folder / name, list(rows))
    return listed(folder / name)


def wrong(path: Path, content: str | bytes | None = None) -> list[str]:
    """The lines of the error of a manifest, without its name in front."""
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CorpusError) as error:
        listed(path)
    return [line.removeprefix(f"{path}, ") for line in str(error.value).splitlines()]


RECORDING = {
    "id": "call",
    "sources": [{"type": "file", "channels": [0], "source": "a.wav"}],
    "sampling_rate": 16000,
    "num_samples": 160000,
    "duration": 10.0,
}
CUT = {
    "id": "call-1",
    "start": 2.0,
    "duration": 3.5,
    "channel": 0,
    "supervisions": [
        {"id": "2", "start": 1.5, "duration": 1, "text": "you", "speaker": "Ann", "language": "English"},
        {"id": "1", "start": 0.0, "duration": 1, "text": "hello", "speaker": "Bob", "language": "English"},
    ],
    "recording": RECORDING,
    "custom": {"snr": 12.5},
    "type": "MonoCut",
}
