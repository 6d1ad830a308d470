"""The output of a job: a folder of Delta tables, one per task beside `recordings`, `failures` and `runs`.

What a reader sees at all times, also after a kill: whole rows only, never a recording's old and new answers
together, nothing double. What a plain glob `OUTPUT/<table>/*.parquet` sees after `tidy`: exactly the table.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from svbatch.errors import OutputError
from svbatch.tables.delta import Tables, has_schema
from svbatch.tables.folder import Folder
from svbatch.tables.forget import finish_forgetting
from svbatch.tables.hashes import drop_hashes_of_others
from svbatch.tables.lock import Hold, hold
from svbatch.tables.schemas import arrow_schema

LISTED_COLUMNS = ["uri", "recording_id", "size_bytes", "modified_at", "etag", "answered"]
OWN_TABLES = ("recordings", "failures", "runs")
MANY_FILES = 64  # of one table; more are compacted when the output is tidied


class Store:
    """The tables under `output`, a folder or an address such as s3://bucket/out. Whatever writes must be called
    inside `lock`."""

    def __init__(self, output: Path | str, *, make: bool = True) -> None:
        """make: it will be written, and is made if missing. Raises OutputError if the folder cannot be made or written,
        or, where it is only read, is missing, or Delta cannot bear its name."""
        folder = Folder(output, make=make)
        self.output = folder.output
        self.tables = Tables(folder)
        self._is_shard = False

    @contextmanager
    def lock(self, *, shard: str | None = None) -> Iterator[None]:
        """Holds the output for this process, however that ends; BusyError if another one holds it.

        shard: such as "1/3", holds it beside 2/3 and 3/3. Then `tidy` does nothing: it could take a file that another
        shard is about to commit.
        """
        with hold(self.tables.folder, shard) as self.tables.hold:
            self._is_shard = shard is not None
            try:
                yield
            finally:
                self.tables.hold, self._is_shard = Hold(), False

    def prepare(self, tasks: Mapping[str, pa.Schema], *, job: Path | None = None) -> None:
        """Makes the tables that are missing, so that each exists (with an empty Parquet file) whatever comes.

        `tasks` gives the schema of each task's table. Raises OutputError where a table has other columns, with the
        command that migrates it for `job`.
        """
        for table, schema in {**tasks, **{table: arrow_schema(table) for table in OWN_TABLES}}.items():
            self.tables.make(table, schema)
            self._check_schema(table, schema, job)

    def recordings(self) -> pa.Table:
        """Every recording with the columns LISTED_COLUMNS; empty before the first commit."""
        if not self.tables.exists("recordings"):
            return arrow_schema("recordings").empty_table().select(LISTED_COLUMNS)
        return self.tables.read("recordings", LISTED_COLUMNS)

    def read(self, table: str) -> pa.Table:
        """All rows of a table as last committed, in no promised order; OutputError if there is no table."""
        if not self.tables.exists(table):
            raise OutputError(f"{self.output}: there is no table {table}; run a job that has it")
        return self.tables.read(table)

    def answers_of(self, recording_ids: Sequence[str], tables: Sequence[str]) -> dict[str, pa.Table]:
        """The rows of `tables` whose recording_id is one of these, by table: what the same bytes under another uri are
        answered with. A table that does not exist is left out. For a commit under the new uri, replace the column
        `uri` of each, and drop the rows of versions that are not wanted; bytes that are known under two uris have
        their rows twice."""
        wanted = pc.field("recording_id").isin(pa.array(recording_ids, pa.string()))
        return {table: self.tables.read(table, keep=wanted) for table in tables if self.tables.exists(table)}

    def forgotten(self) -> frozenset[str]:
        """The recording_ids that were forgotten: these bytes must not be asked again, under whatever uri."""
        if not self.tables.exists("forgotten"):
            return frozenset()
        return frozenset(self.tables.read("forgotten", ["recording_id"])["recording_id"].to_pylist())

    def commit(self, answers: Mapping[str, pa.Table], failures: pa.Table, recordings: pa.Table) -> None:
        """Puts one batch in the place of what the tables hold of its recordings, however often it is called.

        `recordings` names the batch, one row per uri. `answers` has the rows of every task that the batch was
        asked, by table, also where there are none: what a task no longer answers is gone. Earlier failures of
        these tasks go too, those of other tasks stay, unless they are of other bytes than the recording has now.
        Each table changes atomically, `recordings` last: after a kill in between, the batch is not listed as
        answered, is asked again and replaced.
        """
        uris = recordings["uri"].combine_chunks()
        assert len(uris.unique()) == len(uris), "a recording twice in one batch"
        of_batch = pc.field("uri").isin(uris)
        asked = pc.field("task").isin(pa.array(list(answers), pa.string())) | pc.field("task").is_null()
        for table, rows in answers.items():
            self._replace(table, of_batch, rows)
        self._replace("failures", of_batch & asked, failures)
        self._remove_stale(of_batch, recordings, but=answers)
        self._replace("recordings", of_batch, recordings)

    def iter_rows(self, table: str, columns: Sequence[str]) -> Iterator[pa.RecordBatch]:
        """Some columns of a table as last committed, a part at a time; nothing where there is no table."""
        if not self.tables.exists(table):
            return
        with self.tables.reporting(table):
            yield from self.tables.dataset(table).to_batches(
                columns=list(columns), batch_readahead=2, fragment_readahead=1
            )

    def of_run(self, table: str, run_id: str, limit: int) -> tuple[int, pa.Table]:
        """How many rows of a table a run has written, and some of them."""
        with self.tables.reporting(table):
            held = self.tables.dataset(table)
            written = pc.field("run_id") == run_id
            return held.count_rows(filter=written), held.head(limit, filter=written)

    def append_run(self, row: pa.Table) -> None:
        """Adds a finished run's row to `runs`."""
        self.tables.make("runs", row.schema)
        self.tables.append("runs", row)

    def tidy(self) -> None:
        """Makes the Parquet files in each table's folder exactly those of the table, as few as is sensible, and
        finishes what a killed `forget` began. Nothing under the lock of a shard.

        Removes what replacements and killed runs have left, without keeping it for readers of older versions.
        """
        if self._is_shard:
            return
        finish_forgetting(self.tables)
        tables = self.tables.names()
        for table in tables:
            if len(self.tables.files(table)) > MANY_FILES:
                self.tables.compact(table)
            self.tables.rest(table)
        drop_hashes_of_others(self.tables.folder, tables)

    def _replace(self, table: str, gone: pc.Expression, rows: pa.Table) -> None:
        if not self.tables.exists(table):
            self.tables.make(table, rows.schema)
        self._check_schema(table, rows.schema, None)
        self.tables.replace(table, gone, rows)

    def _remove_stale(self, of_batch: pc.Expression, recordings: pa.Table, *, but: Collection[str]) -> None:
        """Removes what other tasks said of bytes that the recordings of a batch no longer have."""
        if not self.tables.exists("recordings"):
            return
        now = dict(zip(*(recordings[name].to_pylist() for name in ("uri", "recording_id")), strict=True))
        held = self.tables.read("recordings", ["uri", "recording_id"], of_batch).to_pylist()
        changed = pa.array([row["uri"] for row in held if row["recording_id"] != now[row["uri"]]], pa.string())
        if len(changed) == 0:
            return
        for table in sorted({*self.tables.names()} - {*but, *OWN_TABLES, "forgotten"}):
            self.tables.replace(table, pc.field("uri").isin(changed), self.tables.schema(table).empty_table())
        of_others = ~pc.field("task").isin(pa.array(list(but), pa.string()))
        of_changed = pc.field("uri").isin(changed) & of_others
        self.tables.replace("failures", of_changed, arrow_schema("failures").empty_table())

    def _check_schema(self, table: str, schema: pa.Schema, job: Path | None) -> None:
        if has_schema(self.tables.delta(table), schema):
            return
        held = self.tables.schema(table)
        raise OutputError(
            f"{self.tables.folder.address_of(table)}: the table's columns are not those that svbatch writes "
            f"(held: {other_columns(held, schema)}; to write: {other_columns(schema, held)}); "
            f"`svbatch migrate {job or 'JOB'} --output {self.output}` brings it up to date"
        )


def other_columns(schema: pa.Schema, than: pa.Schema) -> str:
    """The columns of `schema` that `than` has not, or otherwise."""
    fields = [field for field in schema if field not in list(than)]
    required = {True: "", False: " not null"}
    return ", ".join(f"{field.name} {field.type}{required[field.nullable]}" for field in fields) or "no other"
