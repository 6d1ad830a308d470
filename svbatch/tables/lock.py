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

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError

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
        head = self._head(name)
        if head is None or self._is_stale(head):
            return None
        return self._said(name)

    def remove(self, name: str) -> None:
        obstore.delete(self._folder.objects, name)

    def _take(self, name: str) -> str:
        """Puts the lock and returns its ETag."""
        try:
            return _put(self._folder, name, "create")
        except AlreadyExistsError:
            pass
        head = self._head(name)
        if head is not None and not self._is_stale(head):
            raise _busy(self._folder, self._said(name))
        try:
            return _put(self._folder, name, {"e_tag": head["e_tag"]} if head else "create")
        except (AlreadyExistsError, PreconditionError):
            raise _busy(self._folder, self._said(name)) from None

    def _head(self, name: str) -> Any:
        try:
            return obstore.head(self._folder.objects, name)
        except FileNotFoundError:
            return None

    def _is_stale(self, head: Any) -> bool:
        if (self._now() - head["last_modified"]).total_seconds() <= EXPIRY_S:
            return False
        return bool(self._head(head["path"]) == head)

    def _now(self) -> datetime:
        """The time by the store's clock: that of an object that is put now."""
        probe = f".svbatch-{secrets.token_hex(8)}.clock"
        self._folder.write(probe, b"")
        when: datetime = obstore.head(self._folder.objects, probe)["last_modified"]
        obstore.delete(self._folder.objects, probe)
        return when

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
        while not self.ended.wait(RENEWED_S) and not self._is_lost:
            started_at = _uptime_s()
            try:
                self._etag = _put(self._folder, self._name, {"e_tag": self._etag})
                self._renewed_at = started_at
            except (PreconditionError, FileNotFoundError):
                self._is_lost = True
            except (BaseError, OSError):
                continue  # the next try may do; `check` knows since when none did

    def check(self) -> None:
        if self._is_lost or _uptime_s() - self._renewed_at > EXPIRY_S:
            raise BusyError(
                f"{self._folder.output}: the lock could not be renewed for {EXPIRY_S:.0f} s, another run may hold it "
                "now; what was committed is kept: run again"
            )

    def let_go(self) -> None:
        """Removes it, if it is still this one."""
        try:
            if not self._is_lost and obstore.head(self._folder.objects, self._name)["e_tag"] == self._etag:
                obstore.delete(self._folder.objects, self._name)
        except (BaseError, OSError):
            pass  # it will be stale soon


def _put(folder: Folder, name: str, mode: Any) -> str:
    """Puts a lock, other than any before it, under a condition; returns its ETag."""
    who = {"holder": f"process {os.getpid()} on {socket.gethostname()}", "token": secrets.token_hex(8)}
    return str(obstore.put(folder.objects, name, json.dumps(who).encode(), mode=mode)["e_tag"])


def _uptime_s() -> float:
    """Seconds that go on while the machine sleeps and that no clock change moves."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
