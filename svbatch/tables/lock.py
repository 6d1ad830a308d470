"""Who may write an output: one process alone, or the shards of a run side by side.

    alone      takes `.svbatch.lock`; then every shard's must be free
    shard i/n  takes `.svbatch-i-of-n.lock`; then `.svbatch.lock`, and those of another n, must be free

Each takes its own before it looks at the others', so of two at the same moment at least one sees the other and goes.
On a disk the kernel holds a lock, and lets go of it however its process ends. On an object store a lock is an object
that is put only where none is, and put again now and then; one that has not been for EXPIRY_S is stale. That is judged
by the store's own clock, so nobody's else needs to be right.
"""

import fcntl
import json
import os
import re
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

from svbatch.errors import BusyError, OutputError
from svbatch.tables.folder import Folder

ALONE = ".svbatch.lock"
SHARD = re.compile(r"\.svbatch-(\d+)-of-(\d+)\.lock")
PROBE_S = 0.5  # a look at a lock holds it for an instant; so long is one tried
EXPIRY_S = 120.0
RENEWED_S = 20.0


class Hold:
    """A lock that is held."""

    def check(self) -> None:
        """Raises BusyError if it is held no longer: only on an object store, after EXPIRY_S without contact."""


@contextmanager
def hold(folder: Folder, shard: str | None) -> Iterator[Hold]:
    """Holds the output, alone, or for a shard such as "1/3". BusyError if another process holds it."""
    own = ALONE if shard is None else _file_of(shard)
    locks = _locks(folder)
    with locks.taken(own) as held:
        for other in locks.names():
            if _excludes(own, other):
                if holder := locks.holder(other):
                    raise _busy(folder, holder)
                if own == ALONE:
                    locks.remove(other)
        yield held


def holders(folder: Folder) -> list[str]:
    """Who writes there now, each in words such as `process 7 (shard 1/3)`."""
    locks = _locks(folder)
    return [holder for name in locks.names() if (holder := locks.holder(name))]


def _locks(folder: Folder) -> "DiskLocks | StoreLocks":
    return DiskLocks(folder, folder.path) if folder.path else StoreLocks(folder)


def _file_of(shard: str) -> str:
    number, of = shard.split("/")
    return f".svbatch-{int(number)}-of-{int(of)}.lock"


def _excludes(own: str, other: str) -> bool:
    """Whether the two may not be held at the same time by two processes."""
    own_shard, other_shard = SHARD.fullmatch(own), SHARD.fullmatch(other)
    return own != other and not (own_shard and other_shard and own_shard[2] == other_shard[2])


def _busy(folder: Folder, holder: str) -> BusyError:
    return BusyError(f"{folder.output}: {holder} is writing there; try again when it has ended")


def _in_words(name: str, who: str) -> str:
    shard = SHARD.fullmatch(name)
    return f"{who} (shard {shard[1]}/{shard[2]})" if shard else who


class DiskLocks:
    """Locks on a disk: files that the kernel locks for a process."""

    def __init__(self, folder: Folder, path: Path) -> None:
        self._folder = folder
        self._path = path

    def names(self) -> list[str]:
        return [name for name in self._folder.files() if name == ALONE or SHARD.fullmatch(name)]

    @contextmanager
    def taken(self, name: str) -> Iterator[Hold]:
        path = self._path / name
        tried_until = time.monotonic() + PROBE_S
        while True:
            try:
                file = path.open("a+")
            except OSError as error:
                raise OutputError(f"{path}: {error.strerror}; remove it, or choose another output") from error
            with file:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    if time.monotonic() < tried_until:
                        time.sleep(0.02)
                        continue
                    raise _busy(self._folder, self._said(file, name)) from None
                if not _is_at(file, path):  # another let go of it, and removed it
                    continue
                with suppress(OSError):  # a full disk
                    os.ftruncate(file.fileno(), 0)
                    os.write(file.fileno(), str(os.getpid()).encode())
                try:
                    yield Hold()
                finally:
                    if name != ALONE:
                        path.unlink(missing_ok=True)
                return

    def holder(self, name: str) -> str | None:
        try:
            file = (self._path / name).open()
        except OSError:
            return None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return self._said(file, name)
        return None

    def remove(self, name: str) -> None:
        (self._path / name).unlink(missing_ok=True)

    def _said(self, file: Any, name: str) -> str:
        file.seek(0)
        return _in_words(name, f"process {file.read() or 'unknown'}")


