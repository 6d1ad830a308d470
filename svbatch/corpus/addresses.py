"""Files at addresses: s3, gs, az, hf and http through fsspec, each with the credentials that its own package finds.

Listings bring size, time and ETag with them; only http has to be asked for each file. Nothing is cached between calls,
so that a listing is never older than the command.
"""

import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from tempfile import SpooledTemporaryFile
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar, cast
from urllib.parse import quote, unquote, urlsplit

from svbatch.corpus.recording import EPOCH, RemoteFile, Status, is_http
from svbatch.errors import CorpusError, SvbatchError

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "az": "adlfs", "hf": "huggingface_hub", "http": "aiohttp", "https": "aiohttp"}
CONNECT_SECONDS, READ_SECONDS = 10, 60  # without a byte
WAITS_S = (0.5, 2.0)  # before the second and the third attempt
MAX_DEPTH = 64  # folders in folders: a server may show a loop
QUESTIONS_AT_ONCE = 16  # to a store
BLOCK_BYTES = 2**18  # of a tar's headers at a time

LASTING = (SvbatchError, FileNotFoundError, PermissionError, IsADirectoryError, NotImplementedError, ValueError)
_TIMES = ("LastModified", "last_modified", "updated", "mtime", "Last-Modified")
_T = TypeVar("_T")


def is_address(entry: str) -> bool:
    """Whether an entry names a store and not a path: `SCHEME://…`."""
    return re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", entry) is not None


def checked(address: str) -> RemoteFile:
    """An address that can be read; ValueError says why it cannot be."""
    scheme, rest = address.split("://", 1)
    if scheme not in PACKAGES:
        raise ValueError(f"{scheme}:// is not read; copy the files to a disk, or use {', '.join(PACKAGES)}")
    if not rest.strip("/"):
        raise ValueError("it names no bucket or host")
    if re.search("[\x00-\x1f\x7f]" if is_http(address) else "[\x00\ud800-\udfff]", address):
        raise ValueError("it holds characters that no address can")
    if "@" in rest.split("/", 1)[0]:
        raise ValueError("it holds a user or password, which would be written into the tables; use the environment")
    return RemoteFile(address.replace("#", "%23") if is_http(address) else address)


def name_of(file: RemoteFile) -> str:
    """The last part of an address, as a name."""
    if is_http(file.address):
        return unquote(urlsplit(file.address).path.rstrip("/").rsplit("/", 1)[-1])
    return file.address.rstrip("/").rsplit("/", 1)[-1]


def parent_of(file: RemoteFile) -> str:
    """The folder of an address, with a slash at its end."""
    address = file.address.split("?", 1)[0] if is_http(file.address) else file.address
    return address.rstrip("/").rsplit("/", 1)[0] + "/"


def joined(folder: str, name: str) -> str:
    """The address of the relative path `name` in `folder`; ValueError if it leads out of the bucket or host."""
    scheme, rest = folder.split("://", 1)
    parts = rest.rstrip("/").split("/")
    for part in name.split("/"):
        if part == ".." and len(parts) == 1:
            raise ValueError("leads out of its bucket or host")
        if part == "..":
            parts.pop()
        elif part not in ("", "."):
            parts.append(quote(part) if is_http(folder) else part)
    return f"{scheme}://{'/'.join(parts)}"


def is_below(folder: str, address: str) -> bool:
    """Whether an address lies in a folder, which ends in a slash."""
    inner = unquote(address) if is_http(address) else address
    return address.startswith(folder) and ".." not in inner.split("/")


def status_of(file: RemoteFile) -> Status | None:
    """What the store says of one file now; None where there is none, or none for us. Other faults are CorpusError."""
    (status,) = statuses([file])
    return status


def statuses(files: Sequence[RemoteFile]) -> Iterator[Status | None]:
    """`status_of` of each, many at a time."""
    if not files:
        return
    systems = [_file_system(file) for file in files]  # they belong to the thread that made them
    with ThreadPoolExecutor(min(len(files), QUESTIONS_AT_ONCE)) as pool:
        yield from pool.map(_asked, systems, files)


def _asked(system: "AbstractFileSystem", file: RemoteFile) -> Status | None:
    with reporting(file.address):
        try:
            entry = attempts(lambda: _entry(system, file.address))
        except (FileNotFoundError, PermissionError):
            return None
        except Exception as error:
            if _http_status(error) in (401, 403):
                return None
            raise
    return None if entry["type"] == "directory" else _status(entry)


