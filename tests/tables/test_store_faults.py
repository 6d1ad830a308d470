import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import polars as pl
import pyarrow as pa
import pytest
from batches import asr, commit, expected, failures, files_of, recordings, snapshot, texts

from svbatch.errors import BusyError, OutputError
from svbatch.tables.forget import forget
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.status import status
from svbatch.tables.store import Store
from svbatch.tables.verify import files_without_hash, verify

ROOT = Path(__file__).parents[2]


def test_a_commit_that_stops_before_recordings_is_mended_by_the_next(store):
    commit(store, {"/a": "alpha", "/b": "beta"})
    unwritable = recordings({"/a": "second", "/c": "gamma"}).append_column("extra", pa.array([1, 2]))
    with pytest.raises(OutputError):
        store.commit({"asr": asr({"/a": "second", "/c": "gamma"})}, failures(), unwritable)
    assert texts(store) == expected({"/a": "second", "/b": "beta", "/c": "gamma"})
    assert sorted(store.recordings()["uri"].to_pylist()) == ["/a", "/b"]
    commit(store, {"/a": "third", "/c": "gamma"})
    assert texts(store) == expected({"/a": "third", "/b": "beta", "/c": "gamma"})
    assert sorted(store.recordings()["uri"].to_pylist()) == ["/a", "/b", "/c"]


ENDLESS = """
import sys
from pathlib import Path
sys.path.append(sys.argv[2])
from batches import commit
from svbatch.tables.store import Store

store = Store(Path(sys.argv[1]))
with store.lock():
    print("locked", flush=True)
    for turn in range(10_000):
        commit(store, {"/a": f"turn {turn}", "/b": "beta", f"/{turn % 7}": "gamma"})  # digits sort before a
        if turn % 5 == 4:
            store.tidy()
"""


