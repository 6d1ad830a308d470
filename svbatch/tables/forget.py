"""Forgetting: what an output holds of some recordings is gone, from its tables, their logs and their statistics.

A note of what is to go is written first and removed last, so that a killed `forget` is finished by whatever writes
next. What stays is a tombstone in `forgotten`: the hash of the bytes, and when.
"""

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from datetime import UTC, datetime

import pyarrow as pa
import pyarrow.compute as pc

from svbatch.errors import OutputError
from svbatch.tables.delta import Tables
from svbatch.tables.schemas import arrow_schema, table_of

NOTE = ".svbatch-forget.json"
STAND_IN = "(forgotten)"
SPAN_MARK = "#t="  # between the uri of a source and that of a span of it


@dataclass(frozen=True)
class Forgotten:
    """What is forgotten: `uris` are all under which the tables held the bytes `recording_ids`."""

    recording_ids: frozenset[str]
    uris: frozenset[str]


def forget(tables: Tables, wanted: Collection[str]) -> Forgotten:
    """Removes everything about some recordings; `wanted` are uris, also of sources with spans, or recording_ids.

    The same bytes go under whatever uri they are known. Raises OutputError naming what the tables do not know, and
    then changes nothing.
    """
    finish_forgetting(tables)
    found = _found(tables, wanted)
    note = {"recording_ids": sorted(found.recording_ids), "uris": sorted(found.uris)}
    tables.folder.write(NOTE, json.dumps(note).encode())
    finish_forgetting(tables)
    return found


def finish_forgetting(tables: Tables) -> None:
    """Does what the note says, from the start, and removes it. Nothing where there is none."""
    tables.folder.remove(name for name in tables.folder.files() if name.startswith(f"{NOTE}#"))  # half written
    content = tables.folder.read(NOTE)
    if content is None:
        return
    note = json.loads(content)
    found = Forgotten(frozenset(note["recording_ids"]), frozenset(note["uris"]))
    _add_tombstones(tables, found.recording_ids)
    of_forgotten = pc.field("recording_id").isin(_texts(found.recording_ids)) | pc.field("uri").isin(_texts(found.uris))
    for table in tables.names():
        schema = tables.schema(table)
        if "uri" in schema.names:
            tables.replace(table, of_forgotten, schema.empty_table())
    for table, columns in {"failures": ["message"], "runs": ["job"]}.items():
        if tables.exists(table):
            _blank(tables, table, columns, found.uris)
    for table in tables.names():
        tables.rest(table)
        tables.forget_log(table)
    tables.folder.remove([NOTE])


def unforget(tables: Tables, recording_ids: Collection[str]) -> None:
    """Lifts tombstones; the next run asks these bytes again. OutputError naming those that are not forgotten."""
    known = tables.read("forgotten")["recording_id"].to_pylist() if tables.exists("forgotten") else []
    if unknown := sorted(set(recording_ids) - set(known)):
        raise OutputError(f"{tables.folder.output}: not forgotten: {', '.join(unknown)}")
    schema = arrow_schema("forgotten")
    tables.replace("forgotten", pc.field("recording_id").isin(_texts(recording_ids)), schema.empty_table())
    tables.rest("forgotten")
    tables.forget_log("forgotten")


def _found(tables: Tables, wanted: Collection[str]) -> Forgotten:
    """All recording_ids and uris of what is wanted, from all tables: a killed run may have left rows in any."""
    pairs: set[tuple[str, str | None]] = set()
    for table in tables.names():
        if "uri" in tables.schema(table).names:
            known = tables.read(table, ["uri", "recording_id"]).group_by(["uri", "recording_id"]).aggregate([])
            pairs.update(zip(known["uri"].to_pylist(), known["recording_id"].to_pylist(), strict=True))
    names = {name for uri, digest in pairs for name in (uri, digest, uri.split(SPAN_MARK)[0])}
    if unknown := sorted(set(wanted) - names):
        raise OutputError(f"{tables.folder.output}: no recording is known as {', '.join(map(repr, unknown))}")
    direct = {pair for pair in pairs if {*pair, pair[0].split(SPAN_MARK)[0]} & set(wanted)}
    digests = {digest for _, digest in direct if digest}
    return Forgotten(
        frozenset(digests), frozenset(uri for uri, digest in pairs if digest in digests or (uri, digest) in direct)
    )


def _add_tombstones(tables: Tables, recording_ids: Collection[str]) -> None:
    tables.make("forgotten", arrow_schema("forgotten"))
    known = set(tables.read("forgotten")["recording_id"].to_pylist())
    now = datetime.now(UTC)
    new = [{"recording_id": each, "forgotten_at": now} for each in sorted(set(recording_ids) - known)]
    if new:
        tables.append("forgotten", table_of("forgotten", new))


def _blank(tables: Tables, table: str, columns: list[str], uris: Collection[str]) -> None:
    """Puts STAND_IN in the place of these uris where text columns of other rows mention them."""
    alternatives = "|".join(re.escape(uri) for uri in sorted(uris, key=len, reverse=True))
    mention = re.compile(rf"(?:{alternatives})(?!\.?[\w#/%-])")
    rows = tables.read(table)
    blanked = [
        row | {column: row[column] and mention.sub(STAND_IN, row[column]) for column in columns}
        for row in rows.to_pylist()
    ]
    if blanked != rows.to_pylist():
        tables.overwrite(table, pa.Table.from_pylist(blanked, schema=rows.schema))


def _texts(values: Collection[str]) -> pa.Array:
    return pa.array(sorted(values), pa.string())