def _is_at(file: Any, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


class StoreLocks:
    """Locks on an object store: objects that are put with a condition, and put again by a thread."""

    def __init__(self, folder: Folder) -> None:
        self._folder = folder

    def names(self) -> list[str]:
        return [name for name in self._folder.files() if name == ALONE or SHARD.fullmatch(name)]

    @contextmanager
    def taken(self, name: str) -> Iterator[Hold]:
        held = _Renewed(self._folder, name, self._take(name))
        thread = threading.Thread(target=held.renew, name="svbatch-lock", daemon=True)
        thread.start()
        try:
            yield held
        finally:
            held.ended.set()
            thread.join()
            held.let_go()

    def holder(self, name: str) -> str | None:
        seen = self._folder.seen(name)
        return None if seen is None or self._is_stale(seen[1]) else self._said(name)

    def remove(self, name: str) -> None:
        self._folder.remove([name])

    def _take(self, name: str) -> str:
        """Puts the lock and returns its ETag."""
        if etag := _put(self._folder, name, None):
            return etag
        seen = self._folder.seen(name)
        if (seen is None or self._is_stale(seen[1])) and (etag := _put(self._folder, name, seen and seen[0])):
            return etag
        raise _busy(self._folder, self._said(name))

    def _is_stale(self, put_at: datetime) -> bool:
        """Whether that was too long ago, by the store's clock: the time of an object that is put now."""
        probe = f".svbatch-{secrets.token_hex(8)}.clock"
        self._folder.write(probe, b"")
        now = self._folder.seen(probe)
        self._folder.remove([probe])
        return now is not None and (now[1] - put_at).total_seconds() > EXPIRY_S

    def _said(self, name: str) -> str:
        content = self._folder.read(name)
        return _in_words(name, json.loads(content)["holder"] if content else "another process")


class _Renewed(Hold):
    """A lock on an object store that is put again every RENEWED_S."""

    def __init__(self, folder: Folder, name: str, etag: str) -> None:
        self.ended = threading.Event()
        self._folder, self._name, self._etag = folder, name, etag
        self._renewed_at = _uptime_s()
        self._is_lost = False

    def renew(self) -> None:
        """Until it is ended or lost. What cannot be reached is tried again; `check` knows since when it was not."""
        while not self._is_lost and not self.ended.wait(RENEWED_S):
            started_at = _uptime_s()
            with suppress(OutputError):
                etag = _put(self._folder, self._name, self._etag)
                self._is_lost = etag is None
                self._etag, self._renewed_at = etag or self._etag, started_at

    def check(self) -> None:
        if self._is_lost or _uptime_s() - self._renewed_at > EXPIRY_S:
            raise BusyError(
                f"{self._folder.output}: the lock could not be renewed for {EXPIRY_S:.0f} s, another run may hold it "
                "now; what was committed is kept: run again"
            )

    def let_go(self) -> None:
        """Removes it, if it is still this one; where the store cannot be reached, it is stale soon."""
        with suppress(OutputError):
            seen = self._folder.seen(self._name)
            if seen is not None and seen[0] == self._etag:
                self._folder.remove([self._name])


def _put(folder: Folder, name: str, etag: str | None) -> str | None:
    """Puts a lock, other than any before it, in the place of the one with this ETag, or of none; its ETag, or None."""
    who = {"holder": f"process {os.getpid()} on {socket.gethostname()}", "token": secrets.token_hex(8)}
    return folder.put_if(name, json.dumps(who).encode(), etag)


def _uptime_s() -> float:
    """Seconds that go on while the machine sleeps and that no clock change moves."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
