"""One run of a job: plan → annotate → commit, under the output's lock."""

import json
import logging
import secrets
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from svbatch.bundle import Bundle, find_bundle
from svbatch.contract import contract_of
from svbatch.corpus.decode import Audio
from svbatch.corpus.workers import decoding, workers_for
from svbatch.errors import RecordingError
from svbatch.job import Job
from svbatch.plan import ANSWER_SETTINGS, Batch, make_plan
from svbatch.tables.schemas import arrow_schema, table_of
from svbatch.tables.store import Store
from svbatch.tasks.task import task_version

if TYPE_CHECKING:
    from svbatch.model import Model

log = logging.getLogger(__name__)

EXIT_ANSWERED = 0
EXIT_FAILURES = 3
SECONDS_PER_LINE = 30.0


@dataclass(frozen=True)
class Outcome:
    """What a run did, in recordings: `annotated` + `empty` + `failed` + `unchanged` are all of the corpus; `unanswered`
    counts the questions of annotated ones that have no answer."""

    run_id: str
    annotated: int
    empty: int
    failed: int
    unchanged: int
    unanswered: int
    audio_seconds: float

    @property
    def exit_code(self) -> int:
        """0 all answered, 3 finished with failures."""
        return EXIT_FAILURES if self.failed or self.unanswered else EXIT_ANSWERED

    @property
    def is_nothing_new(self) -> bool:
        return not (self.annotated or self.empty or self.failed)


def run(job: Job, *, cache: Path | None, quiet: bool) -> Outcome:
    """Brings the output up to date with the corpus. `cache` is what --cache said. No model is loaded if nothing is new.

    Raises the errors of job, corpus, bundle and output before any model loads; a recording's own failure becomes a row.
    """
    bundle = find_bundle(job.bundle, cache=cache)
    schemas = {task.name: arrow_schema(contract_of(task)) for task in job.tasks}
    settings = ANSWER_SETTINGS | {"channels": job.channels}
    versions = {task.name: task_version(task, bundle.id, settings) for task in job.tasks}
    store = Store(job.output)
    with store.lock():
        store.prepare(schemas, job=job.path)
        store.tidy()
        started_at = datetime.now(UTC)
        run_id = f"{started_at:%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"
        plan = make_plan(
            job.corpus,
            job.corpus_base,
            job.tasks,
            versions,
            store.recordings(),
            follow_outside=job.follow_outside,
        )
        counts: Counter[str] = Counter()
        audio_seconds = 0.0
        model, device, precision = None, None, None
        if plan.batches:
            recordings = (recording for batch in plan.batches for recording in batch.recordings)
            with decoding(recordings, job.channels, num_workers=workers_for(plan.num_recordings)) as decoded:
                model, device, precision = _load(bundle, job)
                progress = Progress(plan.num_recordings, quiet=quiet)
                for batch in plan.batches:
                    audio_seconds += _answer(
                        batch, versions, model, run_id, store, counts, job.max_memory_bytes, decoded
                    )
                    progress.advance(len(batch.recordings), audio_seconds, counts)
                progress.close()
        outcome = Outcome(
            run_id=run_id,
            annotated=counts["annotated"],
            empty=counts["empty"],
            failed=counts["failed"],
            unchanged=plan.num_unchanged,
            unanswered=counts["unanswered"],
            audio_seconds=audio_seconds,
        )
        store.append_run(_run_row(job, bundle, outcome, started_at, device, precision))
        store.tidy()
    return outcome


def _load(bundle: Bundle, job: Job) -> "tuple[Model, str, str]":
    """The model, on which device and at which precision; torch is imported here, and not where nothing is new."""
    from svbatch.ask import check
    from svbatch.fetch import fetch
    from svbatch.model import choose_device, choose_precision, load_model

    fetch(bundle)
    device = choose_device(job.device)
    precision = choose_precision(job.precision, device)
    log.info("loading bundle %s (%s) on %s in %s", bundle.ref, bundle.id, device, precision)
    model = load_model(bundle, device, precision)
    check(job.tasks, model)
    return model, device, precision


def _answer(
    batch: Batch,
    versions: Mapping[str, str],
    model: "Model",
    run_id: str,
    store: Store,
    counts: Counter[str],
    max_memory_bytes: int,
    decoded: Iterator[Audio | RecordingError],
) -> float:
    """Annotates and commits one batch; returns the seconds of audio heard."""
    from svbatch.annotate import annotate

    asked = {task.name: versions[task.name] for task in batch.tasks}
    annotated = annotate(batch.recordings, batch.tasks, asked, model, run_id, max_memory_bytes, decoded)
    store.commit(annotated.answers, annotated.failures, _with_kept(annotated.recordings, batch.kept))
    counts.update(annotated.recordings["status"].to_pylist())
    counts["unanswered"] += annotated.num_unanswered
    return annotated.audio_seconds


def _with_kept(recordings: pa.Table, kept: Mapping[str, list[str]]) -> pa.Table:
    """`recordings` with the task versions that their answers of earlier runs still hold for."""
    rows = recordings.to_pylist()
    return table_of("recordings", [row | {"answered": [*kept[row["uri"]], *row["answered"]]} for row in rows])


class Progress:
    """A bar on a terminal, a JSON line now and then elsewhere, nothing if quiet."""

    def __init__(self, num_recordings: int, *, quiet: bool) -> None:
        self._bar = tqdm(total=num_recordings, unit="recording", desc="annotate", disable=True if quiet else None)
        self._total = num_recordings
        self._done = 0
        self._lines = self._bar.disable and not quiet
        self._said_at = time.monotonic()

    def advance(self, num_recordings: int, audio_seconds: float, counts: Mapping[str, int]) -> None:
        """After each commit."""
        self._done += num_recordings
        self._bar.update(num_recordings)
        if self._lines and time.monotonic() - self._said_at > SECONDS_PER_LINE:
            self._said_at = time.monotonic()
            said = {"recordings": self._done, "of": self._total, "audio_seconds": round(audio_seconds, 1)}
            tqdm.write(json.dumps(said | {"failed": counts["failed"]}), file=sys.stderr)

    def close(self) -> None:
        """Leaves the finished bar on the terminal."""
        self._bar.close()


def _run_row(
    job: Job,
    bundle: Bundle,
    outcome: Outcome,
    started_at: datetime,
    device: str | None,
    precision: str | None,
) -> pa.Table:
    row: dict[str, Any] = {
        "run_id": outcome.run_id,
        "started_at": started_at,
        "ended_at": datetime.now(UTC),
        "job": str(job.path),
        "bundle": bundle.id,
        "device": device,
        "precision": precision,
        "recordings": outcome.annotated + outcome.empty + outcome.failed + outcome.unchanged,
        "annotated": outcome.annotated,
        "unchanged": outcome.unchanged,
        "empty": outcome.empty,
        "failed": outcome.failed,
        "audio_seconds": outcome.audio_seconds,
        "exit_code": outcome.exit_code,
        "version": version("svbatch"),
    }
    return table_of("runs", [row])
