"""What a corpus holds: every recording decoded once, without a model; a table, and what a person reads of it."""

import json
import os
import sys
import time
from array import array
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from tqdm import tqdm

from svbatch.corpus.decode import Audio
from svbatch.corpus.recording import Recording
from svbatch.corpus.segment import frame_levels, loud_frames
from svbatch.corpus.sources import iter_recordings
from svbatch.corpus.workers import Decoded, decoding, num_processors
from svbatch.errors import OutputError
from svbatch.tables.schemas import arrow_schema, table_of

ROWS_PER_GROUP = 4096
SECONDS_PER_LINE = 30.0
MAX_EXAMPLES = 5


@dataclass
class Scan:
    """Counts over a corpus. `failures` are the messages of the first that could not be decoded."""

    output: Path
    readable: int = 0
    duplicates: int = 0
    audio_seconds: float = 0.0
    silent_seconds: float = 0.0
    durations: "array[float]" = field(default_factory=lambda: array("d"))
    formats: Counter[str] = field(default_factory=Counter)
    sample_rates: Counter[int] = field(default_factory=Counter)
    channels: Counter[int] = field(default_factory=Counter)
    codes: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)

    @property
    def unreadable(self) -> int:
        return self.codes.total()


def scan(corpus: Sequence[str], base: Path, output: Path, *, quiet: bool) -> Scan:
    """Decodes every recording of `corpus` and writes the table to `output`, which it replaces when it is complete.

    Raises CorpusError and OutputError. Memory does not grow with the corpus, but for its names and a digest of each.
    """
    found = Scan(output)
    first_uris: dict[bytes, str] = {}
    with _writing(output) as writer, Progress(quiet=quiet) as progress:
        rows = []
        for recording, decoded in _iter_decoded(corpus, base):
            rows.append(_row(recording, decoded, first_uris))
            _count(found, rows[-1])
            progress.advance(found)
            if len(rows) == ROWS_PER_GROUP:
                writer.write_table(table_of("scan", rows))
                rows = []
        writer.write_table(table_of("scan", rows))
    return found


def _iter_decoded(corpus: Sequence[str], base: Path) -> Iterator[tuple[Recording, Decoded]]:
    listed: list[Recording] = []  # and not yet decoded

    def listing() -> Iterator[Recording]:
        for recording in iter_recordings(corpus, base):
            listed.append(recording)
            yield recording

    with decoding(listing(), "mix", num_workers=num_processors()) as decoded:
        for each in decoded:
            yield listed.pop(0), each


def _row(recording: Recording, decoded: Decoded, first_uris: dict[bytes, str]) -> dict[str, Any]:
    row: dict[str, Any] = dict.fromkeys(arrow_schema("scan").names)
    row |= {"uri": recording.uri, "size_bytes": recording.size_bytes, "modified_at": recording.modified_at}
    if not isinstance(decoded, Audio):
        return row | {"code": decoded.code, "message": str(decoded)}
    first = first_uris.setdefault(bytes.fromhex(decoded.recording_id), recording.uri)
    return row | {
        "recording_id": decoded.recording_id,
        "container": decoded.container,
        "codec": decoded.codec,
        "duration": decoded.duration_s,
        "sample_rate": decoded.sample_rate_hz,
        "channels": decoded.channels,
        "silence": _silence(decoded),
        "duplicate_of": None if first == recording.uri else first,
    }


def _silence(audio: Audio) -> float | None:
    """The share of its frames that do not pass the energy gate; None without any."""
    if not audio.num_samples:
        return None
    return 1.0 - float(loud_frames(frame_levels(audio.waveform)).mean())


def _count(found: Scan, row: dict[str, Any]) -> None:
    if row["code"]:
        found.codes[row["code"]] += 1
        if len(found.failures) < MAX_EXAMPLES:
            found.failures.append(row["message"])
        return
    found.readable += 1
    found.duplicates += row["duplicate_of"] is not None
    found.audio_seconds += row["duration"]
    found.silent_seconds += row["duration"] * (row["silence"] or 0.0)
    found.durations.append(row["duration"])
    found.formats[f"{row['container']} {row['codec']}"] += 1
    found.sample_rates[row["sample_rate"]] += 1
    found.channels[row["channels"]] += 1


@contextmanager
def _writing(output: Path) -> Iterator[pq.ParquetWriter]:
    """A writer whose file takes its name when it is complete."""
    partial = output.with_name(f".{output.name}.{os.getpid()}")
    try:
        with pq.ParquetWriter(partial, arrow_schema("scan"), compression="zstd") as writer:
            yield writer
        os.replace(partial, output)
    except OSError as error:
        raise OutputError(
            f"{output}: the table cannot be written there ({error.strerror or error}); give --output another path"
        ) from error
    finally:
        with suppress(OSError):
            partial.unlink()


class Progress:
    """A bar on a terminal, a JSON line now and then elsewhere, nothing if quiet."""

    def __init__(self, *, quiet: bool) -> None:
        self._bar = tqdm(unit="recording", desc="scan", disable=True if quiet else None)
        self._lines = self._bar.disable and not quiet
        self._said_at = time.monotonic()

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def advance(self, found: Scan) -> None:
        """After each recording."""
        self._bar.update()
        if self._lines and time.monotonic() - self._said_at > SECONDS_PER_LINE:
            self._said_at = time.monotonic()
            said = {"recordings": found.readable + found.unreadable, "unreadable": found.unreadable}
            tqdm.write(json.dumps(said | {"audio_seconds": round(found.audio_seconds, 1)}), file=sys.stderr)


def summary(found: Scan) -> str:
    """Several lines of text, without a trailing line break."""
    total = found.readable + found.unreadable
    lines = [f"{total} recordings: {found.readable} readable, {found.unreadable} not"]
    if found.readable:
        share = found.silent_seconds / found.audio_seconds if found.audio_seconds else 0.0
        ordered = sorted(found.durations)
        middle = ordered[len(ordered) // 2]
        lines += [
            f"audio         {found.audio_seconds / 3600:.2f} hours, {share:.0%} of it silence",
            f"durations     {ordered[0]:.1f} s to {ordered[-1]:.1f} s, half of them up to {middle:.1f} s",
            f"formats       {_counted(found.formats)}",
            f"sample rates  {_counted(found.sample_rates, ' Hz')}",
            f"channels      {_counted(found.channels)}",
            f"duplicates    {found.duplicates} hold the bytes of another",
        ]
    if found.unreadable:
        lines += [f"unreadable    {_counted(found.codes)}", *(f"  {message}" for message in found.failures)]
        lines += ["  …"] if found.unreadable > len(found.failures) else []
    return "\n".join([*lines, "", f"table: {found.output}"])


def _counted(counter: Counter[Any], unit: str = "") -> str:
    """`8000 Hz in 3, 16000 Hz in 1`, the eight most frequent first."""
    return ", ".join(f"{value}{unit} in {number}" for value, number in counter.most_common(8))
