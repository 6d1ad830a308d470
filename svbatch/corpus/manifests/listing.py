"""The recordings of a manifest: which file is one, and where its rows lead.

A manifest that cannot be understood is an error, with its lines, before anything is asked; a row whose file is not
there, or leads out through a link, is a recording that fails.
"""

import gzip
import os
import stat
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import BinaryIO

from svbatch.corpus.addresses import checked, fetched, is_address, is_below, joined, name_of, parent_of, statuses
from svbatch.corpus.folders import Boundary, boundary_of, is_inside, status_at
from svbatch.corpus.manifests.json_lines import iter_json_lines
from svbatch.corpus.manifests.kaldi import iter_kaldi
from svbatch.corpus.manifests.row import Numbered, Row, WrongLine
from svbatch.corpus.manifests.tabular import iter_csv, iter_parquet
from svbatch.corpus.recording import LocalFile, Recording, Refused, RemoteFile, Status, source_uri
from svbatch.errors import CorpusError

SUFFIXES = (".csv", ".json", ".jsonl", ".jsonl.gz", ".parquet")
ROWS_AT_ONCE = 256
MAX_SHOWN = 10  # wrong lines

Source = LocalFile | RemoteFile


def is_manifest(name: str) -> bool:
    """Whether a file is a manifest, by its name."""
    return name.lower().endswith(SUFFIXES)


def iter_manifest(manifest: Source, *, follow_outside: bool) -> Iterator[Recording]:
    """The recordings of a manifest, in its order. Raises CorpusError with every wrong line."""
    uri = source_uri(manifest)
    name = (manifest.path.name if isinstance(manifest, LocalFile) else name_of(manifest)).lower()

    def placed() -> Iterator[tuple[str, Row | WrongLine]]:
        with _opened(manifest) as stream:
            if stream is None:
                raise CorpusError(f"corpus: {uri} is no file; correct the path")
            word = "row" if name.endswith(".parquet") else "line"
            for number, row in _rows(name, stream):
                yield f"{uri}, {word} {number}", row

    if isinstance(manifest, LocalFile):
        return _iter_rows(placed(), manifest.path.parent, follow_outside=follow_outside)
    return _iter_rows(placed(), parent_of(manifest), follow_outside=follow_outside)


def iter_kaldi_folder(folder: Source, *, follow_outside: bool) -> Iterator[Recording]:
    """The recordings of a Kaldi data folder, in its order. Raises CorpusError with every wrong line."""
    uri = source_uri(folder).rstrip("/")

    def opened(name: str) -> AbstractContextManager[BinaryIO | None]:
        if isinstance(folder, LocalFile):
            return _opened(LocalFile(folder.path / name))
        return _opened(RemoteFile(joined(folder.address, name)))

    rows = ((f"{uri}/{name}, line {number}", row) for name, number, row in iter_kaldi(opened))
    base = folder.path if isinstance(folder, LocalFile) else folder.address.rstrip("/") + "/"
    return _iter_rows(rows, base, follow_outside=follow_outside)


@contextmanager
def _opened(file: Source) -> Iterator[BinaryIO | None]:
    """A file of a corpus to read; None where there is none. A FIFO is not opened: that would wait for a writer."""
    if isinstance(file, RemoteFile):
        with fetched(file) as stream:
            yield stream
        return
    try:
        if not stat.S_ISREG(file.path.stat().st_mode):
            raise CorpusError(f"corpus: {source_uri(file)} is no file; remove it, or name another")
        opened = file.path.open("rb")
    except FileNotFoundError:
        yield None
        return
    except OSError as error:
        raise CorpusError(f"corpus: {source_uri(file)} cannot be read ({error.strerror}); make it readable") from error
    with opened:
        yield opened


def _rows(name: str, stream: BinaryIO) -> Iterator[Numbered]:
    if name.endswith(".csv"):
        return iter_csv(stream)
    if name.endswith(".parquet"):
        return iter_parquet(stream)
    return _unzipped(stream) if name.endswith(".gz") else iter_json_lines(stream)


