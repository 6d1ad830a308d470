"""Many small files made few, and what is left over removed: what a run does by itself, but not beside other shards."""

from dataclasses import dataclass

from svbatch.tables.forget import finish_forgetting
from svbatch.tables.store import Store


@dataclass(frozen=True)
class Compacted:
    """A table and its number of files before and after."""

    table: str
    before: int
    after: int


def compact(store: Store) -> list[Compacted]:
    """Makes each table one file, or as few as files of a sensible size allow; finishes a `forget` that was cut off."""
    finish_forgetting(store.tables)
    return [_compact(store, table) for table in store.tables.names()]


def _compact(store: Store, table: str) -> Compacted:
    before = len(store.tables.files(table))
    if before > 1:
        store.tables.compact(table)
    store.tables.rest(table)
    return Compacted(table, before, len(store.tables.files(table)))
