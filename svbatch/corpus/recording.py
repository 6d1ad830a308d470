"""A recording: one audio source as listed, or a span of it. Everything that is known before its bytes are read."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MAX_SECONDS = 1e9  # no recording starts later

# What a uri cannot hold as it is: the escape sign, the mark of a span, control characters, bytes that are not UTF-8,
# and `!` where it would look like the mark of a tar's member.
_ESCAPED = re.compile("[%#\x00-\x1f\x7f\udc80-\udcff]|(?<=[.][Tt][Aa][Rr])!(?=/)")


@dataclass(frozen=True)
class Span:
    """From `start_s` to `end_s` (None: to the end) of a source, in its own seconds, in whole microseconds."""

    start_s: float
    end_s: float | None = None

    def __str__(self) -> str:
        """As a uri's fragment has it: `12.5,14` or `12.5`."""
        return ",".join(f"{s:.6f}".rstrip("0").rstrip(".") for s in (self.start_s, self.end_s) if s is not None)


@dataclass(frozen=True)
class LocalFile:
    """A file on this machine, by its absolute path."""

    path: Path


@dataclass(frozen=True)
class RemoteFile:
    """A file at an address such as `s3://bucket/calls/a.wav`, as its store names it."""

    address: str


@dataclass(frozen=True)
class TarMember:
    """Bytes of an uncompressed tar, from `offset`; as many as the recording's size. `archive_bytes` is the tar's."""

    archive: LocalFile | RemoteFile
    offset: int
    archive_bytes: int


@dataclass(frozen=True)
class Refused:
    """Nothing that is read: `code` and `why` are those of its failure."""

    code: str
    why: str


Location = LocalFile | RemoteFile | TarMember | Refused


@dataclass(frozen=True)
class Status:
    """What a store says of a file: size 0, modified at EPOCH, no ETag, where it cannot tell."""

    size_bytes: int = 0
    modified_at: datetime = EPOCH
    etag: str | None = None


@dataclass(frozen=True)
class Recording:
    """One audio source as listed; size 0, modified at EPOCH, where its store cannot tell.

    `uri` tells it from all others: the absolute path or the address as one line of valid Unicode; docs/corpus.md has
    the rules. A span of a source has its own, `#t=START,END` in seconds after that of the source, a member of a tar
    `!/NAME`. `modified_at` and `etag` of a member are its tar's. `reference` is the transcript that a manifest gives,
    `metadata` its other columns, as text.
    """

    uri: str
    location: Location
    size_bytes: int
    modified_at: datetime
    etag: str | None = None
    span: Span | None = None
    reference: str | None = None
    metadata: Mapping[str, str] = field(default_factory=dict)


def modified_at(status: os.stat_result) -> datetime:
    """The time of the last change, UTC, in whole microseconds."""
    return EPOCH + timedelta(microseconds=status.st_mtime_ns // 1000)


def source_uri(source: LocalFile | RemoteFile) -> str:
    """The uri of a whole file. An address with http is one already."""
    if isinstance(source, RemoteFile):
        escaped = escape(source.address)
        return escaped.replace("%25", "%") if is_http(source.address) else escaped
    return escape(os.fsencode(source.path).decode("utf-8", errors="surrogateescape"))


def escape(name: str) -> str:
    """A name as uris hold it: one line of valid Unicode, which `urllib.parse.unquote_to_bytes` turns back."""
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", name)


def is_http(address: str) -> bool:
    """Whether an address is percent-encoded already."""
    return address.startswith(("http://", "https://"))


def source_of_uri(uri: str) -> tuple[str, Span | None]:
    """The path or address, and the span, that a uri was made of. Raises ValueError."""
    if re.search("[.]tar!/", uri, re.IGNORECASE):
        raise ValueError("names a member of a tar; name the tar in the corpus instead")
    source, mark, fragment = uri.partition("#")
    span = None
    if mark:
        found = re.fullmatch(r"t=([0-9]+(?:\.[0-9]+)?)(?:,([0-9]+(?:\.[0-9]+)?))?", fragment)
        if found is None:
            raise ValueError(
                f"after `#` wants t=START,END in seconds, found {fragment[:60]!r}; write a `#` of a name as %23"
            )
        span = Span(float(found[1]), None if found[2] is None else float(found[2]))
    return source if is_http(source) else os.fsdecode(unquote_to_bytes(source)), span


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
