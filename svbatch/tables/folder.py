"""Where an output lies: a folder on a disk, or a prefix of an object store. Its files by name, the same for both."""

import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path, PurePosixPath
from typing import Any

import obstore
from obstore.exceptions import AlreadyExistsError, BaseError, PreconditionError
from obstore.store import LocalStore, S3Store
from pyarrow.fs import FileSystem, LocalFileSystem, SubTreeFileSystem

from svbatch.errors import OutputError

ADDRESS = "s3://"
UNFIT_FOR_PATHS = set("%[]^|\\")  # deltalake 1.6 does not find, or panics over, a table whose path has one
UNFIT_FOR_ADDRESSES = UNFIT_FOR_PATHS | set(" #?*<>\"'`{}+&")  # or readers quote it differently


class Folder:
    """The folder of an output.

    output: an absolute Path, or an address as text. path: that Path, None on an object store, whose keys and endpoint
    come from the environment (AWS_ACCESS_KEY_ID, AWS_ENDPOINT_URL and such)."""

    def __init__(self, output: Path | str, *, make: bool) -> None:
        """make: it will be written; made if missing. Raises OutputError if it cannot be, or where a folder to read is
        missing, or Delta cannot bear its name."""
        if is_address(output):
            self.path = None
            self.output: Path | str = str(output).rstrip("/")
            _refuse_unfit(self.output, UNFIT_FOR_ADDRESSES)
            if not self.output.startswith(ADDRESS) or self.output == ADDRESS.rstrip("/"):
                raise OutputError(f"{output}: an output is a folder, or an address such as s3://bucket/out")
            self._objects: Any = S3Store.from_url(self.output)
        else:
            self.path = self.output = Path(output).resolve()
            _refuse_unfit(str(self.path), UNFIT_FOR_PATHS)
            if make:
                _make(self.path)
            elif not self.path.is_dir():
                raise OutputError(f"{output}: there is no such folder; give the `output` of a job that has run")
            self._objects = LocalStore(self.path)

    @property
    def storage_options(self) -> dict[str, str] | None:
        """What deltalake needs to know: that a commit is a put of a file that must not exist."""
        return None if self.path else {"aws_conditional_put": "etag"}

    def address_of(self, name: str) -> str:
        """Where a table or file lies, for other libraries."""
        return f"{self.output}/{name}"

    def filesystem(self, table: str) -> FileSystem:
        """A table's folder by Arrow's own access. deltalake's is a Python object, which Arrow's threads may let go
        after the interpreter has ended: that aborts a process which has done its work."""
        if self.path:
            return SubTreeFileSystem(str(self.path / table), LocalFileSystem())
        filesystem, below = FileSystem.from_uri(self.address_of(table))
        return SubTreeFileSystem(below, filesystem)

    def folders(self) -> list[str]:
        """Names of the folders right below."""
        if self.path:
            return sorted(each.name for each in self.path.iterdir() if each.is_dir())
        return sorted(PurePosixPath(each).name for each in self._listed()["common_prefixes"])

    def files(self) -> list[str]:
        """Names of the files right below."""
        if self.path:
            return sorted(each.name for each in self.path.iterdir() if each.is_file())
        return sorted(each["path"] for each in self._listed()["objects"])

    def sizes(self, below: str) -> dict[str, int]:
        """Every file in the folder `below` and its folders, half-written ones too: bytes by name from here."""
        if self.path:
            sizes = {}
            for folder, _, names in os.walk(self.path / below):
                for each in (Path(folder) / name for name in names):
                    with suppress(FileNotFoundError):  # another shard has just renamed what it wrote
                        sizes[str(each.relative_to(self.path))] = each.stat().st_size
            return sizes
        with self._reaching(below):
            return {each["path"]: each["size"] for batch in obstore.list(self._objects, below) for each in batch}

    def read(self, name: str) -> bytes | None:
        """A file's bytes; None if there is none."""
        with self._reaching(name):
            try:
                return bytes(obstore.get(self._objects, name).bytes())
            except FileNotFoundError:
                return None

    def sha256(self, name: str) -> str | None:
        """The SHA-256 of a file's bytes, in hexadecimal; None if there is none. Reads it in pieces."""
        digest = hashlib.sha256()
        with self._reaching(name):
            try:
                for piece in obstore.get(self._objects, name).stream():
                    digest.update(piece)
            except FileNotFoundError:
                return None
        return digest.hexdigest()

    def write(self, name: str, content: bytes) -> None:
        """Puts a file there, whole or not at all."""
        with self._reaching(name):
            obstore.put(self._objects, name, content)

    def put_if(self, name: str, content: bytes, etag: str | None) -> str | None:
        """Puts an object if it still has this ETag, or, for None, if there is none; its new ETag, or None if not."""
        with self._reaching(name):
            try:
                mode: Any = {"e_tag": etag} if etag else "create"
                return str(obstore.put(self._objects, name, content, mode=mode)["e_tag"])
            except (AlreadyExistsError, PreconditionError):
                return None

    def seen(self, name: str) -> tuple[str, datetime] | None:
        """An object's ETag, and when it was put by the store's own clock; None if there is none."""
        with self._reaching(name):
            try:
                head = obstore.head(self._objects, name)
            except FileNotFoundError:
                return None
            return str(head["e_tag"]), head["last_modified"]

    def remove(self, names: Iterable[str]) -> None:
        """Removes files, in this order; one that is missing is no error."""
        for name in names:
            if self.path:
                (self.path / name).unlink(missing_ok=True)
            else:
                with self._reaching(name):
                    obstore.delete(self._objects, name)

    def _listed(self) -> Any:
        with self._reaching(""):
            return obstore.list_with_delimiter(self._objects)

    @contextmanager
    def _reaching(self, name: str) -> Iterator[None]:
        try:
            yield
        except (BaseError, OSError) as error:
            raise OutputError(
                f"{self.address_of(name)}: cannot be read or written ({str(error).splitlines()[0]}); "
                "what was committed before is safe: mend the cause and run again"
            ) from error


def is_address(output: Path | str) -> bool:
    """Whether it is not a path."""
    return isinstance(output, str) and "://" in output


def _refuse_unfit(output: str, unfit: set[str]) -> None:
    if found := {each for each in output if each in unfit or not each.isprintable()}:
        raise OutputError(
            f"{output!r}: Delta tables cannot lie under a path with {sorted(found)}; give `output` another folder"
        )


def _make(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise OutputError(
            f"{path}: the tables cannot be written there ({error.strerror}); "
            "give `output` a folder that you may write to"
        ) from error
