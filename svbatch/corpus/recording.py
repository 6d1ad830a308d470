"""A recording: one audio source as listed, or a span of it. Everything that is known before its bytes are read."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True)
class Span:
    """From `start_s` to `end_s` (None: to the end) of a source, in its own seconds."""

    start_s: float
    end_s: float | None = None


@dataclass(frozen=True)
class Recording:
    """One audio source as listed; size 0, modified at EPOCH, where its store cannot tell.

    `uri` tells it from all others: the absolute path as one line of valid Unicode (`urllib.parse.unquote_to_bytes`
    undoes it). A span of a source has its own, `#t=START,END` in seconds after that of the source. `etag` is what an
    object store says of the bytes. `reference` is the transcript that a manifest gives, `metadata` its other columns,
    as text.
    """

    uri: str
    path: Path
    size_bytes: int
    modified_at: datetime
    etag: str | None = None
    span: Span | None = None
    reference: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def modified_at(status: os.stat_result) -> datetime:
    """The time of the last change, UTC, in whole microseconds."""
    return EPOCH + timedelta(microseconds=status.st_mtime_ns // 1000)


def listed_columns(recording: Recording) -> dict[str, Any]:
    """What a row of `recordings` says that is known before the bytes are read."""
    span = recording.span
    return {
        "uri": recording.uri,
        "size_bytes": recording.size_bytes,
        "modified_at": recording.modified_at,
        "etag": recording.etag,
        "span_start": span.start_s if span else None,
        "span_end": span.end_s if span else None,
        "reference": recording.reference,
        "metadata": [{"name": name, "value": value} for name, value in recording.metadata.items()],
    }
