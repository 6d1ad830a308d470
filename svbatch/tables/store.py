"""The output of a job: a folder of Delta tables, one per task beside `recordings`, `failures` and `runs`.

What a reader sees at all times, also after a kill: whole rows only, never a recording's old and new answers
together, nothing double. What a plain glob `OUTPUT/<table>/*.parquet` sees after `tidy`: exactly the table.
"""

import fcntl
import json
import os
import tempfile
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema, WriterProperties, write_deltalake
from deltalake.exceptions import DeltaError
from deltalake.transaction import AddAction
from pyarrow.dataset import Dataset
from pyarrow.fs import LocalFileSystem, SubTreeFileSystem

from svbatch.errors import BusyError, OutputError
from svbatch.tables.schemas import arrow_schema

PLAN_COLUMNS = ["uri", "recording_id", "size_bytes", "modified_at", "etag", "answered"]
# The log keeps the smallest and largest value of these columns, per file: none that can hold an answer.
STATISTICS_COLUMNS = ["uri", "recording_id", "run_id"]
STATISTICS_COLUMNS += ["modified_at", "annotated_at", "failed_at", "started_at", "ended_at"]
DESCRIPTION = "written by svbatch"  # marks a table as ours: `tidy` touches no other in the folder
MANY_FILES = 64  # of one table; more are compacted when the output is tidied
ZSTD = WriterProperties(compression="ZSTD")
UNFIT_FOR_PATHS = set("%[]^|\\")  # deltalake 1.6 does not find, or panics over, a table whose path has one