def _unzipped(stream: BinaryIO) -> Iterator[Numbered]:
    number = 0
    try:
        with gzip.GzipFile(fileobj=stream) as plain:
            for number, row in iter_json_lines(plain):  # type: ignore[arg-type]
                yield number, row
    except (OSError, EOFError, zlib.error) as error:
        yield number + 1, WrongLine(f"cannot be unzipped ({error}); copy the file again")


def _iter_rows(
    rows: Iterator[tuple[str, Row | WrongLine]], folder: Path | str, *, follow_outside: bool
) -> Iterator[Recording]:
    """The recordings of rows, a few at a time, since stores are asked for many at once. After a wrong line, only more
    of them are looked for."""
    boundary = boundary_of(folder, follow_outside=follow_outside) if isinstance(folder, Path) else Boundary(None)
    real_path = lru_cache(maxsize=1024)(os.path.realpath)  # rows share their folders
    wrong: list[str] = []
    num_wrong = 0
    while some := list(islice(rows, ROWS_AT_ONCE)):
        found: list[tuple[Row, Source]] = []
        for place, row in some:
            try:
                if isinstance(row, WrongLine):
                    raise row
                found.append((row, _source(row.source, folder, boundary, follow_outside=follow_outside)))
            except WrongLine as why:
                num_wrong += 1
                if len(wrong) < MAX_SHOWN:
                    wrong.append(f"{place}: {why}")
        if not wrong:
            yield from _recordings(found, boundary, real_path)
    if num_wrong > len(wrong):
        wrong.append(f"and {num_wrong - len(wrong)} more such lines")
    if wrong:
        raise CorpusError("\n".join(wrong))


def _source(written: str, folder: Path | str, boundary: Boundary, *, follow_outside: bool) -> Source:
    """Where a row's recording lies. Raises WrongLine for what is outside, by its name."""
    try:
        written.encode("utf-8", errors="surrogateescape")
        if "\0" in written:
            raise ValueError("it holds the character NUL")
        source = _joined(written, folder)
    except ValueError as error:
        raise WrongLine(f"cannot name a recording: {written[:60]!a} ({error})") from error
    if follow_outside or _is_below(source, folder, boundary):
        return source
    raise WrongLine(f"{written[:200]!a} is not below the manifest's folder; if it is meant, set `follow_outside: true`")


def _joined(written: str, folder: Path | str) -> Source:
    if is_address(written):
        return checked(written)
    if isinstance(folder, Path) or written.startswith("/"):
        return LocalFile(Path(os.path.abspath(folder / written if isinstance(folder, Path) else written)))
    return checked(joined(folder, written))


def _is_below(source: Source, folder: Path | str, boundary: Boundary) -> bool:
    """By name, or for a path by what the name stands for: a folder may be reached by several."""
    if isinstance(source, LocalFile):
        return isinstance(folder, Path) and (
            is_inside(str(source.path), str(folder)) or boundary.refusal(source.path) is None
        )
    return isinstance(folder, str) and is_below(folder, source.address)


def _recordings(
    found: Sequence[tuple[Row, Source]], boundary: Boundary, real_path: Callable[[Path], str]
) -> Iterator[Recording]:
    remote = {source: None for _, source in found if isinstance(source, RemoteFile)}
    asked = dict(zip(remote, statuses(list(remote)), strict=True))
    for row, source in found:
        refusal = _refusal(source.path, boundary, real_path) if isinstance(source, LocalFile) else None
        status = status_at(source.path) if isinstance(source, LocalFile) else asked[source]
        status = Status() if refusal is not None or status is None else status
        uri = source_uri(source)
        yield Recording(
            uri=uri if row.span is None else f"{uri}#t={row.span}",
            location=refusal or source,
            size_bytes=status.size_bytes,
            modified_at=status.modified_at,
            etag=status.etag,
            span=row.span,
            reference=row.reference,
            metadata=row.metadata,
        )


def _refusal(path: Path, boundary: Boundary, real_path: Callable[[Path], str]) -> Refused | None:
    """Only a link, or a file in a folder that is one, can lead out."""
    if boundary.real is None:
        return None
    is_plain = is_inside(real_path(path.parent), boundary.real) and not path.is_symlink()
    return None if is_plain else boundary.refusal(path)