def _entry(system: "AbstractFileSystem", address: str) -> Mapping[str, Any]:
    try:
        return cast(Mapping[str, Any], system.info(address))
    except FileNotFoundError as error:  # with http, it stands for every fault
        cause = error.__cause__
        if is_http(address) and isinstance(cause, Exception) and _http_status(cause) not in (404, 410):
            raise cause from None
        raise


def _http_status(error: Exception) -> int | None:
    status = getattr(error, "status", None)
    return status if isinstance(status, int) else None


def is_folder(file: RemoteFile) -> bool:
    """Whether something is listed below an address; one with http ends in a slash then."""
    if is_http(file.address):
        return urlsplit(file.address).path.endswith("/")
    with reporting(file.address):
        try:
            system = _file_system(file)
            return bool(attempts(lambda: system.info(file.address))["type"] == "directory")
        except FileNotFoundError:
            return False


def iter_files(
    folder: RemoteFile, is_wanted: Callable[[str], bool], depth: int = 0
) -> Iterator[tuple[RemoteFile, Status]]:
    """Every file below a folder whose name is wanted, in the order of names, hidden ones left out. CorpusError where
    it cannot be listed."""
    if depth > MAX_DEPTH:
        raise CorpusError(f"corpus: {folder.address}: folders lie in folders more than {MAX_DEPTH} deep; is it a loop?")
    children = _children(folder)
    files = [file for file, entry in children if entry["type"] != "directory" and is_wanted(name_of(file))]
    asked = dict(zip(files, statuses(files), strict=True)) if is_http(folder.address) else {}
    for child, entry in children:
        if entry["type"] == "directory":
            yield from iter_files(child, is_wanted, depth + 1)
        elif is_wanted(name_of(child)):
            yield child, asked.get(child) or _status(entry)


def _children(folder: RemoteFile) -> list[tuple[RemoteFile, Mapping[str, Any]]]:
    """What lies in a folder, as its store names and describes it."""
    top = folder.address.rstrip("/") + "/"
    system = _file_system(folder)
    with reporting(top):
        try:
            entries = attempts(lambda: system.ls(top if is_http(top) else top.rstrip("/"), detail=True))
        except FileNotFoundError:  # it has gone since its parent was listed
            return []
    children = [(RemoteFile(_address(folder, entry)), entry) for entry in entries]
    seen = [(child, entry) for child, entry in children if _is_seen(top, child, entry)]
    return sorted(seen, key=lambda each: each[0].address.rstrip("/"))


def _is_seen(top: str, child: RemoteFile, entry: Mapping[str, Any]) -> bool:
    """Not what is hidden or above, nor what marks a folder in a store without folders."""
    inner = child.address.removeprefix(top)
    if not inner.strip("/") or inner.startswith(".") or (is_http(top) and not is_below(top, child.address)):
        return False
    return entry["type"] == "directory" or not inner.endswith("/")


def matches(pattern: RemoteFile) -> list[tuple[RemoteFile, Status | None]]:
    """What a glob at an address names, in order; None as the status of a folder. Empty if nothing, or no glob."""
    if not any(sign in pattern.address for sign in ("*[" if is_http(pattern.address) else "*?[")):
        return []
    system = _file_system(pattern)
    with reporting(pattern.address):
        try:
            found = attempts(lambda: system.glob(pattern.address, detail=True))
        except FileNotFoundError:
            return []
    files = [(RemoteFile(_address(pattern, entry)), entry) for _, entry in sorted(found.items())]
    return [
        (file, None if entry["type"] == "directory" else _status(entry))
        for file, entry in files
        if not name_of(file).startswith(".") and (entry["type"] == "directory" or not file.address.endswith("/"))
    ]


@contextmanager
def opened(file: RemoteFile) -> Iterator[BinaryIO]:
    """A file in which one may jump; blocks of it are read."""
    system = _file_system(file)
    with attempts(lambda: system.open(file.address, "rb", block_size=BLOCK_BYTES)) as stream:
        yield cast(BinaryIO, stream)


@contextmanager
def fetched(file: RemoteFile) -> Iterator[BinaryIO | None]:
    """A copy of a file, in memory or, if it is large, on disk without a name; None where there is no file."""
    system = _file_system(file)

    def copy() -> None:
        stream.seek(0)
        stream.truncate()
        how = {"block_size": 0, "size": 1} if is_http(file.address) else {"block_size": 2**23}
        with system.open(file.address, "rb", **how) as source:
            shutil.copyfileobj(source, stream, 2**20)
        stream.seek(0)

    with SpooledTemporaryFile(max_size=2**26) as stream:
        is_there = True
        with reporting(file.address):
            try:
                attempts(copy)
            except FileNotFoundError:
                is_there = False
        yield cast(BinaryIO, stream) if is_there else None


