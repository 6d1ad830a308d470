"""Tables of an older svbatch, or of a task whose columns changed, brought to the columns of today.

Where every old column is kept and the new ones can be null or an empty list, the rows stay. Otherwise the table moves
aside: a copy under another name, and an empty one in its place, whose recordings are asked again. Each table changes
in one transaction, and what comes before it can be done twice, so a kill costs nothing and the command is repeated.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.compute as pc

from svbatch.tables.delta import has_schema
from svbatch.tables.forget import finish_forgetting
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import OWN_TABLES, Store


@dataclass(frozen=True)
class Migrated:
    """A table that was changed; `aside` is the table that holds its old rows, None where it holds them itself."""

    table: str
    aside: str | None


def migrate(store: Store, tasks: Mapping[str, pa.Schema]) -> list[Migrated]:
    """Brings the tables of these tasks, and svbatch's own, to the schemas given and in the contracts."""
    finish_forgetting(store.tables)
    own = {table: arrow_schema(table) for table in (*OWN_TABLES, "forgotten")}
    existing = {table: schema for table, schema in {**own, **tasks}.items() if store.tables.exists(table)}
    changed = [
        _migrate(store, table, schema)
        for table, schema in existing.items()
        if not has_schema(store.tables.delta(table), schema)
    ]
    for table in store.tables.names():
        store.tables.rest(table)
    return changed


def _migrate(store: Store, table: str, schema: pa.Schema) -> Migrated:
    tables = store.tables
    if _fits(tables.schema(table), schema) and not _has_nulls(store, table, schema):
        batches = (_widened(batch, schema) for batch in tables.dataset(table).to_batches())
        tables.overwrite(table, pa.RecordBatchReader.from_batches(schema, batches))
        return Migrated(table, None)
    aside = f"{table}.until-{tables.delta(table).version()}"
    tables.make(aside, tables.schema(table))
    held = tables.dataset(table)
    tables.overwrite(aside, pa.RecordBatchReader.from_batches(held.schema, held.to_batches()))
    if table not in OWN_TABLES and tables.exists("recordings"):
        _ask_again(store, table)
    tables.overwrite(table, schema.empty_table())
    return Migrated(table, aside)


def _fits(held: pa.Schema, wanted: pa.Schema) -> bool:
    """Whether each held column is wanted with its type, and each new one has something to begin with."""
    kept = all(field.name in wanted.names and wanted.field(field.name).type == field.type for field in held)
    new = [field for field in wanted if field.name not in held.names]
    return kept and all(field.nullable or pa.types.is_list(field.type) for field in new)


def _has_nulls(store: Store, table: str, wanted: pa.Schema) -> bool:
    """Whether a column that must not be null any more is."""
    held = store.tables.schema(table)
    tighter = [f.name for f in wanted if not f.nullable and f.name in held.names and held.field(f.name).nullable]
    return any(store.tables.dataset(table).count_rows(filter=pc.field(name).is_null()) for name in tighter)


def _widened(batch: pa.RecordBatch, schema: pa.Schema) -> pa.RecordBatch:
    def column(field: pa.Field) -> pa.Array:
        if field.name in batch.schema.names:
            return batch.column(field.name)
        if field.nullable:
            return pa.nulls(batch.num_rows, field.type)
        return pa.array([[]] * batch.num_rows, field.type)

    return pa.record_batch([column(field) for field in schema], schema=schema)


def _ask_again(store: Store, task: str) -> None:
    """Takes a task from what recordings are answered for."""
    rows = store.tables.read("recordings")
    left = [[key for key in keys if key.partition("@")[0] != task] for keys in rows["answered"].to_pylist()]
    if left != rows["answered"].to_pylist():
        column = rows.schema.get_field_index("answered")
        field = rows.schema.field(column)
        store.tables.overwrite("recordings", rows.set_column(column, field, pa.array(left, field.type)))
