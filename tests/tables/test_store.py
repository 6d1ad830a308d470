import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import duckdb
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from batches import WHEN, asr, commit, expected, failures, files_of, recordings, sha256, snapshot, texts, writes
from deltalake import DeltaTable, write_deltalake

from svbatch.tables.schemas import arrow_schema, table_of
from svbatch.tables.store import MANY_FILES, Store

ROOT = Path(__file__).parents[2]
TABLES = ["asr", "failures", "recordings", "runs"]


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


def test_a_changed_file_loses_what_tasks_that_are_not_asked_again_said_of_its_old_bytes(store):
    files = {"/a": "alpha", "/b": "beta"}
    failed = [(uri, said, "second", "cut") for uri, said in files.items()]
    store.commit({"asr": asr(files), "second": asr(files)}, failures(*failed), recordings(files))
    commit(store, {"/a": "changed", "/b": "beta"})
    assert sorted(set(store.read("second")["uri"].to_pylist())) == ["/b"]
    assert store.read("failures")["uri"].to_pylist() == ["/b"]
    assert texts(store) == expected({"/a": "changed", "/b": "beta"})


def test_the_answers_of_bytes_are_found_by_their_hash(store):
    commit(store, {"/a": "same", "/copy": "same", "/b": "beta", "/c": "gamma"})
    found = store.answers_of([sha256("same"), sha256("gamma"), sha256("unknown")], ["asr", "no_such_table"])
    assert list(found) == ["asr"]
    assert found["asr"].schema == arrow_schema("asr")
    assert sorted(found["asr"]["uri"].to_pylist()) == ["/a", "/a", "/c", "/c", "/copy", "/copy"]
    assert store.answers_of([], ["asr"])["asr"].num_rows == 0


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
    columns = ["uri", "recording_id", "size_bytes", "modified_at", "etag", "answered"]
    assert store.recordings().column_names == columns
    with store.lock():
        commit(store, {"/a": "alpha"})
    assert store.recordings().to_pylist() == [
        dict(zip(columns, ["/a", sha256("alpha"), 9, WHEN, None, ["asr@v1"]], strict=True))
    ]


def test_a_process_that_has_read_tables_ends_as_it_should(store):
    """Arrow's threads must hold no Python object when the interpreter ends: one process in seven was aborted."""
    commit(store, {"/a": "alpha"}, failed=[])
    code = "import sys; from pathlib import Path; from svbatch.tables.store import Store; "
    code += "store = Store(Path(sys.argv[1])); store.recordings(); store.read('asr')"
    command = [sys.executable, "-c", code, str(store.output)]
    processes = [subprocess.run(command, capture_output=True, text=True, check=False) for _ in range(25)]
    assert [(each.returncode, each.stderr) for each in processes] == [(0, "")] * 25
