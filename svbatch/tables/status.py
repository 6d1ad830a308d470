"""What an output holds, in figures; reads only what the tables are now."""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from svbatch.tables.forget import NOTE
from svbatch.tables.lock import holders
from svbatch.tables.store import OWN_TABLES, Store


def status(store: Store) -> str:
    """Several lines of text, without a trailing line break."""
    return "\n".join(_lines(store))


def _lines(store: Store) -> Iterator[str]:
    tables = store.tables.names()
    if "recordings" not in tables:
        yield f"{store.output}: no output of svbatch yet"
        return
    recordings = store.tables.read("recordings", ["status", "answered", "duration"])
    hours = (pc.sum(recordings["duration"]).as_py() or 0.0) / 3600
    yield f"{store.output}: {len(recordings)} recordings, {hours:.1f} hours{_counted(recordings['status'])}"
    yield from (f"{holder} is writing" for holder in holders(store.tables.folder))
    if store.tables.folder.read(NOTE) is not None:
        yield "`forget` was cut off; the next run finishes it, or `svbatch compact`"
    yield f"\n{'table':20}{'rows':>12}{'files':>8}{'MB':>10}   answered"
    answered = Counter(key.partition("@")[0] for row in recordings["answered"].to_pylist() for key in row)
    for table in tables:
        yield _table_line(store, table, "" if table in OWN_TABLES else f"{answered[table]} of {len(recordings)}")
    if "failures" in tables:
        failures = store.tables.read("failures", ["stage", "code"])
        yield from _failure_lines(failures)
    if "runs" in tables and (runs := store.tables.read("runs").to_pylist()):
        yield _run_line(max(runs, key=lambda row: row["started_at"]), len(runs))


def _table_line(store: Store, table: str, answered: str) -> str:
    added = pa.table(store.tables.delta(table).get_add_actions(flatten=True))
    num_rows, size_bytes = (pc.sum(added[name]).as_py() or 0 for name in ("num_records", "size_bytes"))
    answered = "" if table == "forgotten" or "." in table else answered
    return f"{table:20}{num_rows:12}{len(added):8}{size_bytes / 1e6:10.1f}   {answered}".rstrip()


def _failure_lines(failures: pa.Table) -> Iterator[str]:
    counts = Counter((row["stage"], row["code"]) for row in failures.to_pylist())
    if counts:
        yield f"\n{'failures':20}{'rows':>12}"
    for (stage, code), count in counts.most_common():
        yield f"{f'{stage} {code}':20}{count:12}"


def _run_line(run: dict[str, Any], num_runs: int) -> str:
    counts = ", ".join(f"{run[name]} {name}" for name in ("annotated", "empty", "failed", "unchanged"))
    return (
        f"\nlast of {num_runs} runs: {run['run_id']}, ended {run['ended_at']:%Y-%m-%d %H:%M} UTC with exit code "
        f"{run['exit_code']}; {run['recordings']} recordings: {counts}"
    )


def _counted(values: pa.ChunkedArray) -> str:
    counts = Counter(values.to_pylist())
    return "".join(f", {count} {value}" for value, count in sorted(counts.items()))
