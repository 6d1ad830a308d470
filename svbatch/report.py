"""What a person reads after a run: counts, an excerpt of the answers, and how to open the tables."""

from pathlib import Path
from typing import Any

from svbatch.job import Job
from svbatch.run import Outcome
from svbatch.tables.store import Store
from svbatch.tasks.task import Task

MAX_LINES = 6
MAX_TEXT = 88


def report(job: Job, outcome: Outcome) -> str:
    """Several lines of text, without a trailing line break."""
    total = outcome.annotated + outcome.empty + outcome.failed + outcome.unchanged
    if outcome.is_nothing_new:
        return f"nothing new: all {total} recordings have their answers in {job.output}"
    store = Store(job.output)
    lines = [
        f"{total} recordings: {outcome.annotated} annotated, {outcome.empty} without speech, {outcome.failed} failed, "
        f"{outcome.unchanged} unchanged; {outcome.audio_seconds:.0f} s of audio"
    ]
    for task in job.tasks:
        rows = [row for row in store.read(task.name).to_pylist() if row["run_id"] == outcome.run_id]
        rows.sort(key=lambda row: (row["uri"], row["start"]))
        lines += ["", f"{task.name}: {len(rows)} rows"]
        lines += [
            f"  {Path(row['uri']).name}  {row['start']:.1f}-{row['end']:.1f} s  {_answer(task, row)}"
            for row in rows[:MAX_LINES]
        ]
        lines += ["  …"] if len(rows) > MAX_LINES else []
    failures = [row for row in store.read("failures").to_pylist() if row["run_id"] == outcome.run_id]
    lines += ["", f"failures: {len(failures)} rows"] if failures else []
    lines += [f"  {row['message']}" for row in failures[:MAX_LINES]]
    first = job.output / job.tasks[0].name
    return "\n".join(
        [
            *lines,
            "",
            f"tables: {job.output}",
            f'  polars:  pl.read_parquet("{first}/*.parquet")',
            f"  duckdb:  SELECT * FROM '{first}/*.parquet'",
        ]
    )


def _answer(task: Task, row: dict[str, Any]) -> str:
    if task.answer == "text":
        text = row["text"] or ""
        return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"
    if task.answer == "label":
        return f"{row['label'] or row['reason']} ({row['probability']:.2f})"
    said = [f"{k['keyword']} ({_when(k['start'])}{k['probability']:.2f})" for k in row["keywords"] if k["present"]]
    return ", ".join(said) if said else "none"


def _when(start: float | None) -> str:
    return "" if start is None else f"at {start:.1f} s, "
