"""Stores over real sockets: moto's S3 server and Python's http server, on loopback."""

import functools
import importlib.util
import multiprocessing
import os
import pickle
import socket
import tarfile
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import boto3
import pytest
from moto.core import DEFAULT_ACCOUNT_ID
from moto.s3.models import s3_backends
from moto.server import ThreadedMotoServer

from svbatch.corpus import addresses
from svbatch.corpus.content import content_of
from svbatch.corpus.recording import EPOCH, Recording, RemoteFile
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError, RecordingError


@pytest.fixture(autouse=True)
def impatience(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(addresses, "WAITS_S", (0.01, 0.01))


@pytest.fixture(scope="module")
def s3_server() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def bucket(s3_server: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator["boto3.resources.base"]:
    """An empty bucket `calls`; the credentials lie in the environment, as a user's do."""
    environment = {
        "AWS_ACCESS_KEY_ID": "key",
        "AWS_SECRET_ACCESS_KEY": "secret",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": s3_server,
        "AWS_CONFIG_FILE": str(tmp_path / "none"),
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    import fsspec

    fsspec.get_filesystem_class("s3").clear_instance_cache()
    calls = boto3.resource("s3").Bucket("calls")
    calls.create()
    yield calls
    calls.objects.all().delete()
    calls.delete()


class Handler(SimpleHTTPRequestHandler):
    """The files of a folder; requests are noted, and with `ranges` parts of files are given."""

    server: "Server"

    def log_message(self, *_: object) -> None:
        self.server.seen.append((self.command, self.path))

    def do_GET(self) -> None:
        if self.server.num_faults:
            self.server.num_faults -= 1
            self.send_error(503)
            return
        wanted = self.headers.get("Range")
        path = Path(self.translate_path(self.path))
        if wanted is None or not self.server.gives_parts or not path.is_file():
            super().do_GET()
            return
        start, end = (int(number) for number in wanted.removeprefix("bytes=").split("-"))
        content = path.read_bytes()
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {start}-{min(end, len(content) - 1)}/{len(content)}")
        self.send_header("Content-Length", str(len(content[start : end + 1])))
        self.end_headers()
        self.wfile.write(content[start : end + 1])


class Server(ThreadingHTTPServer):
    num_faults = 0
    gives_parts = True
    seen: list[tuple[str, str]]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Server]:
    """Serves `tmp_path`/site."""
    folder = tmp_path / "site"
    folder.mkdir()
    with Server(("127.0.0.1", 0), functools.partial(Handler, directory=str(folder))) as server:
        server.seen = []
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def url(server: Server) -> str:
    return f"http://127.0.0.1:{server.server_port}"


def listed(*corpus: str, base: Path = Path("/")) -> list[Recording]:
    return list(iter_recordings(corpus, base))


def uris(*corpus: str) -> list[str]:
    return [recording.uri for recording in listed(*corpus)]


def refusal(recording: Recording) -> RecordingError:
    with pytest.raises(RecordingError) as error:
        content_of(recording)
    assert error.value.stage == "decode"
    assert "\n" not in str(error.value)
    return error.value


NAMES = ("b.wav", "sub/a.FLAC", "sub/notes.txt", "sub/deeper/c.ogg", ".hidden/d.wav", ".e.wav", "sub/")


def put(bucket, *names: str) -> None:
    for name in names:
        bucket.put_object(Key=name, Body=b"four" if not name.endswith("/") else b"")


def test_a_folder_of_a_bucket_is_listed_by_name_with_size_time_and_etag(bucket) -> None:
    put(bucket, *NAMES)
    recordings = listed("s3://calls")
    assert [r.uri for r in recordings] == ["s3://calls/b.wav", "s3://calls/sub/a.FLAC", "s3://calls/sub/deeper/c.ogg"]
    for recording in recordings:
        assert recording.size_bytes == 4
        assert recording.modified_at > EPOCH
        assert recording.etag == bucket.Object(recording.uri.removeprefix("s3://calls/")).e_tag.strip('"')
        assert content_of(pickle.loads(pickle.dumps(recording))) == b"four"


def test_one_object_a_prefix_and_a_glob_of_a_bucket(bucket) -> None:
    put(bucket, *NAMES, "2026-01/a.wav", "2026-02/a.wav", "2027-01/a.wav", "a[1].wav")
    assert uris("s3://calls/sub/notes.txt") == ["s3://calls/sub/notes.txt"]
    assert uris("s3://calls/sub/") == uris("s3://calls/sub") == ["s3://calls/sub/a.FLAC", "s3://calls/sub/deeper/c.ogg"]
    assert uris("s3://calls/2026-*/*.wav") == ["s3://calls/2026-01/a.wav", "s3://calls/2026-02/a.wav"]
    assert uris("s3://calls/2026-*") == ["s3://calls/2026-01/a.wav", "s3://calls/2026-02/a.wav"]
    assert uris("s3://calls/a[1].wav") == ["s3://calls/a[1].wav"]


@pytest.mark.parametrize("key", ["ü 100%.wav", "a#t=1.wav", "a?b=c.wav", "a+b&c.wav"])
def test_any_key_is_listed_and_read(bucket, key: str) -> None:
    put(bucket, key)
    (recording,) = listed("s3://calls")
    assert recording.location == RemoteFile(f"s3://calls/{key}")
    assert content_of(recording) == b"four"


def test_more_keys_than_a_page_holds_are_listed_without_asking_for_each(
    bucket, caplog: pytest.LogCaptureFixture
) -> None:
    names = [f"{number:04}.wav" for number in range(1201)]
    for name in names:  # past the socket, where 1201 requests take long
        s3_backends[DEFAULT_ACCOUNT_ID]["aws"].put_object("calls", name, b"four")
    with caplog.at_level("INFO", "werkzeug"):
        assert uris("s3://calls") == [f"s3://calls/{name}" for name in names]
    assert len(caplog.records) < 10


def test_an_object_that_is_written_anew_has_another_etag_and_is_not_read_as_the_old(bucket) -> None:
    put(bucket, "a.wav")
    (old,) = listed("s3://calls")
    bucket.put_object(Key="a.wav", Body=b"FOUR")
    (new,) = listed("s3://calls")
    assert old.etag != new.etag
    assert refusal(old).code == "changed"
    assert content_of(new) == b"FOUR"


def test_an_object_that_is_gone_or_empty_is_a_failure(bucket) -> None:
    put(bucket, "a.wav")
    bucket.put_object(Key="b.wav", Body=b"")
    gone, empty = listed("s3://calls")
    bucket.Object("a.wav").delete()
    assert (refusal(gone).code, refusal(empty).code) == ("unreadable", "empty")
    assert str(refusal(gone)) == "s3://calls/a.wav cannot be read (nothing is there); make it readable, or remove it"


def test_a_missing_bucket_is_an_error_that_names_it(bucket) -> None:
    with pytest.raises(CorpusError) as error:
        listed("s3://calls-of-nobody/today")
    assert str(error.value) == (
        "corpus: nothing is at 's3://calls-of-nobody/today'; correct the path, or remove the entry"
    )


def test_missing_credentials_are_an_error_that_says_so(bucket, monkeypatch: pytest.MonkeyPatch) -> None:
    import fsspec

    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    with pytest.raises(CorpusError, match=r"cannot be listed .Unable to locate credentials.*in the environment"):
        listed("s3://calls")


def test_a_folder_of_a_site_is_listed_with_size_and_time(site: Server, tmp_path: Path) -> None:
    for name in ("ü 100%.wav", "sub/a#1.flac", "sub/notes.txt", ".hidden.wav"):
        (tmp_path / "site" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "site" / name).write_bytes(b"four")
    os.utime(tmp_path / "site/sub/a#1.flac", (1_700_000_000, 1_700_000_000))
    second, first = listed(f"{url(site)}/")[::-1]
    assert first.uri == f"{url(site)}/%C3%BC%20100%25.wav"
    assert second.uri == f"{url(site)}/sub/a%231.flac"
    assert (second.size_bytes, second.modified_at.timestamp()) == (4, 1_700_000_000)
    assert content_of(first) == content_of(second) == b"four"
    assert not any("notes.txt" in path for _, path in site.seen)


def test_a_file_of_a_site_is_read_although_it_gives_no_parts_and_fails_now_and_then(
    site: Server, tmp_path: Path
) -> None:
    (tmp_path / "site/a.wav").write_bytes(b"four")
    site.gives_parts = False
    (recording,) = listed(f"{url(site)}/a.wav")
    site.num_faults = 2
    assert content_of(recording) == b"four"
    site.num_faults = 3
    assert refusal(recording).code == "unreadable"


def test_a_file_of_a_site_that_changes_is_not_read_as_the_old(site: Server, tmp_path: Path) -> None:
    (tmp_path / "site/a.wav").write_bytes(b"four")
    (recording,) = listed(f"{url(site)}/a.wav")
    (tmp_path / "site/a.wav").write_bytes(b"four and more")
    assert refusal(recording).code == "changed"
    (tmp_path / "site/a.wav").unlink()
    assert refusal(recording).code == "unreadable"


def test_a_site_that_does_not_answer_is_an_error_and_a_missing_file_is_another() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{unused.getsockname()[1]}/a.wav"
        with pytest.raises(CorpusError, match=f"corpus: {address} cannot be listed .*Cannot connect"):
            listed(address)


def test_a_file_that_a_site_has_not_is_missing(site: Server) -> None:
    with pytest.raises(CorpusError, match=r"nothing is at .*/lost\.wav'; correct the path"):
        listed(f"{url(site)}/lost.wav")


@pytest.mark.parametrize(
    ("entry", "why"),
    [
        ("ftp://host/a.wav", "ftp:// is not read; copy the files to a disk, or use s3, gs, az, hf, http, https"),
        ("s3://", "it names no bucket or host"),
        ("https://me:word@host/a.wav", "it holds a user or password, which would be written into the tables"),
        ("https://host/a\n.wav", "it holds characters that no address can"),
        ("https://host/calls.tar.gz", "a compressed tar cannot be read in place; write it as .tar, or unpack it"),
    ],
)
def test_an_address_that_cannot_be_read_is_refused(entry: str, why: str, site: Server, tmp_path: Path) -> None:
    if entry.endswith(".tar.gz"):
        entry = f"{url(site)}/calls.tar.gz"
        (tmp_path / "site" / "calls.tar.gz").touch()
    with pytest.raises(CorpusError) as error:
        listed(entry)
    assert why in str(error.value)


@pytest.mark.parametrize(("entry", "package"), [("gs://calls/a.wav", "gcsfs"), ("az://calls/a.wav", "adlfs")])
def test_a_package_that_is_not_installed_is_named(entry: str, package: str) -> None:
    if importlib.util.find_spec(package):
        pytest.skip(f"{package} is installed")
    with pytest.raises(CorpusError) as error:
        listed(entry)
    assert str(error.value) == f"corpus: {entry[:2]}:// needs a package; install it with `pip install {package}`"


MANIFEST = '{"audio_filepath": "a.wav"}\n{"audio_filepath": "./sub/b #1.wav", "offset": 1, "duration": 2}\n'


def test_a_manifest_in_a_bucket_names_keys_beside_it(bucket) -> None:
    put(bucket, "train/a.wav", "train/sub/b #1.wav")
    bucket.put_object(Key="train/manifest.jsonl", Body=MANIFEST.encode())
    first, second = listed("s3://calls/train/manifest.jsonl")
    assert (first.uri, second.uri) == ("s3://calls/train/a.wav", "s3://calls/train/sub/b %231.wav#t=1,3")
    assert first.size_bytes == 4
    assert first.etag is not None
    assert content_of(second) == b"four"


def test_a_manifest_on_a_site_names_files_beside_it(site: Server, tmp_path: Path) -> None:
    folder = tmp_path / "site" / "train"
    (folder / "sub").mkdir(parents=True)
    (folder / "manifest.jsonl").write_text(MANIFEST)
    (folder / "sub" / "b #1.wav").write_bytes(b"four")
    missing, second = listed(f"{url(site)}/train/manifest.jsonl")
    assert second.uri == f"{url(site)}/train/sub/b%20%231.wav#t=1,3"
    assert content_of(second) == b"four"
    assert refusal(missing).code == "unreadable"


def test_a_kaldi_folder_in_a_bucket_is_read(bucket) -> None:
    put(bucket, "data/a.wav")
    bucket.put_object(Key="data/wav.scp", Body=b"one a.wav\n")
    bucket.put_object(Key="data/text", Body=b"one hello you\n")
    for entry in ("s3://calls/data", "s3://calls/data/wav.scp"):
        (recording,) = listed(entry)
        assert (recording.uri, recording.reference) == ("s3://calls/data/a.wav", "hello you")


@pytest.mark.parametrize("line", ["../a.wav", "s3://other/a.wav", "s3://calls/train/../a.wav", "/etc/a.wav"])
def test_a_manifest_in_a_bucket_does_not_leave_its_folder_unless_it_may(bucket, line: str) -> None:
    bucket.put_object(Key="train/manifest.csv", Body=f"path\n{line}\n".encode())
    with pytest.raises(CorpusError, match=r"train/manifest\.csv, line 2: .* is not below the manifest's folder"):
        listed("s3://calls/train/manifest.csv")
    assert len(list(iter_recordings(["s3://calls/train/manifest.csv"], Path("/"), follow_outside=True))) == 1


def test_members_of_a_tar_in_a_bucket_and_on_a_site_are_read_in_place(bucket, site: Server, tmp_path: Path) -> None:
    contents = {f"{number}.wav": bytes([number]) * 300_000 for number in range(1, 4)}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    with tarfile.open(tmp_path / "site/shard.tar", "w") as tar:
        for name in contents:
            tar.add(tmp_path / name, arcname=name)
    bucket.upload_file(str(tmp_path / "site/shard.tar"), "shard.tar")
    for address in ("s3://calls/shard.tar", f"{url(site)}/shard.tar"):
        recordings = listed(address)
        assert [recording.uri for recording in recordings] == [f"{address}!/{name}" for name in contents]
        assert [content_of(recording) for recording in recordings] == list(contents.values())
    bucket.put_object(Key="shard.tar", Body=b"")
    (tmp_path / "site/shard.tar").write_bytes(b"")
    assert {refusal(recording).code for recording in (*recordings, *listed("s3://calls/shard.tar"))} <= {
        "changed",
        "unreadable",
    }


def test_a_worker_process_reads_from_a_bucket(bucket) -> None:
    put(bucket, "a.wav")
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        assert list(pool.map(content_of, listed("s3://calls"))) == [b"four"]
