"""The bytes of a recording, or the reason why they cannot be had."""

import stat

from svbatch.corpus.recording import Recording, modified_at
from svbatch.errors import RecordingError


def content_of(recording: Recording) -> bytes:
    """The bytes of a recording's source, as they were listed. Only a regular file is opened: opening a FIFO would wait
    for a writer. Raises RecordingError, stage "decode"."""
    path = recording.path
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            what = "is a folder named like a recording, or cannot be listed; rename it, or make it readable"
            raise _failure(recording, "unreadable", what)
        if not stat.S_ISREG(mode):
            raise _failure(recording, "unreadable", "is a FIFO, socket or device, not a file; remove it")
        content = path.read_bytes()
        status = path.stat()
    except OSError as error:
        what = f"cannot be read ({error.strerror}); make it readable, or remove it"
        raise _failure(recording, "unreadable", what) from error
    as_listed = (recording.size_bytes, recording.modified_at)
    if (len(content), modified_at(status)) != as_listed:
        raise _failure(recording, "changed", "has changed since it was listed; run again when it is complete")
    if not content:
        raise _failure(recording, "empty", "is an empty file; copy it again, or remove it")
    return content


def _failure(recording: Recording, code: str, what: str) -> RecordingError:
    return RecordingError("decode", code, f"{recording.uri} {what}")
