import hashlib
import os
import random
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from deltalake import DeltaTable, write_deltalake

from svbatch.errors import BusyError, OutputError
from svbatch.tables.schemas import arrow_schema, table_of
from svbatch.tables.store import MANY_FILES, Store

ROOT = Path(__file__).parents[2]
WHEN = datetime(2026, 1, 2, 3, 4, 5, 678901, tzinfo=UTC)
TABLES = ["asr", "failures", "recordings", "runs"]


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def asr(files, version="v1"):
    """Two segments per recording of `files` (uri -> its bytes as text), the bytes being what is said."""
    return table_of("asr", [
        {"uri": uri, "recording_id": sha256(said), "channel": None, "start": start, "end": start + 1,
         "text": said, "words": [{"word": said, "start": start, "end": start + 1}], "num_tokens": 3,
         "avg_logprob": -0.5, "finish_reason": "stop", "no_speech_probability": 0.1, "via": "recogniser",
         "task_version": version, "run_id": "run", "annotated_at": WHEN}
        for uri, said in files.items() for start in (0.0, 1.0)
    ])  # fmt: skip


def recordings(files):
    """One row per recording; the bytes None could not be read."""
    return table_of("recordings", [
        {"uri": uri, "recording_id": said and sha256(said), "size_bytes": 9, "modified_at": WHEN,
         "duration": 2.0, "sample_rate": 16_000, "channels": 1, "num_segments": 2,
         "status": "annotated" if said else "failed", "answered": ["asr@v1"], "run_id": "run",
         "annotated_at": WHEN}
        for uri, said in files.items()
    ])  # fmt: skip


def failures(*failed):
    """One row per (uri, bytes, task, code)."""
    return table_of("failures", [
        {"uri": uri, "recording_id": said and sha256(said), "channel": None, "start": None, "end": None,
         "task": task, "task_version": task and "v1", "stage": "decode", "code": code,
         "message": f"{uri} failed", "run_id": "run", "failed_at": WHEN}
        for uri, said, task, code in failed
    ])  # fmt: skip


def commit(store, files, version="v1", failed=()):
    read = {uri: said for uri, said in files.items() if said}
    store.commit({"asr": asr(read, version)}, failures(*failed), recordings(files))


def texts(store):
    return sorted((row["uri"], row["start"], row["text"]) for row in store.read("asr").to_pylist())


def expected(files):
    return sorted((uri, start, said) for uri, said in files.items() for start in (0.0, 1.0))


def writes(store, table):
    """What the log says of each write, newest first."""
    history = DeltaTable(store.output / table).history()
    return [each["operationParameters"] for each in history if each["operation"] == "WRITE"]


def snapshot(store, table):
    """Names of the table's files, by its log."""
    return sorted(Path(uri).name for uri in DeltaTable(store.output / table).file_uris())


def files_of(store, table):
    return sorted(path.name for path in (store.output / table).iterdir() if path.name != "_delta_log")


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "out")
    with store.lock():
        store.prepare({"asr": arrow_schema("asr")})
        yield store


def test_recordings_that_the_table_does_not_hold_are_appended(store):
    commit(store, {"/a": "alpha", "/b": "beta"})
    commit(store, {"/c": "gamma"})
    assert texts(store) == expected({"/a": "alpha", "/b": "beta", "/c": "gamma"})
    assert [write["mode"] for write in writes(store, "asr")][:2] == ["Append", "Append"]


def test_the_same_batch_committed_twice_leaves_nothing_double(store):
    for _ in range(2):
        commit(store, {"/a": "alpha", "/b": "beta"}, failed=[("/b", "beta", "asr", "cut")])
    assert texts(store) == expected({"/a": "alpha", "/b": "beta"})
    assert store.read("recordings")["uri"].to_pylist() == ["/a", "/b"]
    assert store.read("failures")["uri"].to_pylist() == ["/b"]


def test_a_changed_file_loses_its_old_rows_and_costs_no_other(store):
    commit(store, {"/a": "alpha", "/b": "beta"})
    commit(store, {"/a": "changed", "/c": "gamma"})
    assert texts(store) == expected({"/a": "changed", "/b": "beta", "/c": "gamma"})
    assert store.recordings().sort_by("uri")["recording_id"].to_pylist() == [
        sha256(said) for said in ("changed", "beta", "gamma")
    ]


