"""Where recordings come from: the entries of a corpus, listed in a fixed order. docs/corpus.md describes them all.

Covered: what is named like audio but cannot be read (FIFO, folder named .wav, broken link) is listed too,
so that it becomes a failure and does not vanish. Not covered: what a file holds.
"""

import glob
import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import takewhile
from pathlib import Path
from typing import Literal

from svbatch.corpus.addresses import checked, is_address, is_folder, iter_files, joined, matches, name_of, status_of
from svbatch.corpus.archives import iter_members
from svbatch.corpus.folders import Boundary, boundary_of, iter_folder, status_at
from svbatch.corpus.manifests.kaldi import WAV_SCP
from svbatch.corpus.manifests.listing import SUFFIXES, is_manifest, iter_kaldi_folder, iter_manifest
from svbatch.corpus.recording import EPOCH, LocalFile, Recording, Refused, RemoteFile, Status, source_uri
from svbatch.errors import CorpusError

AUDIO_SUFFIXES = (
    ".3gp",
    ".aac",
    ".aif",
    ".aiff",
    ".amr",
    ".flac",
    ".m4a",
    ".mka",
    ".mkv",
    ".mov",
    ".mp3",
    ".mp4",
    ".oga",
    ".ogg",
    ".opus",
    ".wav",
    ".webm",
    ".wma",
)
TAR_SUFFIX = ".tar"
COMPRESSED_TARS = (".tar.bz2", ".tar.gz", ".tar.xz", ".tar.zst", ".tgz")

Kind = Literal["folder", "kaldi", "manifest", "tar", "file"]


@dataclass(frozen=True)
class Root:
    """What an entry names, or one match of a glob. `status` is what a store said of a remote file; `boundary` is that
    of a glob."""

    kind: Kind
    at: LocalFile | RemoteFile
    status: Status = field(default_factory=Status)
    boundary: Boundary | None = None


def iter_recordings(corpus: Sequence[str], base: Path, *, follow_outside: bool = False) -> Iterator[Recording]:
    """The recordings of all entries, each uri once, within an entry ordered by name or as its manifest has them.

    Local entries are relative to `base`. Only with `follow_outside` may links and manifests lead out of the folder of
    their entry. Raises CorpusError naming every entry that matches nothing, or all entries if none holds a recording,
    and for a manifest that cannot be understood, with its lines.
    """
    roots = {entry: _roots(entry, base, follow_outside=follow_outside) for entry in corpus}
    missing = [entry for entry, found in roots.items() if not found]
    if missing:
        where = "" if all(is_address(entry) for entry in missing) else f" in {_uri(base)}"
        raise CorpusError(f"corpus: nothing is at {_quoted(missing)}{where}; correct the path, or remove the entry")
    listed: set[bytes] = set()  # hashes: a uri may be long, and a corpus large
    for root in (root for found in roots.values() for root in found):
        for recording in _iter_root(root, follow_outside=follow_outside):
            key = hashlib.blake2b(recording.uri.encode(), digest_size=16).digest()
            if key not in listed:
                listed.add(key)
                yield recording
    if not listed:
        raise CorpusError(
            f"corpus: no recording in {_quoted(corpus)} (looked for {', '.join(AUDIO_SUFFIXES)}); "
            "name a folder that holds some"
        )


def recording_at(path: Path) -> Recording:
    """The recording of one file, as it is now."""
    return _recording(LocalFile(Path(os.path.abspath(path))), status_at(path))


def _recording(file: LocalFile | RemoteFile, status: Status | Refused) -> Recording:
    uri = source_uri(file)
    if isinstance(status, Refused):
        return Recording(uri, status, 0, EPOCH)
    return Recording(uri, file, status.size_bytes, status.modified_at, status.etag)


def _roots(entry: str, base: Path, *, follow_outside: bool) -> list[Root]:
    """What an entry names: one thing, or for a glob all that match it and are a folder, a tar, audio, or, if the glob
    says so by its suffix, a manifest."""
    if is_address(entry):
        return _remote_roots(entry)
    path = Path(os.path.abspath(base / entry))
    if os.path.lexists(path):
        return [_local_root(path, None)]
    pattern = os.path.join(glob.escape(os.path.abspath(base)), entry)
    boundary = boundary_of(base / _fixed_part(entry), follow_outside=follow_outside)
    found = sorted(Path(os.path.abspath(match)) for match in glob.iglob(pattern, recursive=True))
    return [_local_root(path, boundary) for path in found if _is_matched(path.name, entry) or os.path.isdir(path)]


