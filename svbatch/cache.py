"""The user's cache: where it lies, and how a file or folder gets into it whole or not at all.

    CACHE/files/<16 hex of sha256>-<name>    what `fetch` brought; named so only after its bytes were hashed
    CACHE/derived/<key>/                     what was made from those once: assembled or expanded weights
    CACHE/wheels/                            only while `fetch` runs

Everything here can be deleted at any time; it comes back when needed.
"""

import fcntl
import logging
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from svbatch.errors import BundleError

_log = logging.getLogger(__name__)

_ELSEWHERE = "free some space or choose another folder with --cache or SVBATCH_CACHE"


def cache_dir(option: Path | None) -> Path:
    """The cache folder (absolute, perhaps not made yet): `option` is what --cache said, None if nothing.

    BundleError if neither the option nor the environment names a place.
    """
    if option is not None:
        return option.absolute()
    if named := os.environ.get("SVBATCH_CACHE"):
        return Path(named).absolute()
    xdg = os.environ.get("XDG_CACHE_HOME", "")
    if os.path.isabs(xdg):  # the XDG specification: a relative value is ignored
        return Path(xdg) / "svbatch"
    if home := os.environ.get("HOME"):
        return Path(home).absolute() / ".cache" / "svbatch"
    raise BundleError(
        "no folder to cache weights in: give --cache DIR, or set SVBATCH_CACHE, or XDG_CACHE_HOME (or HOME)"
    )


def cached_file(cache: Path, sha256: str, name: str) -> Path:
    """Where `fetch` puts a file; two bundles that share a weight share its copy."""
    return cache / "files" / f"{sha256[:16]}-{name}"


def derived(cache: Path, key: str, make: Callable[[Path], None]) -> Path:
    """The folder CACHE/derived/`key`, made by `make(folder)` if it is not there yet.

    `key` names all that the content depends on (hashes of the sources, a version of the rule). `make` fills
    an empty folder beside, which gets its name only when it is complete and on disk; when several processes
    ask at once, one makes it and the others wait. What `make` raises passes through and leaves nothing
    behind, except that an OSError (no space, no permission) becomes a BundleError.
    """
    folder = cache / "derived" / key
    if folder.is_dir():
        return folder
    with locked(folder.with_name(f".{key}.lock")):
        if folder.is_dir():
            return folder
        scratch = folder.with_name(f".{key}.partial")
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
            make(scratch)
            for path in scratch.rglob("*"):
                if path.is_file():
                    flush_to_disk(path)
            scratch.rename(folder)
        except OSError as error:
            raise cannot_write(folder, error) from error
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    return folder


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds the lock file `path` (made if need be, never deleted), waiting for whoever holds it; the system
    releases it when a process dies. BundleError if the file cannot be made."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.open("w")
    except OSError as error:
        raise cannot_write(path.parent, error) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            _log.info("waiting for another process that works in %s", path.parent)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def flush_to_disk(path: Path) -> None:
    """Waits until the file's bytes are on the disk, so that a name given to it survives a power cut whole."""
    with path.open("rb") as file:
        os.fsync(file.fileno())


def cannot_write(path: Path, error: OSError) -> BundleError:
    return BundleError(f"{path}: cannot be written: {error.strerror or error}; {_ELSEWHERE}")
