"""The bytes of a recording, or the reason why they cannot be had."""

import os
import stat

from svbatch.corpus.addresses import read_bytes, reason_of, status_of
from svbatch.corpus.recording import (
    EPOCH,
    LocalFile,
    Recording,
    Refused,
    RemoteFile,
    Status,
    TarMember,
    is_http,
    modified_at,
)
from svbatch.errors import RecordingError, SvbatchError

MAX_BYTES = 2 * 2**30  # of one recording


def content_of(recording: Recording) -> bytes:
    """The bytes of a recording's source, as they were listed, at most MAX_BYTES. Raises RecordingError, stage "decode":
    "unreadable", "changed", "empty", "too_large", or what a refused recording says."""
    location = recording.location
    if isinstance(location, Refused):
        raise _failure(recording, location.code, location.why)
    if recording.size_bytes > MAX_BYTES:
        raise _too_large(recording)
    if isinstance(location, TarMember):
        source, start, whole_bytes = location.archive, location.offset, location.archive_bytes
    else:
        source, start, whole_bytes = location, 0, recording.size_bytes
    if isinstance(source, LocalFile):
        content, status = _read_local(recording, source, start)
    else:
        content, status = _read_remote(recording, source, start)
    can_tell = isinstance(source, LocalFile) or recording.etag is not None or recording.modified_at != EPOCH
    is_same = not can_tell or _is_as_listed(recording, whole_bytes, status)
    if not is_same or (_is_size_known(recording) and len(content) != recording.size_bytes):
        raise _failure(recording, "changed", "has changed since it was listed; run again when it is complete")
    if len(content) > MAX_BYTES:
        raise _too_large(recording)
    if not content:
        raise _failure(recording, "empty", "is an empty file; copy it again, or remove it")
    return content


def _read_local(recording: Recording, file: LocalFile, start: int) -> tuple[bytes, Status]:
    """Only a regular file is opened: opening a FIFO would wait for a writer."""
    try:
        mode = file.path.stat().st_mode
        if stat.S_ISDIR(mode):
            what = "is a folder named like a recording, or cannot be listed; rename it, or make it readable"
            raise _failure(recording, "unreadable", what)
        if not stat.S_ISREG(mode):
            raise _failure(recording, "unreadable", "is a FIFO, socket or device, not a file; remove it")
        with file.path.open("rb") as stream:
            stream.seek(start)
            content = stream.read(_num_wanted(recording))
            status = os.fstat(stream.fileno())
    except OSError as error:
        what = f"cannot be read ({error.strerror}); make it readable, or remove it"
        raise _failure(recording, "unreadable", what) from error
    return content, Status(status.st_size, modified_at(status))


def _read_remote(recording: Recording, file: RemoteFile, start: int) -> tuple[bytes, Status]:
    """A store answers in versions of a whole file: if the version after reading is the listed one, it was read."""
    what = "cannot be read ({}); make it readable, or remove it"
    try:  # a store refuses to give a part of nothing
        is_empty = _is_size_known(recording) and not recording.size_bytes
        content = b"" if is_empty else read_bytes(file, start, _num_wanted(recording))
        status = status_of(file)
    except SvbatchError as error:
        raise _failure(recording, "unreadable", what.format(reason_of(error))) from error
    except FileNotFoundError as error:
        raise _failure(recording, "unreadable", what.format("nothing is there")) from error
    except Exception as error:  # fsspec's packages share no class for it
        raise _failure(recording, "unreadable", what.format(reason_of(error))) from error
    if status is None:
        raise _failure(recording, "changed", "was removed while it was read")
    return content, status


def _is_size_known(recording: Recording) -> bool:
    """Whether the size is what its store said, and not 0 for want of an answer: http may not tell."""
    location = recording.location
    if recording.size_bytes or not isinstance(location, RemoteFile):
        return True
    return recording.modified_at != EPOCH and not is_http(location.address)


def _num_wanted(recording: Recording) -> int:
    """One byte more than listed, to see that a file has grown; of a tar, just the member."""
    if isinstance(recording.location, TarMember):
        return recording.size_bytes
    return recording.size_bytes + 1 if _is_size_known(recording) else MAX_BYTES + 1


def _is_as_listed(recording: Recording, size_bytes: int, status: Status) -> bool:
    """Whether a source is what was listed, by ETag, or where there is none by size and time."""
    if recording.etag is not None and status.etag is not None:
        return recording.etag == status.etag
    return (size_bytes, recording.modified_at) == (status.size_bytes, status.modified_at)


def _too_large(recording: Recording) -> RecordingError:
    return _failure(recording, "too_large", f"has more than {MAX_BYTES // 2**30} GiB; split it, or convert it to FLAC")


def _failure(recording: Recording, code: str, what: str) -> RecordingError:
    return RecordingError("decode", code, f"{recording.uri} {what}")
