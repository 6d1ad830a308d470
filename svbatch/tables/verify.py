"""Is an output whole? Every file against its table's log and its hash, every table against its contract and its key,
and the tables against one another. Changes nothing.

Not covered: a changed byte that still decodes, in a file whose hash is not kept yet; and whether answers are right.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from svbatch.errors import BusyError, OutputError
from svbatch.tables.contracts import KEY, read_contract
from svbatch.tables.delta import has_schema
from svbatch.tables.forget import NOTE
from svbatch.tables.hashes import HASHES, SUFFIX, hashed_files, kept_hashes
from svbatch.tables.lock import holders
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import OWN_TABLES, Store

SHOWN = 3  # of the recordings that a problem is about


def verify(store: Store) -> list[str]:
    """What is wrong, a line each. BusyError while another process writes."""
    _refuse_if_held(store)
    problems = list(_problems(store))
    if problems:
        _refuse_if_held(store)  # what was found may be half of a commit
    return problems


def files_without_hash(store: Store) -> int:
    """How many files could not be compared with a hash: of a commit that was killed, or of an older svbatch. That is
    no damage."""
    folder, tables = store.tables.folder, store.tables
    return sum(len({*tables.files(table)} - hashed_files(folder, table)) for table in tables.names())


def _refuse_if_held(store: Store) -> None:
    if held := holders(store.tables.folder):
        raise BusyError(f"{store.output}: {', '.join(held)} is writing there; verify when it has ended")


def _problems(store: Store) -> Iterator[str]:
    folders = store.tables.folder.folders()
    tables = []
    for table in (each for each in folders if store.tables.exists(each)):
        try:
            if store.tables.is_ours(table):
                tables.append(table)
        except OutputError as error:
            yield str(error)
    yield from (f"{table}: the table is missing" for table in OWN_TABLES if table not in folders)
    yield from (
        f"{table}: files without a log; nothing says what they hold" for table in OWN_TABLES
        if table in folders and not store.tables.exists(table)
    )  # fmt: skip
    if store.tables.folder.read(NOTE) is not None:
        yield f"{NOTE}: `forget` was cut off; the next run finishes it, or `svbatch compact`"
    readable = []
    for table in tables:
        found = [*_file_problems(store, table)]
        yield from found
        if not found:
            readable.append(table)
            yield from _column_problems(store, table)
            yield from _key_problems(store, table)
    if "recordings" in readable and "failures" in readable:
        yield from _count_problems(store, readable)
    if "runs" in readable:
        yield from _run_problems(store)


def _file_problems(store: Store, table: str) -> Iterator[str]:
    """Each file of the log is there, with the bytes that it had, and can be read; and there is none beside."""
    tables = store.tables
    try:
        sizes = tables.folder.sizes(table)
        added = pa.table(tables.delta(table).get_add_actions(flatten=True)).to_pylist()
        schema = tables.schema(table)
        left = tables.leftovers(table)
        hashes = kept_hashes(tables.folder, table)
    except OutputError as error:
        yield str(error)
        return
    for each in added:
        name = f"{table}/{each['path']}"
        if name not in sizes:
            yield f"{name}: missing, with {each['num_records']} rows"
        elif sizes[name] != each["size_bytes"]:
            yield f"{name}: {sizes[name]} bytes, but {each['size_bytes']} were committed"
        elif problem := _hash_problem(store, name, hashes) or _content_problem(store, table, each, schema):
            yield f"{name}: {problem}"
    yield from (f"{name}: {what}; the next run removes it, or `svbatch compact`" for name, what in sorted(left.items()))


def _hash_problem(store: Store, name: str, hashes: dict[str, str | None]) -> str | None:
    file = name.partition("/")[2]
    if file not in hashes:
        return None
    kept, held = hashes[file], store.tables.folder.sha256(name)
    if kept is None:
        return f"the record of its hash, {HASHES}/{name}{SUFFIX}, is damaged; remove that, and the next run writes it"
    if held != kept:
        return f"other bytes than were committed (SHA-256 {held}, committed {kept}); put it back from a backup"
    return None


def _content_problem(store: Store, table: str, added: dict[str, Any], schema: pa.Schema) -> str | None:
    """Reads all of a file."""
    try:
        with store.tables.folder.filesystem(table).open_input_file(added["path"]) as file:
            parquet = pq.ParquetFile(file)
            num_rows = 0
            for batch in parquet.iter_batches():
                batch.validate(full=True)
                num_rows += batch.num_rows
            held = parquet.schema_arrow
    except (OSError, pa.ArrowException, ValueError) as error:
        return f"cannot be read ({str(error).splitlines()[0]})"
    if num_rows != added["num_records"]:
        return f"{num_rows} rows, but {added['num_records']} were committed"
    if {field.name: field.nullable for field in held} != {field.name: field.nullable for field in schema}:
        return f"columns {held.names}, but the table has {schema.names}"
    return None


def _column_problems(store: Store, table: str) -> Iterator[str]:
    """svbatch's own tables are as their contracts say; a task's has the common columns."""
    if table in (*OWN_TABLES, "forgotten"):
        if not has_schema(store.tables.delta(table), arrow_schema(table)):
            yield f"{table}: other columns than its contract says; `svbatch migrate` brings it up to date"
    elif missing := {"uri", "recording_id", *KEY, "task_version"} - set(store.tables.schema(table).names):
        yield f"{table}: no column {', '.join(sorted(missing))}"


def _key_problems(store: Store, table: str) -> Iterator[str]:
    key = key_of(table)
    names = store.tables.schema(table).names
    if not set(key) <= set(names):
        return
    rows = _frame(store, table, key).group_by(key).len().filter(pl.col("len") > 1).collect()
    if len(rows):
        yield f"{table}: {len(rows)} keys more than once, such as {rows.row(0)}"


def key_of(table: str) -> list[str]:
    """The columns that tell a table's rows apart."""
    if table not in (*OWN_TABLES, "forgotten"):
        return KEY
    contract = read_contract(table)["schema"][0]
    primary = [column["name"] for column in contract["properties"] if column.get("primaryKey")]
    return primary or list(contract["quality"][0]["arguments"]["properties"])


