"""What a person reads after a run: counts, an excerpt of the answers, and how to open the tables."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from svbatch.contract import contract_of
from svbatch.job import Job
from svbatch.run import Outcome
from svbatch.tables.schemas import entry_names
from svbatch.tables.store import Store
from svbatch.tasks.task import Task

MAX_LINES = 6
MAX_TEXT = 88


def report(job: Job, outcome: Outcome) -> str:
    """Several lines of text, without a trailing line break."""
    if outcome.is_nothing_new:
        return f"nothing new: all {outcome.recordings} recordings have their answers in {job.output}"
    store = Store(job.output)
    lines = [
        f"{outcome.recordings} recordings: {outcome.annotated} annotated, {outcome.empty} without speech, "
        f"{outcome.failed} failed, {outcome.unchanged} unchanged; {outcome.audio_seconds:.0f} s of audio"
    ]
    for task in job.tasks:
        number, some = store.of_run(task.name, outcome.run_id, MAX_LINES)
        rows = sorted(some.to_pylist(), key=lambda row: (row["uri"], row["start"]))
        lines += ["", f"{task.name}: {number} rows"]
        lines += [
            f"  {Path(row['uri']).name}  {row['start']:.1f}-{row['end']:.1f} s  {_answer(task, row)}" for row in rows
        ]
        lines += ["  …"] if number > len(rows) else []
    number, failures = store.of_run("failures", outcome.run_id, MAX_LINES)
    lines += ["", f"failures: {number} rows"] if number else []
    lines += [f"  {_failure(row)}" for row in failures.to_pylist()]
    first = f"{job.output}/{job.tasks[0].name}"
    return "\n".join(
        [
            *lines,
            "",
            f"tables: {job.output}",
            f'  polars:  pl.read_parquet("{first}/*.parquet")',
            f"  duckdb:  SELECT * FROM '{first}/*.parquet'",
        ]
    )


def _failure(row: dict[str, Any]) -> str:
    """A recording's failure names its file; a question's is told with its place."""
    if row["task"] is None:
        return str(row["message"])
    return f"{Path(row['uri']).name}  {row['start']:.1f}-{row['end']:.1f} s  {row['message']}"


def _answer(task: Task, row: dict[str, Any]) -> str:
    if task.answer == "text":
        return _shortened(row["text"] or "")
    if task.answer == "label":
        return f"{row['label'] or row['reason']} ({row['probability']:.2f})"
    if task.answer == "yes_no" and not task.entries:
        said = row["reason"] if row["answer"] is None else "yes" if row["answer"] else "no"
        return f"{said} ({row['probability']:.2f})"
    if task.answer in ("number", "object"):
        return _shortened(json.dumps(row["value" if task.answer == "number" else "object"], ensure_ascii=False))
    column, fields = entry_names(contract_of(task))
    told = [_entry(entry, fields) for entry in row[column] if entry.get("present", True) is not False]
    return _shortened(", ".join(told)) if told else "none"


def _entry(entry: dict[str, Any], fields: Sequence[str]) -> str:
    """A keyword or label with its probability and place, an item or pair with its score. What is too unsure to be
    present or absent has a question mark."""
    values = [entry[name] for name in fields]
    words = [value for value in values if isinstance(value, str)]
    numbers = [value for value in values if isinstance(value, float)]
    place = f"at {numbers[1]:.1f} s, " if len(numbers) > 1 else ""
    unsure = "" if entry.get("present", True) else "?"
    return f"{' = '.join(words)}{unsure} ({place}{numbers[0]:.2f})"


def _shortened(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
