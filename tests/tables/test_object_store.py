"""An output in an object store: moto's server, on this machine."""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pytest
from batches import asr, commit, expected, recordings, texts
from test_kill import KEYS, SVBATCH, job_of, rows
from test_shards import ROOT, start, write

from svbatch.errors import BusyError, OutputError
from svbatch.tables import lock
from svbatch.tables.compact import compact
from svbatch.tables.forget import forget
from svbatch.tables.migrate import migrate
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.status import status
from svbatch.tables.store import Store
from svbatch.tables.verify import files_without_hash, verify


@pytest.fixture
def remote(bucket):
    store = Store(f"{bucket}/out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        yield store


def names(store):
    return sorted(store.tables.folder.sizes(""))


def test_batches_are_committed_replaced_tidied_and_read(remote):
    for word in ("one", "two"):
        commit(remote, {"/a": word, "/b": "beta"}, failed=[("/b", "beta", "asr", "cut")])
    assert texts(remote) == expected({"/a": "two", "/b": "beta"})
    assert remote.recordings()["uri"].sort().to_pylist() == ["/a", "/b"]
    remote.tidy()
    for table in remote.tables.names():
        at_rest = {f"{table}/{name}" for name in remote.tables.files(table)}
        assert {name for name in names(remote) if name.endswith(".parquet") and name.startswith(f"{table}/")} == at_rest
    address = f"{remote.output}/asr"
    for frame in (pl.scan_delta(address), pl.scan_parquet(f"{address}/*.parquet")):
        assert len(frame.collect()) == 4


@pytest.mark.slow
def test_it_is_looked_after_as_on_a_disk(bucket):
    store = Store(f"{bucket}/out")
    with store.lock():
        store.tables.make("asr", asr({}).drop_columns(["words"]).schema)
        store.tables.append("asr", asr({"/a": "alpha", "/b": "beta"}).drop_columns(["words"]))
        assert [each.table for each in migrate(store, {"asr": arrow_schema("asr")})] == ["asr"]
        store.prepare({"asr": arrow_schema("asr")})
        commit(store, {"/a": "alpha"})
        commit(store, {"/b": "beta"})
        assert forget(store.tables, ["/a"]).uris == {"/a"}
        assert {each.after for each in compact(store)} == {1}
    assert texts(store) == expected({"/b": "beta"})
    assert verify(store) == []
    assert files_without_hash(store) == 0
    [file] = store.tables.files("asr")
    store.tables.folder.write(f"_hashes/asr/{file}.sha256", f"{'0' * 64}  asr/{file}\n".encode())
    assert [each.split(" (")[0] for each in verify(store)] == [f"asr/{file}: other bytes than were committed"]
    store.tables.folder.remove([f"_hashes/asr/{file}.sha256"])
    assert "1 recordings" in status(store)
    assert [name for name in names(store) if name.startswith(".svbatch")] == []
    orphan = f"{bucket}/out/asr/part-0.parquet"
    store.tables.folder.write("asr/part-0.parquet", b"left by a killed run")
    assert [each.split(":")[0] for each in verify(store)] == [orphan.removeprefix(f"{bucket}/out/")]
    with store.lock():
        store.tidy()
    assert verify(store) == []


@pytest.mark.slow
def test_two_shards_write_it_at_the_same_time(bucket):
    write(f"{bucket}/out", num_shards=2, turns=2, batches=5)


def test_one_alone_or_each_shard_once(remote):
    address = remote.output
    for shard in (None, "1/2"):
        with pytest.raises(BusyError, match=r"process \d+ on .* is writing there; try again"):
            Store(address).lock(shard=shard).__enter__()
    other = f"{address}-2"
    with Store(other).lock(shard="1/2"):
        for shard in (None, "1/2", "2/3"):
            with pytest.raises(BusyError, match=r"\(shard 1/2\) is writing there"):
                Store(other).lock(shard=shard).__enter__()
        with Store(other).lock(shard="2/2"):
            pass
    assert names(Store(other)) == []


def test_a_lock_that_is_not_renewed_is_stale_by_the_stores_own_clock(bucket, monkeypatch):
    address = f"{bucket}/out"
    process = start(address, "1/2", 1000, 5)
    assert process.stdout.readline() == "locked\n"
    process.kill()
    process.communicate()
    with pytest.raises(BusyError, match="shard 1/2"):
        Store(address).lock().__enter__()
    monkeypatch.setattr(lock, "EXPIRY_S", 1.0)
    monkeypatch.setattr("time.time", lambda: 0.0)  # this machine's clock is not asked
    time.sleep(2.1)
    with Store(address).lock():
        pass
    assert [name for name in names(Store(address)) if name.endswith(".lock")] == []


@pytest.mark.slow
def test_a_lock_is_renewed_while_it_is_held(bucket, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY_S", 2.0)
    monkeypatch.setattr(lock, "RENEWED_S", 0.3)
    store = Store(f"{bucket}/out")
    with store.lock():
        time.sleep(4)
        store.tables.hold.check()
        with pytest.raises(BusyError):
            Store(f"{bucket}/out").lock().__enter__()


@pytest.mark.slow
def test_who_has_lost_its_lock_commits_no_more(bucket, monkeypatch):
    monkeypatch.setattr(lock, "RENEWED_S", 0.3)
    store = Store(f"{bucket}/out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        store.tables.folder.write(lock.ALONE, b'{"holder": "process 1 on another"}')
        time.sleep(1)
        with pytest.raises(BusyError, match="the lock could not be renewed"):
            commit(store, {"/a": "alpha"})
    assert texts(store) == []
    assert store.tables.folder.read(lock.ALONE) is not None


@pytest.mark.parametrize("address", ["ftp://host/out", "s3:///", "s3://bucket/a b", "gs://bucket/out"])
def test_an_address_that_cannot_be_an_output_is_refused(address):
    with pytest.raises(OutputError, match=r"s3://bucket/out|cannot lie under a path with"):
        Store(address)


def test_a_bucket_that_does_not_exist_is_an_error_in_one_line(object_store, monkeypatch):
    for name, value in object_store.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(OutputError, match=r"^s3://no-such-bucket/out[^\n]*$"), Store("s3://no-such-bucket/out").lock():
        pass


KILLED = """
import sys
sys.path.append(sys.argv[2])
from batches import commit
from svbatch.tables import lock
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store

store = Store(sys.argv[1])
with store.lock():
    store.prepare({"asr": arrow_schema("asr")})
    store.tidy()
    print("locked", flush=True)
    for turn in range(10_000):
        commit(store, {"/a": f"turn {turn}", "/b": "beta"})
        store.tidy()
"""


@pytest.mark.slow
def test_ten_kills_leave_nothing_double_and_nothing_half(bucket, monkeypatch):
    monkeypatch.setattr(lock, "EXPIRY_S", 3.0)
    monkeypatch.setattr(lock, "RENEWED_S", 0.3)
    code = KILLED.replace("store = Store(", "lock.EXPIRY_S, lock.RENEWED_S = 3.0, 0.3\nstore = Store(", 1)
    store = Store(f"{bucket}/out")
    for turn in range(10):
        process = subprocess.Popen(
            [sys.executable, "-c", code, store.output, str(Path(__file__).parent)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
        )
        assert process.stdout.readline() == b"locked\n"
        time.sleep(0.1 + 0.15 * turn)
        process.kill()
        process.communicate()
        time.sleep(4.1)
        with store.lock():
            store.prepare({"asr": arrow_schema("asr")})
            commit(store, {"/a": "after", "/b": "beta"})
            store.tidy()
            assert texts(store) == expected({"/a": "after", "/b": "beta"})
        assert verify(store) == []
        assert files_without_hash(store) == 0


@pytest.mark.slow
def test_a_run_killed_ten_times_gives_the_rows_of_one_on_a_disk_that_was_not(bucket, tmp_path, tiny_bundle, bursts):
    job = job_of(60, tmp_path, tiny_bundle, bursts)
    soon = "import svbatch.tables.lock as lock\nlock.EXPIRY_S, lock.RENEWED_S = 3.0, 0.3\nfor line in sys.stdin:"
    job.code = SVBATCH.replace("for line in sys.stdin:", soon, 1)
    chance = random.Random(10)
    with job.runner() as run:
        assert run(3600)[0] == 3
        undisturbed = {table: rows(job.store.read(table)) for table in KEYS}
        path = tmp_path / "job.yaml"
        path.write_text(path.read_text().replace("output: out/", f"output: {bucket}/out"))
        (tmp_path / "asked").unlink()
        store = Store(f"{bucket}/out")
        for _ in range(10):
            assert run(chance.uniform(0.3, 3.0))[0] == -9
            for table in KEYS.keys() & set(store.tables.names()):
                keys = [tuple(row.values()) for row in store.read(table).select(KEYS[table]).to_pylist()]
                assert len(keys) == len(set(keys)), f"{table}: a key twice"
            time.sleep(4.1)  # until its lock has expired
        assert run(3600)[0] in (0, 3)
    assert {table: rows(store.read(table)) for table in KEYS} == undisturbed
    assert verify(store) == []
    assert files_without_hash(store) == 0
    print(f"10 kills, 60 recordings; asked {job.num_asked}")


def test_recordings_of_an_empty_output_are_none(bucket):
    assert Store(f"{bucket}/out").recordings().num_rows == recordings({}).num_rows