def _count_problems(store: Store, tables: Sequence[str]) -> Iterator[str]:
    """Each row is of a recording as it was last answered, and each answered recording has rows or failures."""
    recordings = _frame(store, "recordings", ["uri", "recording_id", "num_segments", "status", "answered"]).collect()
    failures = _frame(store, "failures", ["uri", "task", "task_version"]).collect()
    answered = recordings.lazy().explode("answered").drop_nulls("answered").collect()
    parts = pl.col("answered").str.split_exact("@", 1).struct.rename_fields(["task", "task_version"])
    answered = answered.with_columns(parts.alias("of")).unnest("of")
    yield from _named("failures: rows of recordings that `recordings` does not list", _unlisted(failures, recordings))
    failed = recordings.filter(pl.col("status") == "failed")
    whole = failures.filter(pl.col("task").is_null())
    yield from _named("recordings: failed, but without a row in `failures`", failed.join(whole, "uri", "anti")["uri"])
    for task in sorted({*answered["task"], *tables} - {*OWN_TABLES, "forgotten"}):
        if "." in task:  # moved aside by `migrate`
            continue
        of_task = answered.filter(pl.col("task") == task)
        if task not in tables:
            if not store.tables.exists(task):
                yield from _named(f"{task}: the table is missing, but it answered recordings", of_task["uri"])
            continue
        yield from _task_problems(store, task, of_task, recordings, failures.filter(pl.col("task") == task))


def _task_problems(
    store: Store, task: str, answered: pl.DataFrame, recordings: pl.DataFrame, failures: pl.DataFrame
) -> Iterator[str]:
    columns = ["uri", "recording_id", "task_version"]
    rows = _frame(store, task, columns).unique().collect()
    yield from _named(f"{task}: rows of recordings that `recordings` does not list", _unlisted(rows, recordings))
    known = rows.join(recordings.select("uri"), "uri", "semi")
    other = known.join(recordings, ["uri", "recording_id"], "anti")
    yield from _named(f"{task}: rows of other bytes than `recordings` has", other["uri"])
    on = ["uri", "task_version"]
    unanswered = known.join(answered, on, "anti").join(failures, on, "anti")  # what was heard in part is asked again
    yield from _named(f"{task}: rows of versions that `recordings` does not list as answered", unanswered["uri"])
    of_speech = answered.filter(pl.col("num_segments") > 0)
    lost = of_speech.join(rows, on, "anti").join(failures, on, "anti")
    yield from _named(f"{task}: neither rows nor failures of recordings that were answered", lost["uri"])


def _run_problems(store: Store) -> Iterator[str]:
    parts = ["annotated", "empty", "failed", "unchanged"]
    rows = _frame(store, "runs", ["run_id", "recordings", *parts]).collect()
    for row in rows.filter(pl.col("recordings") != pl.sum_horizontal(parts)).iter_rows(named=True):
        said = " + ".join(f"{row[part]} {part}" for part in parts)
        yield f"runs: {row['run_id']} has {row['recordings']} recordings, but {said}"


def _unlisted(rows: pl.DataFrame, recordings: pl.DataFrame) -> pl.Series:
    return rows.join(recordings, "uri", "anti")["uri"]


def _named(problem: str, uris: pl.Series) -> Iterator[str]:
    found = uris.unique().sort()
    if len(found):
        more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
        yield f"{problem}: {', '.join(found.head(SHOWN))}{more}; the next run asks them again, if the corpus has them"


def _frame(store: Store, table: str, columns: Sequence[str]) -> pl.LazyFrame:
    frame = pl.from_arrow(store.tables.read(table, list(columns)))
    assert isinstance(frame, pl.DataFrame)
    return frame.lazy()
