"""Folders on this machine: their files in the order of names, and what leads out of them."""

import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from svbatch.corpus.recording import LocalFile, Refused, Status, modified_at


@dataclass(frozen=True)
class Boundary:
    """A folder that nothing leaves, by its real path; None lets everything pass."""

    real: str | None

    def refusal(self, path: Path) -> Refused | None:
        """Why `path`, which may be a link or lie below one, is not followed; None if it stays inside."""
        if self.real is None or is_inside(os.path.realpath(path), self.real):
            return None
        return Refused("outside", f"leads out of {self.real!a}; set `follow_outside: true` in the job to follow it")


def boundary_of(folder: Path, *, follow_outside: bool) -> Boundary:
    """The boundary of an entry's folder."""
    return Boundary(None if follow_outside else os.path.realpath(folder))


def is_inside(path: str, folder: str) -> bool:
    """Whether one real path is, or lies below, another."""
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def status_at(path: Path) -> Status:
    """Size and time of a file as it is now; of one that is not there, nothing."""
    try:
        status = path.stat()
    except OSError:
        return Status()
    return Status(status.st_size, modified_at(status))


def iter_folder(
    folder: Path, is_wanted: Callable[[str], bool], boundary: Boundary, above: tuple[str, ...] = ()
) -> Iterator[tuple[LocalFile, Status | Refused]]:
    """The files below a folder whose names are wanted, in the order of names; `above` holds the real paths of its
    parents. Hidden names and links to a folder above are left out. A folder that cannot be listed, or that is named
    like a file, stands for itself; so does a link that leads out, refused.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        yield LocalFile(folder), status_at(folder)
        return
    for name in names:
        child = folder / name
        is_named = is_wanted(name)
        if name.startswith(".") or not (is_named or os.path.isdir(child)):
            continue
        if (refusal := _link_refusal(child, boundary)) is not None:
            yield LocalFile(child), refusal
        elif is_named:
            yield LocalFile(child), status_at(child)
        else:
            yield from iter_folder(child, is_wanted, boundary, (*above, real))


def _link_refusal(path: Path, boundary: Boundary) -> Refused | None:
    try:
        is_link = stat.S_ISLNK(os.lstat(path).st_mode)
    except OSError:
        return None
    return boundary.refusal(path) if is_link else None