def read_bytes(file: RemoteFile, start: int, size_bytes: int) -> bytes:
    """The bytes from `start`, at most `size_bytes`; a fault of the network is met by trying again."""
    system = _file_system(file)
    if is_http(file.address) and start == 0:  # a server need not know how to give a part
        return attempts(lambda: _streamed(system, file.address, size_bytes))
    content: bytes = attempts(lambda: system.cat_file(file.address, start=start, end=start + size_bytes))
    return content if len(content) <= size_bytes else content[start : start + size_bytes]  # it does not, and sends all


def _streamed(system: "AbstractFileSystem", address: str, size_bytes: int) -> bytes:
    content = bytearray()
    with system.open(address, "rb", block_size=0, size=1) as stream:
        while len(content) < size_bytes and (part := stream.read(min(2**20, size_bytes - len(content)))):
            content += part
    return bytes(content)


def attempts(call: Callable[[], _T]) -> _T:
    """What `call` returns, tried up to three times. fsspec's packages share no class for a fault that passes, so only
    what is known to last is not tried again."""
    for wait_s in WAITS_S:
        try:
            return call()
        except LASTING:
            raise
        except Exception as error:
            if 400 <= (_http_status(error) or 0) < 500 and _http_status(error) != 429:
                raise
            time.sleep(wait_s)
    return call()


@contextmanager
def reporting(address: str) -> Iterator[None]:
    """Turns what fsspec's packages raise into CorpusError, but for files that are not there."""
    try:
        yield
    except (CorpusError, FileNotFoundError):
        raise
    except Exception as error:  # they share no class for it
        raise CorpusError(
            f"corpus: {address} cannot be listed ({reason_of(error)}); correct the address, or set up its credentials "
            "in the environment"
        ) from error


def reason_of(error: BaseException) -> str:
    """What an exception says, as one line."""
    return " ".join(str(error).split()) or type(error).__name__


def _file_system(file: RemoteFile) -> "AbstractFileSystem":
    scheme = file.address.split("://", 1)[0]
    package = PACKAGES[scheme]
    try:
        import fsspec

        system = fsspec.filesystem(scheme, use_listings_cache=False, **_options(scheme))
    except ImportError as error:
        raise CorpusError(f"corpus: {scheme}:// needs a package; install it with `pip install {package}`") from error
    system.invalidate_cache()  # some keep one all the same
    return system


def _options(scheme: str) -> dict[str, Any]:
    """Time limits, each package's own way."""
    if scheme == "s3":
        return {"config_kwargs": {"connect_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}}
    if scheme == "gs":
        return {"requests_timeout": READ_SECONDS}
    if scheme == "az":
        return {"connection_timeout": CONNECT_SECONDS, "read_timeout": READ_SECONDS}
    if scheme in ("http", "https"):
        from aiohttp import ClientTimeout

        timeout = ClientTimeout(total=None, sock_connect=CONNECT_SECONDS, sock_read=READ_SECONDS)
        return {"client_kwargs": {"timeout": timeout}, "simple_links": False}
    return {}


def _address(beside: RemoteFile, entry: Mapping[str, Any]) -> str:
    name = str(entry["name"])
    return name if is_address(name) else f"{beside.address.split('://', 1)[0]}://{name.lstrip('/')}"


def _status(entry: Mapping[str, Any]) -> Status:
    etag = entry.get("ETag") or entry.get("etag") or entry.get("blob_id")
    return Status(entry.get("size") or 0, _time(entry), str(etag).strip('"') if etag else None)


def _time(entry: Mapping[str, Any]) -> datetime:
    """When a file was modified, in whole seconds, since some answers have no more; EPOCH where it is not said."""
    value = next((entry[key] for key in _TIMES if entry.get(key)), EPOCH)
    try:
        if isinstance(value, str):
            value = parsedate_to_datetime(value) if "," in value else datetime.fromisoformat(value)
        if isinstance(value, int | float):
            value = datetime.fromtimestamp(value, UTC)
        return cast(datetime, value).astimezone(UTC).replace(microsecond=0)
    except (ValueError, TypeError, OverflowError, AttributeError):
        return EPOCH
