import pyarrow as pa
import pytest
from batches import asr, commit, expected, recordings, texts
from deltalake import write_deltalake

from svbatch.errors import OutputError
from svbatch.tables.migrate import Migrated, migrate
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store
from svbatch.tables.verify import verify

TASKS = {"asr": arrow_schema("asr")}
FILES = {"/a": "alpha", "/b": "beta"}


def without(table, columns):
    return table.drop_columns(columns)


@pytest.fixture
def old(tmp_path):
    """An output of a version that knew no `via`, and no `metadata` and `etag` of recordings."""
    store = Store(tmp_path / "out")
    with store.lock():
        store.tables.make("asr", without(asr(FILES), ["words"]).schema)
        store.tables.append("asr", without(asr(FILES), ["words"]))
        store.tables.make("recordings", without(recordings(FILES), ["metadata", "etag"]).schema)
        store.tables.append("recordings", without(recordings(FILES), ["metadata", "etag"]))
        for table in ("failures", "runs"):
            store.tables.make(table, arrow_schema(table))
    return store


def test_an_old_table_is_refused_with_the_command_that_migrates_it(old, tmp_path):
    with pytest.raises(OutputError, match=rf"words.*; `svbatch migrate jobs/a.yaml --output {old.output}` brings"):
        old.prepare(TASKS, job="jobs/a.yaml")


def test_new_columns_that_can_be_null_or_an_empty_list_are_added_and_all_rows_stay(old):
    with old.lock():
        assert migrate(old, TASKS) == [Migrated("recordings", None), Migrated("asr", None)]
        old.prepare(TASKS)
        assert texts(old) == expected(FILES)
        assert old.read("asr")["words"].to_pylist() == [None] * 4
        assert old.read("recordings")["metadata"].to_pylist() == [[], []]
        assert old.read("recordings").schema == arrow_schema("recordings")
        assert migrate(old, TASKS) == []
        commit(old, {"/a": "changed"})
        old.tidy()
        assert texts(old) == expected(FILES | {"/a": "changed"})
    assert verify(old) == []


def test_a_table_that_cannot_keep_its_rows_moves_aside_and_is_asked_again(old):
    """An answer of another type, as of a task that was changed."""
    fields = [f if f.name != "text" else pa.field("number", pa.int64(), nullable=False) for f in arrow_schema("asr")]
    before = old.read("asr").to_pylist()
    with old.lock():
        changed = migrate(old, {"asr": pa.schema(fields)})
        [aside] = [each.aside for each in changed if each.table == "asr"]
        assert old.read(aside).to_pylist() == before
        assert old.read("asr").num_rows == 0
        assert old.read("asr").schema == pa.schema(fields)
        assert old.recordings()["answered"].to_pylist() == [[], []]
        assert old.tables.names() == sorted(["asr", aside, "failures", "recordings", "runs"])
    assert verify(old) == []


def test_a_column_that_must_not_be_null_any_more_keeps_rows_only_where_none_is(tmp_path):
    store = Store(tmp_path / "out")
    loose = pa.schema([pa.field("uri", pa.string()), pa.field("n", pa.int64())])
    tight = pa.schema([pa.field("uri", pa.string()), pa.field("n", pa.int64(), nullable=False)])
    for table, values in {"full": [1, 2], "holes": [1, None]}.items():
        store.tables.make(table, loose)
        store.tables.append(table, pa.table({"uri": ["/a", "/b"], "n": values}, schema=loose))
    aside = f"holes.until-{store.tables.delta('holes').version()}"
    assert migrate(store, {"full": tight, "holes": tight}) == [Migrated("full", None), Migrated("holes", aside)]
    assert store.read("full")["n"].to_pylist() == [1, 2]
    assert store.read(aside)["n"].to_pylist() == [1, None]


def test_what_was_moved_aside_is_forgotten_too(old):
    from svbatch.tables.forget import forget

    fields = [field for field in arrow_schema("asr") if field.name != "text"]
    with old.lock():
        migrate(old, {"asr": pa.schema(fields)})
        [aside] = set(old.tables.names()) - {"asr", "failures", "recordings", "runs"}
        forget(old.tables, ["/a"])
        assert set(old.read(aside)["uri"].to_pylist()) == {"/b"}


def test_a_table_of_somebody_else_is_not_touched(old):
    write_deltalake(old.output / "theirs", pa.table({"a": [1]}))
    with old.lock():
        migrate(old, TASKS)
    assert old.read("theirs").column_names == ["a"]