class Store:
    """The tables under `output`, which is made if missing. Whatever writes must be called inside `lock`."""

    def __init__(self, output: Path, *, make: bool = True) -> None:
        """make: it will be written, and is made if missing. Raises OutputError if the folder cannot be made or written,
        or Delta cannot bear its name."""
        self.output = output.resolve()
        if unfit := {each for each in str(self.output) if each in UNFIT_FOR_PATHS or not each.isprintable()}:
            raise OutputError(
                f"{str(self.output)!r}: Delta tables cannot lie under a path with {sorted(unfit)}; "
                "give `output` another folder"
            )
        if not make:
            return
        try:
            self.output.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.output):
                pass
        except OSError as error:
            raise OutputError(
                f"{output}: the tables cannot be written there ({error.strerror}); "
                "give `output` a folder that you may write to"
            ) from error

    @contextmanager
    def lock(self, *, shard: str | None = None) -> Iterator[None]:
        """Holds the output for this process, however that ends; BusyError if another one holds it. shard: such as
        "1/3", holds it beside 2/3 and 3/3."""
        path = self.output / (".svbatch.lock" if shard is None else f".svbatch.lock.{shard.replace('/', '-')}")
        try:
            file = path.open("a+")
        except OSError as error:
            raise OutputError(f"{path}: {error.strerror}; remove it, or choose another output") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                holder = file.read() or "unknown"
                raise BusyError(
                    f"{self.output}: process {holder} is writing there; try again when it has ended"
                ) from None
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
            yield

    def prepare(self, tasks: Mapping[str, pa.Schema]) -> None:
        """Makes the tables that are missing, so that each exists (with an empty Parquet file) whatever comes.

        `tasks` gives the schema of each task's table. Raises OutputError where a table has other columns.
        """
        own = {table: arrow_schema(table) for table in ("recordings", "failures", "runs")}
        for table, schema in {**tasks, **own}.items():
            with self._reporting(table):
                self._open(table, schema)
                _add_empty_file_if_none(self.output / table)

    def recordings(self) -> pa.Table:
        """What the plan needs of every recording: the columns PLAN_COLUMNS; empty before the first commit."""
        if not self._exists("recordings"):
            return arrow_schema("recordings").empty_table().select(PLAN_COLUMNS)
        with self._reporting("recordings"):
            return _dataset(DeltaTable(self.output / "recordings"), self.output / "recordings").to_table(PLAN_COLUMNS)

    def read(self, table: str) -> pa.Table:
        """All rows of a table as last committed, in no promised order; OutputError if there is no table."""
        if not self._exists(table):
            raise OutputError(f"{self.output}: there is no table {table}; run a job that has it")
        with self._reporting(table):
            return _dataset(DeltaTable(self.output / table), self.output / table).to_table()

    def commit(self, answers: Mapping[str, pa.Table], failures: pa.Table, recordings: pa.Table) -> None:
        """Puts one batch in the place of what the tables hold of its recordings, however often it is called.

        `recordings` names the batch, one row per uri. `answers` has the rows of every task that the batch was
        asked, by table, also where there are none: what a task no longer answers is gone. Earlier failures of
        these tasks go too, those of other tasks stay. Each table changes atomically, `recordings` last: after
        a kill in between, the batch is not listed as answered, is asked again and replaced.
        """
        uris = recordings["uri"].combine_chunks()
        assert len(uris.unique()) == len(uris), "a recording twice in one batch"
        of_batch = pc.field("uri").isin(uris)
        asked = pc.field("task").isin(pa.array(list(answers), pa.string())) | pc.field("task").is_null()
        for table, rows in answers.items():
            self._replace(table, of_batch, rows)
        self._replace("failures", of_batch & asked, failures)
        self._replace("recordings", of_batch, recordings)

    def append_run(self, row: pa.Table) -> None:
        """Adds a finished run's row to `runs`."""
        with self._reporting("runs"):
            write_deltalake(self._open("runs", row.schema), row, mode="append", writer_properties=ZSTD)

    def tidy(self) -> None:
        """Makes the Parquet files in each table's folder exactly those of the table, as few as is sensible.

        Removes what replacements and killed runs have left, without keeping it for readers of older versions.
        """
        for folder in sorted(path for path in self.output.iterdir() if self._exists(path.name)):
            with self._reporting(folder.name):
                _tidy_table(folder)

    def iter_rows(self, table: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of a table as last committed, a part at a time; nothing where there is no table."""
        if not self._exists(table):
            return
        with self._reporting(table):
            held = _dataset(DeltaTable(self.output / table), self.output / table)
            yield from held.to_batches(columns=list(columns), batch_readahead=2, fragment_readahead=1)

    def of_run(self, table: str, run_id: str, limit: int) -> tuple[int, pa.Table]:
        """How many rows of a table a run has written, and some of them."""
        with self._reporting(table):
            held = _dataset(DeltaTable(self.output / table), self.output / table)
            written = pc.field("run_id") == run_id
            return held.count_rows(filter=written), held.head(limit, filter=written)

    def answers_of(self, recording_ids: Collection[str], tables: Iterable[str]) -> dict[str, pa.Table]:
        """The rows of some recordings' bytes, by table."""
        ids = pa.array(list(recording_ids), pa.string())
        answers = {}
        for table in tables:
            with self._reporting(table):
                held = _dataset(DeltaTable(self.output / table), self.output / table)
                answers[table] = held.to_table(filter=pc.field("recording_id").isin(ids))
        return answers

    def forgotten(self) -> frozenset[str]:
        """The ids of bytes that are never asked again."""
        return frozenset()

    def _replace(self, table: str, gone: pc.Expression, rows: pa.Table) -> None:
        """Puts `rows` in the place of the rows that match `gone`, in one transaction.

        The predicate of a replacement stays in Delta's log, so it names no uri, only recording_ids: those of
        the rows that go and of the rows that come (null, of unreadable files, is one of them). What it
        matches beside, such as the same bytes under another uri, is written back in the same transaction.
        """
        with self._reporting(table):
            delta = self._open(table, rows.schema)
            held = _dataset(delta, self.output / table)
            old_ids = held.to_table(columns=["recording_id"], filter=gone)["recording_id"]
            if len(old_ids) == 0:
                if rows.num_rows:
                    write_deltalake(delta, rows, mode="append", writer_properties=ZSTD)
                return
            ids = pa.chunked_array([*old_ids.chunks, *rows["recording_id"].chunks], pa.string()).unique()
            kept = held.to_table(filter=pc.field("recording_id").isin(ids) & ~gone)
            write_deltalake(
                delta,
                pa.concat_tables([kept, rows]),
                mode="overwrite",
                predicate=_one_of(ids),
                writer_properties=ZSTD,
            )

    def _open(self, table: str, schema: pa.Schema) -> DeltaTable:
        """The table, made if missing; OutputError if something else is in its place or its columns differ."""
        folder = self.output / table
        if not self._exists(table):
            if folder.exists() and any(path.name != "_delta_log" for path in folder.iterdir()):
                raise OutputError(f"{folder}: not a table of svbatch; move it away or choose another output")
            statistics = ",".join(name for name in STATISTICS_COLUMNS if name in schema.names)
            DeltaTable.create(
                folder,
                schema,
                name=table,
                description=DESCRIPTION,
                configuration={"delta.dataSkippingStatsColumns": statistics},
            )
        delta = DeltaTable(folder)
        if delta.schema() != Schema.from_arrow(schema):
            held = pa.schema(delta.schema().to_arrow())
            raise OutputError(
                f"{folder}: the table's columns are not those that svbatch writes "
                f"(held: {_other_columns(held, schema)}; to write: {_other_columns(schema, held)}); "
                "choose another output"
            )
        return delta

    def _exists(self, table: str) -> bool:
        folder = self.output / table
        return (folder / "_delta_log").is_dir() and DeltaTable.is_deltatable(str(folder))

    @contextmanager
    def _reporting(self, table: str) -> Iterator[None]:
        try:
            yield
        except (OSError, DeltaError, pa.ArrowException) as error:
            raise OutputError(
                f"{self.output / table}: cannot be read or written ({_cause(error)}); "
                "what was committed before is safe: mend the cause and run again"
            ) from error


def _dataset(delta: DeltaTable, folder: Path) -> Dataset:
    """The table's files by Arrow's own access to the disk. deltalake's is a Python object, which Arrow's threads may
    let go after the interpreter has ended: that aborts a process which has done its work."""
    return delta.to_pyarrow_dataset(filesystem=SubTreeFileSystem(str(folder), LocalFileSystem()))


def _tidy_table(folder: Path) -> None:
    delta = DeltaTable(folder)
    if delta.metadata().description != DESCRIPTION:
        return
    if len(delta.file_uris()) > MANY_FILES:
        delta.optimize.compact(writer_properties=ZSTD)
    _add_empty_file_if_none(folder)
    delta.update_incremental()
    at_rest = {Path(uri).name for uri in delta.file_uris()}
    if {path.name for path in folder.glob("*.parquet")} - at_rest:  # even an idle vacuum adds to the log
        delta.vacuum(retention_hours=0, enforce_retention_duration=False, dry_run=False, full=True)
    for half_written in list(folder.rglob("*#*")):  # delta-rs writes NAME#1 and renames it
        half_written.unlink()


def _add_empty_file_if_none(folder: Path) -> None:
    """Readers of the plain glob need a file to find the columns in; Delta itself writes none for no rows."""
    delta = DeltaTable(folder)
    if delta.file_uris():
        return
    schema = pa.schema(delta.schema().to_arrow())
    path = folder / f"part-{uuid4()}.parquet"
    pq.write_table(schema.empty_table(), path, compression="zstd")
    size_bytes, modified_ms = path.stat().st_size, path.stat().st_mtime_ns // 1_000_000
    added = AddAction(path.name, size_bytes, {}, modified_ms, True, json.dumps({"numRecords": 0}))
    delta.create_write_transaction([added], "append", delta.schema())


def _one_of(ids: pa.Array) -> str:
    """The condition in SQL that recording_id is among `ids`, of which one may be null."""
    conditions = ["recording_id IS NULL"] if ids.null_count else []
    if texts := ids.drop_null().to_pylist():
        quoted = ", ".join("'" + text.replace("'", "''") + "'" for text in texts)
        conditions.append(f"recording_id IN ({quoted})")
    return " OR ".join(conditions)


def _cause(error: Exception) -> str:
    """An error in one line; deltalake's has several, causes behind arrows, and can go on to quote rows."""
    first, *more = str(error).splitlines()
    return ": ".join([first, *(line.split("\x1b[0m")[-1].strip() for line in more if "↳" in line)])


def _other_columns(schema: pa.Schema, than: pa.Schema) -> str:
    fields = [field for field in schema if field not in list(than)]
    required = {True: "", False: " not null"}
    return ", ".join(f"{field.name} {field.type}{required[field.nullable]}" for field in fields) or "no other"
