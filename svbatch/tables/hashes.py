"""The SHA-256 of every Parquet file of a table, in `OUTPUT/_hashes/TABLE/FILE.sha256`: a line for `sha256sum -c`.

A file of its own per hash, so that shards never write the same one and a listing says what is kept. Delta's log has a
place for it, the tags of an added file, but the package deltalake writes none. A hash is kept after its file's commit;
what a kill leaves without one gets it when the tables are brought to rest.
"""

import re
from collections.abc import Collection
from contextlib import suppress
from pathlib import PurePosixPath

from svbatch.errors import OutputError
from svbatch.tables.folder import Folder

HASHES = "_hashes"  # readers of Delta and of Parquet pass over a folder that begins with _
SUFFIX = ".sha256"
LINE = re.compile(r"([0-9a-f]{64})  (.+)\n")


def keep_hashes(folder: Folder, table: str, files: Collection[str]) -> None:
    """Writes the hash of each of these files. One that cannot be is left out: it must not cost a commit that is done,
    and comes when the tables are next brought to rest."""
    for file in files:
        with suppress(OutputError):
            if digest := folder.sha256(f"{table}/{file}"):
                folder.write(_name(table, file), f"{digest}  {table}/{file}\n".encode())


def mend_hashes(folder: Folder, table: str, files: Collection[str]) -> None:
    """Keeps the hashes of just these files: writes what is missing and removes the rest. Reads no file else."""
    kept = set(folder.sizes(f"{HASHES}/{table}"))
    wanted = {_name(table, file): file for file in files}
    folder.remove(sorted(kept - {*wanted}))
    keep_hashes(folder, table, sorted(wanted[name] for name in {*wanted} - kept))


def drop_hashes_of_others(folder: Folder, tables: Collection[str]) -> None:
    """Removes those of tables that are no more, such as one that `migrate` had moved aside."""
    folder.remove(name for name in sorted(folder.sizes(HASHES)) if name.split("/")[1] not in tables)


def kept_hashes(folder: Folder, table: str) -> dict[str, str | None]:
    """The hash of each file for which one is kept; None where the record is damaged."""
    return {file: _digest(folder, _name(table, file)) for file in sorted(hashed_files(folder, table))}


def hashed_files(folder: Folder, table: str) -> set[str]:
    """The files for which a hash is kept, by the names of the records alone."""
    names = folder.sizes(f"{HASHES}/{table}")
    return {PurePosixPath(name).name.removesuffix(SUFFIX) for name in names if name.endswith(SUFFIX)}


def _digest(folder: Folder, name: str) -> str | None:
    said = LINE.fullmatch((folder.read(name) or b"").decode(errors="replace"))
    return said[1] if said and f"{HASHES}/{said[2]}{SUFFIX}" == name else None


def _name(table: str, file: str) -> str:
    return f"{HASHES}/{table}/{file}{SUFFIX}"
