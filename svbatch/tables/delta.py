"""Delta tables in a folder: made, read, replaced by recording, and their files brought to rest.

The only place that knows deltalake. Names no table and knows no contract but the column `recording_id`.
"""

import io
import json
import random
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from uuid import uuid4

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from deltalake import DeltaTable, Schema, WriterProperties, write_deltalake
from deltalake.exceptions import CommitFailedError, DeltaError
from deltalake.transaction import AddAction
from pyarrow.dataset import Dataset

from svbatch.errors import BusyError, OutputError
from svbatch.tables.folder import Folder
from svbatch.tables.hashes import keep_hashes, mend_hashes
from svbatch.tables.lock import Hold

# The log keeps the smallest and largest value of these columns, per file, so that a commit finds the files of its
# recordings without opening the others. None can hold an answer; what has uris is removed when one is forgotten.
STATISTICS_COLUMNS = ["uri", "recording_id", "run_id"]
STATISTICS_COLUMNS += ["modified_at", "annotated_at", "failed_at", "started_at", "ended_at"]
DESCRIPTION = "written by svbatch"  # marks a table as ours: no other in the folder is touched
ZSTD = WriterProperties(compression="ZSTD")
CONFLICTS = 24  # that one commit lives through, of shards that write the same table
PAUSE_S = 5.0  # at most, before the next try
LOG_ENTRY = re.compile(r"(\d{20})\.")