def test_a_task_answered_anew_loses_its_old_rows_also_where_none_follow(store):
    commit(store, {"/a": "alpha", "/b": "beta"})
    store.commit({"asr": asr({"/a": "alpha"}, "v2")}, failures(), recordings({"/a": "alpha", "/b": "beta"}))
    assert store.read("asr")["task_version"].to_pylist() == ["v2", "v2"]
    assert texts(store) == expected({"/a": "alpha"})


def test_the_same_bytes_under_two_uris_are_two_recordings(store):
    commit(store, {"/a": "same", "/copy": "same"})
    commit(store, {"/a": "same"}, version="v2")
    assert texts(store) == expected({"/a": "same", "/copy": "same"})
    commit(store, {"/a": "other"})
    assert texts(store) == expected({"/a": "other", "/copy": "same"})
    commit(store, {"/copy": "other"})
    assert texts(store) == expected({"/a": "other", "/copy": "other"})


def test_unreadable_recordings_are_replaced_one_by_one(store):
    commit(store, {"/a": None, "/b": None}, failed=[(uri, None, None, "unreadable") for uri in ("/a", "/b")])
    commit(store, {"/a": None}, failed=[("/a", None, None, "empty")])
    assert sorted(store.read("failures").select(["uri", "code"]).to_pylist(), key=str) == [
        {"uri": "/a", "code": "empty"},
        {"uri": "/b", "code": "unreadable"},
    ]
    commit(store, {"/a": "mended"})
    assert store.read("failures")["uri"].to_pylist() == ["/b"]
    assert sorted(store.recordings()["uri"].to_pylist()) == ["/a", "/b"]
    assert texts(store) == expected({"/a": "mended"})


def test_failures_of_tasks_that_were_not_asked_stay(store):
    old = [("/a", "alpha", "asr", "cut"), ("/a", "alpha", "other", "cut"), ("/a", "alpha", None, "late")]
    commit(store, {"/a": "alpha"}, failed=old)
    commit(store, {"/a": "alpha"})
    assert store.read("failures")["task"].to_pylist() == ["other"]


@pytest.mark.parametrize("uri", ["/it's", '/"quoted"', "/grüße/録音.wav", "/" + "long" * 900, "/new\nline"])
def test_any_uri_is_replaced(store, uri):
    neighbours = {uri + "1": "one", uri + "0": "zero"}
    commit(store, {uri: "alpha", **neighbours})
    commit(store, {uri: "changed"})
    assert texts(store) == expected({uri: "changed", **neighbours})


def test_a_batch_of_thousands_is_replaced(store):
    files = {f"/{number}": str(number) for number in range(2_000)}
    commit(store, files)
    commit(store, files, version="v2")
    assert store.read("asr")["task_version"].to_pylist() == ["v2"] * 4_000


def test_a_recording_twice_in_one_batch_is_our_bug(store):
    twice = pa.concat_tables([recordings({"/a": "alpha"})] * 2)
    with pytest.raises(AssertionError):
        store.commit({}, failures(), twice)


def test_an_empty_table_exists_and_has_its_columns(store):
    for table in TABLES:
        assert store.read(table).num_rows == 0
        assert store.read(table).schema == arrow_schema(table)
        assert pl.read_parquet(store.output / table / "*.parquet").columns == arrow_schema(table).names
        assert duckdb.sql(f"FROM '{store.output}/{table}/*.parquet'").columns == arrow_schema(table).names
    commit(store, {"/a": "alpha"})
    store.commit({"asr": asr({})}, failures(), recordings({"/a": "alpha"}))
    store.tidy()
    assert pl.read_parquet(store.output / "asr/*.parquet").shape == (0, len(arrow_schema("asr")))


def test_every_reader_sees_the_same_rows_with_their_types(store):
    rows = asr({"/a": "alpha", "/b": "beta"})
    polars_rows = pl.from_arrow(rows).rows()
    commit(store, {"/a": "alpha", "/b": "beta"})
    glob = str(store.output / "asr" / "*.parquet")
    assert store.read("asr").sort_by([("uri", "ascending"), ("start", "ascending")]) == rows
    for frame in (pl.scan_delta(str(store.output / "asr")), pl.scan_parquet(glob)):
        assert frame.sort("uri", "start").collect().rows() == polars_rows
    by_duckdb = duckdb.sql(f"SELECT * FROM read_parquet('{glob}') ORDER BY uri, start")
    assert by_duckdb.to_arrow_table().to_pylist() == rows.to_pylist()
    assert pl.read_parquet(glob)["annotated_at"].dtype == pl.Datetime("us", "UTC")