def _remote_roots(entry: str) -> list[Root]:
    try:
        file = checked(entry)
    except ValueError as error:
        raise CorpusError(f"corpus: {entry!r}: {error}") from error
    is_listed = is_folder(file)
    if is_listed and status_of(RemoteFile(joined(file.address, WAV_SCP))) is not None:
        return [Root("kaldi", file)]
    if is_listed:
        return [Root("folder", file)]
    status = status_of(file)
    if status is not None:
        return [_remote_root(file, status)]
    return [
        Root("folder", match) if status is None else _remote_root(match, status)
        for match, status in matches(file)
        if status is None or _is_matched(name_of(match), entry)
    ]


def _remote_root(file: RemoteFile, status: Status) -> Root:
    if name_of(file) == WAV_SCP:
        return Root("kaldi", RemoteFile(file.address[: -len(WAV_SCP)]))
    return Root(_kind(name_of(file), source_uri(file)), file, status)


def _local_root(path: Path, boundary: Boundary | None) -> Root:
    if os.path.isdir(path) and not is_listed_name(path.name):
        kind: Kind = "kaldi" if os.path.lexists(path / WAV_SCP) else "folder"
        return Root(kind, LocalFile(path), boundary=boundary)
    if path.name == WAV_SCP:
        return Root("kaldi", LocalFile(path.parent), boundary=boundary)
    return Root(_kind(path.name, _uri(path)), LocalFile(path), boundary=boundary)


def _kind(name: str, uri: str) -> Kind:
    if name.lower().endswith(COMPRESSED_TARS):
        raise CorpusError(f"corpus: {uri}: a compressed tar cannot be read in place; write it as .tar, or unpack it")
    return "tar" if _is_tar(name) else "manifest" if is_manifest(name) else "file"


def _iter_root(root: Root, *, follow_outside: bool) -> Iterator[Recording]:
    at, boundary = root.at, root.boundary
    if isinstance(at, LocalFile) and boundary is not None and (refusal := boundary.refusal(at.path)) is not None:
        yield _recording(at, refusal)
    elif root.kind == "manifest":
        yield from iter_manifest(at, follow_outside=follow_outside)
    elif root.kind == "kaldi":
        yield from iter_kaldi_folder(at, follow_outside=follow_outside)
    elif root.kind == "folder" and isinstance(at, LocalFile):
        within = boundary or boundary_of(at.path, follow_outside=follow_outside)
        yield from _unpacked(iter_folder(at.path, is_listed_name, within))
    elif root.kind == "folder" and isinstance(at, RemoteFile):
        yield from _unpacked(iter_files(at, is_listed_name))
    else:
        yield from _unpacked([(at, status_at(at.path) if isinstance(at, LocalFile) else root.status)])


def _unpacked(files: Iterable[tuple[LocalFile | RemoteFile, Status | Refused]]) -> Iterator[Recording]:
    """A recording for each file, and for each member of a tar."""
    for file, status in files:
        name = file.path.name if isinstance(file, LocalFile) else name_of(file)
        if _is_tar(name) and isinstance(status, Status):
            yield from iter_members(file, status, is_audio)
        else:
            yield _recording(file, status)


def is_audio(name: str) -> bool:
    """Whether a path is named like a recording that svbatch looks for; a hidden name is not."""
    name = name.rsplit("/", 1)[-1]
    return name.lower().endswith(AUDIO_SUFFIXES) and not name.startswith(".")


def is_listed_name(name: str) -> bool:
    """Whether a file in a folder is listed: audio, and tars of it."""
    return is_audio(name) or (_is_tar(name) and not name.startswith("."))


def _is_tar(name: str) -> bool:
    return name.lower().endswith(TAR_SUFFIX)


def _is_matched(name: str, pattern: str) -> bool:
    return is_listed_name(name) or (pattern.lower().endswith(SUFFIXES) and is_manifest(name))


def _fixed_part(pattern: str) -> Path:
    """The folder that all matches of a glob lie in."""
    return Path(*takewhile(lambda part: not glob.has_magic(part), Path(pattern).parts))


def _uri(path: Path) -> str:
    return source_uri(LocalFile(Path(os.path.abspath(path))))


def _quoted(entries: Sequence[str]) -> str:
    return ", ".join(repr(entry) for entry in entries)