class Tables:
    """The tables of an output that svbatch has made. `hold` is the lock that a writer has, if any."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.hold = Hold()

    def names(self) -> list[str]:
        """All tables of ours."""
        return [name for name in self.folder.folders() if self.exists(name) and self.is_ours(name)]

    def exists(self, table: str) -> bool:
        """Whether there is a Delta table, whoever has made it."""
        address = self.folder.address_of(table)
        if self.folder.path and not (Path(address) / "_delta_log").is_dir():
            return False
        with self.reporting(table):
            return bool(DeltaTable.is_deltatable(address, self.folder.storage_options))

    def delta(self, table: str) -> DeltaTable:
        """A table as it is now; OutputError if it cannot be read."""
        with self.reporting(table):
            return DeltaTable(self._address(table), storage_options=self.folder.storage_options)

    def schema(self, table: str) -> pa.Schema:
        return pa.schema(self.delta(table).schema().to_arrow())

    def dataset(self, table: str) -> Dataset:
        """A table's rows as they are now, unread."""
        return self._dataset(self.delta(table), table)

    def read(self, table: str, columns: list[str] | None = None, keep: pc.Expression | None = None) -> pa.Table:
        with self.reporting(table):
            return self.dataset(table).to_table(columns, filter=keep)

    def make(self, table: str, schema: pa.Schema) -> None:
        """Makes a table, with an empty Parquet file, where there is none. OutputError if something else is there;
        BusyError as of `replace`."""
        with self.reporting(table):
            self._until_committed(table, lambda: self._make_once(table, schema))

    def _make_once(self, table: str, schema: pa.Schema) -> None:
        if not self.exists(table):
            path = self.folder.path and self.folder.path / table
            others = path and path.exists() and any(each.name != "_delta_log" for each in path.iterdir())
            if others and not self.exists(table):  # asked again: a shard may have just made it
                raise OutputError(f"{path}: not a table of svbatch; move it away or choose another output")
            statistics = ",".join(name for name in STATISTICS_COLUMNS if name in schema.names)
            DeltaTable.create(
                self._address(table),
                schema,
                mode="ignore",
                name=table,
                description=DESCRIPTION,
                configuration={"delta.dataSkippingStatsColumns": statistics},
                storage_options=self.folder.storage_options,
            )
        self.refuse_torn_log(table)
        self._add_empty_file_if_none(table)

    def append(self, table: str, rows: pa.Table) -> None:
        with self.reporting(table):
            self.hold.check()
            with self._committing(table) as delta:
                write_deltalake(delta, rows, mode="append", writer_properties=ZSTD)

    def overwrite(self, table: str, rows: pa.Table | pa.RecordBatchReader) -> None:
        """Puts `rows` in the place of all, under their schema, in one transaction."""
        with self.reporting(table):
            self.hold.check()
            with self._committing(table) as delta:
                write_deltalake(delta, rows, mode="overwrite", schema_mode="overwrite", writer_properties=ZSTD)

    def replace(self, table: str, gone: pc.Expression, rows: pa.Table) -> None:
        """Puts `rows` in the place of the rows that match `gone`, in one transaction. BusyError if others committed
        CONFLICTS times while it tried to."""

        def commit() -> None:
            with self._committing(table) as delta:
                self._replace_once(delta, table, gone, rows)

        with self.reporting(table):
            self._until_committed(table, commit)

    def _until_committed(self, table: str, commit: Callable[[], None]) -> None:
        """When another shard has committed at the same time, it is tried again after a pause that grows, by chance so
        that two do not meet again."""
        for turn in range(CONFLICTS):
            self.hold.check()
            try:
                return commit()
            except CommitFailedError:
                time.sleep(random.uniform(0, min(PAUSE_S, 0.05 * 2**turn)))
        raise BusyError(
            f"{self.folder.address_of(table)}: others have committed there {CONFLICTS} times while this batch "
            "tried to; what was committed is kept: run again"
        )

    def compact(self, table: str) -> None:
        """Makes few files of many."""
        with self.reporting(table):
            self.hold.check()
            with self._committing(table) as delta:
                delta.optimize.compact(writer_properties=ZSTD)

    def rest(self, table: str) -> None:
        """Removes every Parquet file that is not of the table now, and what was half written; keeps the hashes of the
        others.

        By name, not by vacuum: that goes by the files' times, which a clock set back has made wrong."""
        with self.reporting(table):
            self.hold.check()
            self._add_empty_file_if_none(table)
            self.folder.remove(self.leftovers(table))
            mend_hashes(self.folder, table, self.files(table))

    def leftovers(self, table: str) -> dict[str, str]:
        """Files in the table's folder that are not of it, with why: what its log does not name, and what a killed
        writer left on a disk (delta-rs writes NAME#1 and renames it)."""
        names = sorted(self.folder.sizes(table))
        at_rest = {f"{table}/{name}" for name in self.files(table)}
        found = [name for name in names if name.endswith(".parquet") and "/_delta_log/" not in name]
        left = {name: "not in the table's log" for name in found if name not in at_rest}
        return left | {name: "half written" for name in names if "#" in PurePosixPath(name).name}

    def files(self, table: str) -> list[str]:
        """Names of the table's Parquet files, by its log."""
        with self.reporting(table):
            return [PurePosixPath(uri).name for uri in self.delta(table).file_uris()]

    def forget_log(self, table: str) -> None:
        """Removes all log entries but the last, which a checkpoint stands in for."""
        with self.reporting(table):
            self.hold.check()
            delta = self.delta(table)
            delta.create_checkpoint()
            entries = {name: self._version(name) for name in self.folder.sizes(f"{table}/_delta_log")}
            old = {name: version for name, version in entries.items() if version is not None}
            self.folder.remove(sorted(name for name, version in old.items() if version < delta.version()))

    @contextmanager
    def reporting(self, table: str) -> Iterator[None]:
        """Turns errors of disk, store, Delta and Arrow into an OutputError of one line."""
        try:
            yield
        except (OSError, DeltaError, pa.ArrowException) as error:
            raise OutputError(
                f"{self.folder.address_of(table)}: cannot be read or written ({_cause(error)}); "
                "what was committed before is safe: mend the cause and run again"
            ) from error

    @contextmanager
    def _committing(self, table: str) -> Iterator[DeltaTable]:
        """A table to commit to; then the hashes of the files that have come are kept, those of other shards among
        them."""
        delta = self.delta(table)
        before = set(delta.file_uris())
        yield delta
        keep_hashes(self.folder, table, [PurePosixPath(uri).name for uri in {*delta.file_uris()} - before])

    def _replace_once(self, delta: DeltaTable, table: str, gone: pc.Expression, rows: pa.Table) -> None:
        """The predicate of a replacement stays in Delta's log, so it names no uri, only recording_ids: those of the
        rows that go and of the rows that come (null, of unreadable files, is one of them). What it matches beside,
        such as the same bytes under another uri, is written back in the same transaction."""
        held = self._dataset(delta, table)
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

    def _address(self, table: str) -> Path | str:
        return self.folder.path / table if self.folder.path else self.folder.address_of(table)

    def is_ours(self, table: str) -> bool:
        """Whether svbatch has made it; OutputError if its log is damaged."""
        self.refuse_torn_log(table)
        return bool(self.delta(table).metadata().description == DESCRIPTION)

    def _dataset(self, delta: DeltaTable, table: str) -> Dataset:
        return delta.to_pyarrow_dataset(filesystem=self.folder.filesystem(table))

    def refuse_torn_log(self, table: str) -> None:
        """OutputError if the last entry of a table's log is no entry: deltalake takes an empty one for a commit of
        nothing, and what was committed with it would be lost without a word."""
        entries = [name for name in self.folder.sizes(f"{table}/_delta_log") if name.endswith(".json")]
        if not entries:
            return
        last = max(entries)
        try:
            actions = [json.loads(line) for line in (self.folder.read(last) or b"").splitlines()]
        except ValueError:
            actions = []
        if not any("commitInfo" in action for action in actions):
            raise OutputError(
                f"{self.folder.address_of(last)}: the last entry of the table's log is damaged; put it back from a "
                "backup, or remove it and the folder `recordings` beside the table: then the next run asks everything "
                "again, and replaces it"
            )

    def _version(self, entry: str) -> int | None:
        found = LOG_ENTRY.match(PurePosixPath(entry).name)
        return int(found[1]) if found else None

    def _add_empty_file_if_none(self, table: str) -> None:
        """Readers of the plain glob need a file to find the columns in; Delta itself writes none for no rows."""
        delta = self.delta(table)
        if delta.file_uris():
            return
        content = io.BytesIO()
        pq.write_table(pa.schema(delta.schema().to_arrow()).empty_table(), content, compression="zstd")
        name, now_ms = f"part-{uuid4()}.parquet", int(datetime.now(UTC).timestamp() * 1000)
        self.folder.write(f"{table}/{name}", content.getvalue())
        added = AddAction(name, content.tell(), {}, now_ms, True, json.dumps({"numRecords": 0}))
        try:
            delta.create_write_transaction([added], "append", delta.schema())
        except CommitFailedError:  # another shard has made the table at the same time
            self.folder.remove([f"{table}/{name}"])
            raise
        keep_hashes(self.folder, table, [name])


def has_schema(delta: DeltaTable, schema: pa.Schema) -> bool:
    """Whether a table has just these columns."""
    return bool(delta.schema() == Schema.from_arrow(schema))


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