def test_the_plain_glob_is_exactly_the_table_after_tidy(store):
    for said in ("one", "two", "three"):
        commit(store, {"/a": said, "/b": "beta", said: said})
    files = {"/a": "three", "/b": "beta", "one": "one", "two": "two", "three": "three"}
    assert len(pl.read_parquet(store.output / "asr/*.parquet")) > 2 * len(files)
    store.tidy()
    for table in TABLES:
        seen = pl.read_parquet(store.output / table / "*.parquet").rows()
        assert sorted(seen, key=str) == sorted(pl.from_arrow(store.read(table)).rows(), key=str)
        assert files_of(store, table) == snapshot(store, table)
    assert texts(store) == expected(files)


def test_tidy_with_nothing_to_do_writes_nothing(store):
    commit(store, {"/a": "alpha"})
    commit(store, {"/a": "beta"})
    store.tidy()
    before = [DeltaTable(store.output / table).version() for table in TABLES]
    store.tidy()
    assert [DeltaTable(store.output / table).version() for table in TABLES] == before


def test_many_small_files_become_few(store):
    files = {f"/{number}": str(number) for number in range(MANY_FILES + 1)}
    for uri, said in files.items():
        write_deltalake(store.output / "asr", asr({uri: said}), mode="append")
    store.tidy()
    assert len(files_of(store, "asr")) == 1
    assert texts(store) == expected(files)


def test_tidy_leaves_what_is_not_of_svbatch_alone(store):
    write_deltalake(store.output / "theirs", pa.table({"a": [1]}))
    write_deltalake(store.output / "theirs", pa.table({"a": [2]}), mode="overwrite")
    (store.output / "notes.txt").write_text("mine")
    before = files_of(store, "theirs")
    store.tidy()
    assert files_of(store, "theirs") == before
    assert (store.output / "notes.txt").exists()


def test_no_text_and_no_uri_of_a_replacement_is_left_in_the_log(store):
    files = {"/a": "unspeakable", "/b": "unspeakable too", "/private/it's": "secret"}
    for version in ("v1", "v2"):
        commit(store, files, version, failed=[("/private/it's", "secret", "asr", "unmentionable")])
    write_deltalake(store.output / "asr", asr({"/d": "unspeakable"}), mode="append")
    DeltaTable(store.output / "asr").optimize.compact()
    DeltaTable(store.output / "asr").create_checkpoint()
    parquet = store.output.rglob("_delta_log/*.parquet")
    checkpoints = [str(pq.read_table(path).to_pylist()) for path in parquet]
    commits = [path.read_text() for path in store.output.rglob("_delta_log/*.json")]
    assert checkpoints
    for content in checkpoints + commits:
        assert "unspeakable" not in content
        assert "unmentionable" not in content
    predicates = [write["predicate"] for write in writes(store, "asr") if "predicate" in write]
    assert len(predicates) == 1
    assert sha256("secret") in predicates[0]
    assert "private" not in predicates[0]


def test_a_run_is_one_row_of_runs(store):
    row = {
        "run_id": "run", "started_at": WHEN, "ended_at": WHEN + timedelta(seconds=5), "job": "/job.yaml",
        "bundle": "mini", "device": None, "precision": None, "recordings": 3, "annotated": 0, "unchanged": 3,
        "empty": 0, "failed": 0, "audio_seconds": 0.0, "exit_code": 0, "version": "0.1.0",
    }  # fmt: skip
    store.append_run(table_of("runs", [row]))
    store.append_run(table_of("runs", [{**row, "run_id": "next"}]))
    assert sorted(store.read("runs")["run_id"].to_pylist()) == ["next", "run"]


def test_the_plan_reads_only_its_columns(tmp_path):
    store = Store(tmp_path)
    assert store.recordings().num_rows == 0
    columns = ["uri", "recording_id", "size_bytes", "modified_at", "answered"]
    assert store.recordings().column_names == columns
    with store.lock():
        commit(store, {"/a": "alpha"})
    assert store.recordings().to_pylist() == [
        dict(zip(columns, ["/a", sha256("alpha"), 9, WHEN, ["asr@v1"]], strict=True))
    ]


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
from test_store import commit
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
            keys = store.read("asr").select(["uri", "start"]).to_pylist()
            assert len(keys) == len({tuple(key.values()) for key in keys})
            store.tidy()
            commit(store, {"/a": "after", "/b": "beta"})
            store.tidy()
            assert texts(store)[-4:] == expected({"/a": "after", "/b": "beta"})
            assert files_of(store, "asr") == snapshot(store, "asr")


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
    with pytest.raises(OutputError, match=r"asr: .*held: no other; to write: extra int32 not null.*choose"):
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
