"""Where recordings come from: folders, files and globs, listed in a fixed order.

Covered: what is named like audio but cannot be read (FIFO, folder named .wav, broken link) is listed too,
so that it becomes a failure and does not vanish. Not covered: addresses, manifests, what a file holds.
"""

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from svbatch.corpus.recording import EPOCH, Recording, modified_at
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
# What a uri cannot hold as it is: the escape sign, control characters, and bytes that are not UTF-8.
_ESCAPED = re.compile("[%\x00-\x1f\x7f\udc80-\udcff]")


def iter_recordings(corpus: Sequence[str], base: Path) -> Iterator[Recording]:
    """The recordings of all entries, each once, within an entry ordered by name.

    An entry is a folder (searched with its sub-folders for AUDIO_SUFFIXES, hidden names and links back to a
    folder above left out), a file of any name, or a glob of such folders and audio files; relative to `base`.
    Raises CorpusError naming every entry that matches nothing, or all entries if none holds a recording.
    """
    roots = {entry: _roots(entry, base) for entry in corpus}
    missing = [entry for entry, paths in roots.items() if not paths]
    if missing:
        raise CorpusError(
            f"corpus: nothing is at {_quoted(missing)} in {_uri(base)}; correct the path, or remove the entry"
        )
    listed: set[Path] = set()
    for root in (root for paths in roots.values() for root in paths):
        for path in _iter_audio(root, ()):
            if path not in listed:
                listed.add(path)
                yield recording_at(path)
    if not listed:
        raise CorpusError(
            f"corpus: no recording in {_quoted(corpus)} (looked for {', '.join(AUDIO_SUFFIXES)}); "
            "name a folder that holds some"
        )


def _roots(entry: str, base: Path) -> list[Path]:
    path = Path(os.path.abspath(base / entry))
    if os.path.lexists(path):
        return [path]
    pattern = os.path.join(glob.escape(os.path.abspath(base)), entry)
    matches = (Path(os.path.abspath(match)) for match in glob.iglob(pattern, recursive=True))
    return sorted(match for match in matches if _is_named_like_audio(match) or os.path.isdir(match))


def _iter_audio(path: Path, above: tuple[str, ...]) -> Iterator[Path]:
    """`path` itself, or the audio below it if it is a folder; `above` holds the real paths of its parents.

    A folder that is named like a recording or cannot be listed stands for itself, to be refused by name.
    """
    if _is_named_like_audio(path) or not os.path.isdir(path):
        yield path
        return
    real = os.path.realpath(path)
    if real in above:
        return
    try:
        names = sorted(os.listdir(path))
    except OSError:
        yield path
        return
    for name in names:
        child = path / name
        if not name.startswith(".") and (_is_named_like_audio(child) or os.path.isdir(child)):
            yield from _iter_audio(child, (*above, real))


def recording_at(path: Path) -> Recording:
    """The recording of one file, as it is now."""
    try:
        status = path.stat()
    except OSError:
        return Recording(_uri(path), path, 0, EPOCH)
    return Recording(_uri(path), path, status.st_size, modified_at(status))


def _is_named_like_audio(path: Path) -> bool:
    return path.suffix.lower() in AUDIO_SUFFIXES


def _uri(path: Path) -> str:
    text = os.fsencode(os.path.abspath(path)).decode("utf-8", errors="surrogateescape")
    return _ESCAPED.sub(lambda match: f"%{ord(match[0]) & 0xFF:02X}", text)


def _quoted(entries: Sequence[str]) -> str:
    return ", ".join(repr(entry) for entry in entries)
