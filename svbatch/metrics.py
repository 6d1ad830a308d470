"""A run's figures as a text file for Prometheus' node exporter, written by rename."""

from pathlib import Path

import pyarrow.compute as pc
from prometheus_client import CollectorRegistry, Gauge, write_to_textfile

from svbatch.errors import ExitCode, OutputError
from svbatch.job import Job
from svbatch.run import Outcome
from svbatch.tables.store import Store


def check_metrics_file(path: Path) -> None:
    """Raises OutputError for a file that can be foreseen not to be written, before hours of work."""
    if path.is_dir() or not path.parent.is_dir():
        raise OutputError(f"{path}: metrics cannot be written there; give --metrics a file in a folder that exists")


def write_metrics(path: Path, job: Job, outcome: Outcome) -> None:
    """The figures of one run of `job`; the last success is the output's last run that ended with all answered."""
    registry = CollectorRegistry()

    def gauge(name: str, meaning: str, value: float, **labels: str) -> None:
        own = Gauge(f"svbatch_{name}", meaning, ["job", *labels], registry=registry)
        own.labels(job=job.path.stem, **labels).set(value)

    recordings = Gauge(
        "svbatch_recordings", "Recordings that the last run looked at.", ["job", "outcome"], registry=registry
    )
    for kind in ("annotated", "empty", "failed", "unchanged"):
        recordings.labels(job=job.path.stem, outcome=kind).set(getattr(outcome, kind))
    gauge("unanswered_questions", "Questions of the last run that have no answer.", outcome.unanswered)
    gauge("audio_seconds", "Seconds of audio that the last run answered.", outcome.audio_seconds)
    duration = (outcome.ended_at - outcome.started_at).total_seconds()
    gauge("run_duration_seconds", "How long the last run took.", duration)
    gauge("run_end_timestamp_seconds", "When the last run ended.", outcome.ended_at.timestamp())
    gauge("exit_code", "How the last run ended; 0 is all answered.", outcome.exit_code)
    if (success := _last_success(job)) is not None:
        gauge("last_success_timestamp_seconds", "When a run last ended with all answered.", success)
    try:
        write_to_textfile(str(path), registry)
    except OSError as error:
        raise OutputError(f"{path}: {error.strerror}; the tables are written, their metrics are not") from error


def _last_success(job: Job) -> float | None:
    last: float | None = None
    for batch in Store(job.output, make=False).iter_rows("runs", ["exit_code", "ended_at"]):
        ended = pc.max(batch.filter(pc.equal(batch["exit_code"], int(ExitCode.ANSWERED)))["ended_at"]).as_py()
        if ended is not None:
            last = max(last or 0.0, ended.timestamp())
    return last