def start_endless(output):
    """A process that holds the lock of `output` and commits until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, str(output), str(Path(__file__).parent)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    with process.stdout as printed:
        assert printed.readline() == b"locked\n"
    return process


def test_kill_at_any_moment_leaves_nothing_double_and_nothing_half(tmp_path):
    store = Store(tmp_path)
    chance = random.Random(0)
    for _ in range(3):
        process = start_endless(tmp_path)
        time.sleep(0.2 + 0.5 * chance.random())
        process.kill()
        process.wait()
        with store.lock():
            store.prepare({"asr": arrow_schema("asr")})  # as every run does
            keys = store.read("asr").select(["uri", "start"]).to_pylist()
            assert len(keys) == len({tuple(key.values()) for key in keys})
            store.tidy()
            commit(store, {"/a": "after", "/b": "beta"})
            store.tidy()
            assert texts(store)[-4:] == expected({"/a": "after", "/b": "beta"})
            assert files_of(store, "asr") == snapshot(store, "asr")
            assert files_without_hash(store) == 0


def test_what_a_killed_writer_left_is_removed(store):
    commit(store, {"/a": "alpha"})
    before = files_of(store, "asr")
    for name in ("part-0.parquet", "part-1.parquet#1", "_delta_log/00000000000000000009.json#1"):
        (store.output / "asr" / name).write_bytes(b"half")
    store.tidy()
    assert files_of(store, "asr") == before
    assert list((store.output / "asr").rglob("*#*")) == []


def test_an_output_held_by_another_process_is_busy_until_that_is_killed(tmp_path):
    process = start_endless(tmp_path)
    store = Store(tmp_path)
    with pytest.raises(BusyError, match=f"process {process.pid} is writing there; try again"), store.lock():
        pass
    process.kill()
    process.wait()
    with store.lock(), pytest.raises(BusyError, match=str(os.getpid())), Store(tmp_path).lock():
        pass


def test_an_output_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "out").write_text("mine")
    for output in (tmp_path / "out", tmp_path / "out" / "below"):
        with pytest.raises(OutputError, match=r"out.*cannot be written there .*; give `output` a folder"):
            Store(output)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_an_output_in_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    for output in (tmp_path, tmp_path / "out"):
        with pytest.raises(OutputError, match=r"cannot be written there .*Permission denied"):
            Store(output)
    tmp_path.chmod(0o700)


@pytest.mark.parametrize("name", ["50%", "a[1]", "a|b", "tab\t"])
def test_an_output_whose_name_delta_cannot_bear_is_refused(tmp_path, name):
    with pytest.raises(OutputError, match="cannot lie under a path with"):
        Store(tmp_path / name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["with space", "grüße", "a#b?c", "it's", "sub/../other"])
def test_an_output_may_have_any_other_name(tmp_path, name):
    (tmp_path / "sub").mkdir()
    store = Store(tmp_path / name)
    with store.lock():
        for said in ("one", "two"):
            commit(store, {"/a": said})
        store.tidy()
    assert texts(store) == expected({"/a": "two"})
    assert len(pl.read_parquet(list((tmp_path / name).glob("asr/*.parquet")))) == 2


def test_a_folder_that_is_no_table_is_refused_and_kept(tmp_path):
    store = Store(tmp_path)
    (tmp_path / "asr").mkdir()
    (tmp_path / "asr" / "mine.parquet").write_text("mine")
    with pytest.raises(OutputError, match="asr: not a table of svbatch; move it away"):
        store.prepare({"asr": arrow_schema("asr")})
    store.tidy()
    assert (tmp_path / "asr" / "mine.parquet").read_text() == "mine"


def test_a_table_with_other_columns_is_refused_and_names_them(store):
    wider = arrow_schema("asr").append(pa.field("extra", pa.int32(), nullable=False))
    with pytest.raises(
        OutputError, match=r"asr: .*held: no other; to write: extra int32 not null.*`svbatch migrate JOB --output "
    ):
        store.prepare({"asr": wider})


def test_a_damaged_table_is_an_error_in_one_line(store):
    commit(store, {"/a": "alpha"})
    for path in (store.output / "asr").glob("*.parquet"):
        path.write_bytes(b"PAR1 garbage PAR1")
    with pytest.raises(OutputError, match=r"^[^\n]*asr: cannot be read or written[^\n]*$"):
        store.read("asr")
    with pytest.raises(OutputError, match="there is no table nothing"):
        store.read("nothing")


def test_tables_and_store_import_no_model():
    command = "import svbatch.tables.store, sys; sys.exit({'torch', 'transformers'} & set(sys.modules) or 0)"
    subprocess.run([sys.executable, "-c", command], cwd=ROOT, check=True)


def test_a_lock_that_cannot_be_opened_is_an_error_of_the_output(tmp_path):
    (tmp_path / ".svbatch.lock").mkdir()
    with pytest.raises(OutputError, match=r"lock: Is a directory; remove it"), Store(tmp_path).lock():
        pass


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 400 KiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=400k", "svbatch", folder]).returncode:
        pytest.skip("only root may mount a small disk")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def fill_up(store, committed):
    for number in range(200):
        files = {f"/{number}": random.Random(number).randbytes(3_000).hex()}
        commit(store, files)
        committed |= files


def test_a_full_disk_is_an_error_and_loses_no_committed_row(small_disk):
    store = Store(small_disk / "out")
    committed = {}
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        with pytest.raises(OutputError, match=r"^[^\n]*cannot be read or written[^\n]*space[^\n]*$"):
            fill_up(store, committed)
    assert 0 < len(committed) < 200
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        store.tidy()
        listed = store.recordings()["uri"].to_pylist()
        assert sorted(listed) == sorted(committed)
        assert [row for row in texts(store) if row[0] in committed] == expected(committed)
        subprocess.run(["mount", "-o", "remount,size=8m", small_disk], check=True)
        again = {f"/{number}": random.Random(number).randbytes(3_000).hex() for number in range(len(committed) + 3)}
        commit(store, again)
        store.tidy()
    assert texts(store) == expected(again)
    assert verify(store) == []


def test_a_disk_that_may_only_be_read_can_be_verified_and_is_not_written(small_disk):
    store = Store(small_disk / "out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        commit(store, {"/a": "alpha"})
        store.tidy()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    reading = Store(small_disk / "out", make=False)
    assert verify(reading) == []
    assert "1 recordings" in status(reading)
    with pytest.raises(OutputError, match=r"cannot be written there .Read-only file system"):
        Store(small_disk / "out")


def test_files_from_the_future_are_tidied_as_others_after_the_clock_was_set_back(store):
    commit(store, {"/a": "alpha", "/b": "beta"})
    (store.output / "asr" / "part-0.parquet").write_bytes(b"left by a killed run")
    in_ten_days = time.time() + 864_000
    for path in store.output.rglob("*"):
        os.utime(path, (in_ten_days, in_ten_days))
    commit(store, {"/a": "changed"})
    store.tidy()
    assert files_of(store, "asr") == snapshot(store, "asr")
    forget(store.tables, ["/a"])
    assert texts(store) == expected({"/b": "beta"})
    assert sorted(path.name[:20] for path in (store.output / "asr" / "_delta_log").glob("*.json"))[1:] == []


@pytest.mark.parametrize("content", [b"", b"garbage", b"{}", None])
def test_a_damaged_last_log_entry_is_refused_by_name_and_mended_as_the_message_says(store, content):
    """None: it is cut in half."""
    commit(store, {"/a": "alpha"})
    commit(store, {"/b": "beta"})
    entry = max((store.output / "asr" / "_delta_log").glob("*.json"))
    entry.write_bytes(entry.read_bytes()[: entry.stat().st_size // 2] if content is None else content)
    for command in (lambda: store.prepare({"asr": arrow_schema("asr")}), store.tidy):
        with pytest.raises(OutputError, match=rf"{entry}: the last entry of the table's log is damaged; put it back"):
            command()
    entry.unlink()
    shutil.rmtree(store.output / "recordings")
    store.prepare({"asr": arrow_schema("asr")})
    store.tidy()
    assert store.recordings().num_rows == 0  # everything is asked again
    commit(store, {"/a": "alpha", "/b": "beta"})
    store.tidy()
    assert texts(store) == expected({"/a": "alpha", "/b": "beta"})
