"""The same bytes under another uri: not asked again, their rows are copied."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import pyarrow as pa

from svbatch.corpus.recording import Recording, listed_columns
from svbatch.plan import task_key
from svbatch.tables.schemas import arrow_schema, table_of
from svbatch.tables.store import Store
from svbatch.tasks.task import Task

TIMES = ("annotated_at", "failed_at")


@dataclass(frozen=True)
class Copies:
    """Rows as a batch has them: by task, failures, and one per recording."""

    answers: dict[str, pa.Table]
    failures: pa.Table
    recordings: pa.Table


def copies(
    same: Sequence[tuple[Recording, str]],
    kept: Mapping[str, list[str]],
    tasks: Sequence[Task],
    versions: Mapping[str, str],
    store: Store,
    run_id: str,
) -> Copies:
    """What the output holds of the bytes of `same` (recording, recording_id), under the uris of these recordings;
    `kept` are the task versions that they have been answered for besides, by uri.

    Without those whose bytes the output does not hold, answered for all of `tasks`. A recording that has only changed
    its time keeps its answers to other tasks too.
    """
    keys = {task_key(task, versions) for task in tasks}
    tables = ["recordings", "failures", *(task.name for task in tasks)]
    held = store.answers_of(sorted({recording_id for _, recording_id in same}), tables)
    sources = _sources(held["recordings"], keys)
    pairs, rows = [], []
    for recording, recording_id in same:
        of_bytes = sources.get(recording_id)
        if of_bytes is None:
            continue
        source = of_bytes.get(recording.uri) or of_bytes[min(of_bytes)]
        is_own = source["uri"] == recording.uri
        answered = source["answered"] if is_own else [*kept[recording.uri], *sorted(keys)]
        rows.append(
            source
            | listed_columns(recording)
            | {"answered": answered, "run_id": run_id, "annotated_at": datetime.now(UTC)}
        )
        pairs.append((source["uri"], recording.uri))
    asked = {task.name: versions[task.name] for task in tasks}
    failures = [
        row
        for row in held["failures"].to_pylist()
        if row["task"] is not None and asked.get(row["task"]) == row["task_version"]
    ]
    return Copies(
        answers={task.name: _under(pairs, held[task.name], run_id) for task in tasks},
        failures=_under(pairs, pa.Table.from_pylist(failures, schema=arrow_schema("failures")), run_id),
        recordings=table_of("recordings", rows),
    )


def _sources(recordings: pa.Table, keys: set[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """By the bytes' id and uri, the rows of whole recordings that are answered for all of `keys`."""
    sources: dict[str, dict[str, dict[str, Any]]] = {}
    for row in recordings.to_pylist():
        if row["span_start"] is None and row["span_end"] is None and keys <= set(row["answered"]):
            sources.setdefault(row["recording_id"], {})[row["uri"]] = row
    return sources


def _under(pairs: Iterable[tuple[str, str]], held: pa.Table, run_id: str) -> pa.Table:
    """The rows of each pair's first uri, under its second."""
    places: dict[str, list[int]] = {}
    for place, uri in enumerate(held["uri"].to_pylist()):
        places.setdefault(uri, []).append(place)
    taken = [(place, uri) for source, uri in pairs for place in places.get(source, ())]
    rows = held.take(pa.array([place for place, _ in taken], pa.int64()))
    now = datetime.now(UTC)
    for position, field in enumerate(held.schema):
        if field.name == "uri":
            rows = rows.set_column(position, field, pa.array([uri for _, uri in taken], field.type))
        elif field.name == "run_id":
            rows = rows.set_column(position, field, pa.array([run_id] * len(taken), field.type))
        elif field.name in TIMES:
            rows = rows.set_column(position, field, pa.array([now] * len(taken), field.type))
    return rows
