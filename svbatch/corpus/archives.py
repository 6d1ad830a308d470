"""Tar shards: their members are listed and read in place, and never unpacked.

Covered: uncompressed tars, on a disk or at an address that gives parts of a file. Whatever a tar says, only the bytes
of its regular members are read; names are names and lead nowhere.
"""

import tarfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import BinaryIO, cast

from svbatch.corpus.addresses import opened, reason_of, reporting
from svbatch.corpus.recording import (
    LocalFile,
    Location,
    Recording,
    Refused,
    RemoteFile,
    Status,
    TarMember,
    escape,
    source_uri,
)

MAX_HEADER_BYTES = 2**20  # of one member; tarfile reads it whole

# What tarfile lets through when a header is damaged.
_FAULTS = (tarfile.TarError, ValueError, OverflowError, EOFError, RecursionError, LookupError)


class Headers:
    """A tar as `tarfile` sees it, which reads only headers: more at once is a lie in one of them."""

    def __init__(self, stream: BinaryIO) -> None:
        self.seek, self.tell = stream.seek, stream.tell
        self._stream = stream

    def read(self, size: int) -> bytes:
        """The next `size` bytes, or fewer at the end."""
        if not 0 <= size <= MAX_HEADER_BYTES:
            raise tarfile.ReadError(f"a header claims to have {size} bytes")
        return self._stream.read(size)


def iter_members(
    archive: LocalFile | RemoteFile, status: Status, is_wanted: Callable[[str], bool]
) -> Iterator[Recording]:
    """The members of a tar whose names are wanted, in its order. A tar that cannot be read to its end stands for
    itself after the members before the fault, refused. CorpusError where its store does not answer."""
    uri = source_uri(archive)
    try:
        with _opened(archive) as stream:
            for member in _members(stream, status.size_bytes):
                if is_wanted(member.name) and not member.isdir():
                    yield Recording(
                        uri=f"{uri}!/{escape(member.name)}",
                        location=_location(archive, status, member),
                        size_bytes=member.size,
                        modified_at=status.modified_at,
                        etag=status.etag,
                    )
    except (*_FAULTS, OSError) as error:
        why = f"is a tar that cannot be read to its end ({reason_of(error)}); copy it again"
        yield Recording(uri, Refused("unreadable", why), status.size_bytes, status.modified_at, status.etag)


def _opened(archive: LocalFile | RemoteFile) -> AbstractContextManager[BinaryIO]:
    if isinstance(archive, LocalFile):
        if not archive.path.is_file():  # opening a FIFO would wait for a writer
            raise tarfile.ReadError("not a file")
        return archive.path.open("rb")
    with reporting(archive.address):
        return opened(archive)


def _members(stream: BinaryIO, size_bytes: int) -> Iterator[tarfile.TarInfo]:
    with tarfile.open(fileobj=cast(BinaryIO, Headers(stream)), mode="r:", encoding="utf-8") as tar:
        while (member := tar.next()) is not None:
            tar.members.clear()  # type: ignore[attr-defined]  # else it keeps them all
            if member.size < 0 or member.offset_data + member.size > size_bytes:
                raise tarfile.ReadError(f"{member.name!r} goes on after the end")
            yield member
        # tarfile takes a damaged header for the end, and the place where a writer was killed
        stream.seek(tar.offset)
        if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"at byte {tar.offset} is neither a member nor the mark of the end")


def _location(archive: LocalFile | RemoteFile, status: Status, member: tarfile.TarInfo) -> Location:
    if not member.isreg() or member.issparse():
        return Refused("unreadable", "is a link, device or sparse file in a tar; pack it as a file")
    return TarMember(archive, member.offset_data, status.size_bytes)
