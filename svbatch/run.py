"""One run of a job: plan → annotate → commit, under the output's lock."""

import logging
import secrets
import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import cache as once
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from tqdm import tqdm

from svbatch.ahead import decoded_ahead
from svbatch.bundle import Bundle, find_bundle
from svbatch.contract import contract_of
from svbatch.corpus.decode import Channels
from svbatch.corpus.sources import iter_recordings
from svbatch.corpus.workers import Decoded
from svbatch.errors import ExitCode
from svbatch.gather import Gathered
from svbatch.job import Job
from svbatch.plan import Batch, Selection, answer_settings, iter_batches, task_key
from svbatch.recorded import COLUMNS, Recorded, read_recorded
from svbatch.stop import SignalStop, Stopped
from svbatch.tables.schemas import arrow_schema, table_of
from svbatch.tables.store import Store
from svbatch.tasks.task import task_version

if TYPE_CHECKING:
    from svbatch.annotate import Annotated
    from svbatch.model import Model

Ask = Callable[[Batch, Iterator[Decoded], Container[str]], "Annotated"]

RECORDINGS_BEFORE_RATE = 20  # so many are looked at before their rate of failures can end a run
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Limits:
    """When a run ends early: after so many seconds, or when more than this share of its recordings failed."""

    max_runtime_s: float | None = None
    max_failure_rate: float = 1.0


NO_LIMITS = Limits()
EVERYTHING = Selection()


@dataclass(frozen=True)
class Outcome:
    """What a run did, in recordings: `annotated` + `empty` + `failed` + `unchanged` are all that it looked at;
    `unanswered` counts the questions of annotated ones that have no answer. failures: by stage and code, how many, and
    what the first says. ended: why it ended early, and how it exits then."""

    run_id: str
    started_at: datetime
    ended_at: datetime
    annotated: int
    empty: int
    failed: int
    unchanged: int
    unanswered: int
    audio_seconds: float
    failures: Mapping[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    device: str | None = None
    precision: str | None = None
    ended: tuple[ExitCode, str] | None = None

    @property
    def exit_code(self) -> ExitCode:
        """How the process ends."""
        if self.ended is not None:
            return self.ended[0]
        return ExitCode.FAILURES if self.failed or self.unanswered else ExitCode.ANSWERED

    @property
    def recordings(self) -> int:
        """All that the run looked at."""
        return self.annotated + self.empty + self.failed + self.unchanged

    @property
    def is_nothing_new(self) -> bool:
        return not (self.annotated or self.empty or self.failed or self.ended)


def new_run_id() -> str:
    """A name that sorts by time."""
    return f"{datetime.now(UTC):%Y%m%dT%H%M%SZ}-{secrets.token_hex(3)}"


@dataclass
class Tally:
    """What has been done so far; `counts` are recordings by status, and `unchanged`."""

    counts: Counter[str] = field(default_factory=Counter)
    unanswered: int = 0
    audio_seconds: float = 0.0
    failures: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    device: str | None = None
    precision: str | None = None
    ended: tuple[ExitCode, str] | None = None

    def add(self, annotated: "Annotated") -> None:
        """Counts the questions and failures of a batch; its recordings are counted where it is gathered."""
        self.unanswered += annotated.num_unanswered
        self.audio_seconds += annotated.audio_seconds
        for row in annotated.failures.select(["stage", "code", "message"]).to_pylist():
            number, first = self.failures.get((row["stage"], row["code"]), (0, row["message"]))
            self.failures[row["stage"], row["code"]] = number + 1, first

    def outcome(self, run_id: str, started_at: datetime) -> Outcome:
        """The run, ended now."""
        return Outcome(
            run_id=run_id,
            started_at=started_at,
            ended_at=datetime.now(UTC),
            **{name: self.counts[name] for name in ("annotated", "empty", "failed", "unchanged")},
            unanswered=self.unanswered,
            audio_seconds=self.audio_seconds,
            failures=self.failures,
            device=self.device,
            precision=self.precision,
            ended=self.ended,
        )


def run(
    job: Job,
    *,
    cache: Path | None,
    quiet: bool,
    run_id: str | None = None,
    selection: Selection = EVERYTHING,
    retry_failures: bool = False,
    limits: Limits = NO_LIMITS,
) -> Outcome:
    """Brings the output up to date with the corpus. `cache` is what --cache said. No model is loaded if nothing is new.

    Raises the errors of job, corpus, bundle and output before any model loads; a recording's own failure becomes a row.
    A signal ends it in order: what was gathered is committed, and the run has its row.
    """
    started, started_at = time.monotonic(), datetime.now(UTC)
    run_id = run_id or new_run_id()
    bundle = find_bundle(job.bundle, cache=cache)
    schemas = {task.name: arrow_schema(contract_of(task)) for task in job.tasks}
    store = Store(job.output)
    shard = "{}/{}".format(*selection.shard) if selection.shard else None
    with store.lock(shard=shard), SignalStop() as stop:
        store.prepare(schemas, job=job.path)
        store.tidy()
        tally = Tally()
        plan = open_plan(job, bundle, store, selection, tally.counts, retry_failures=retry_failures)
        gathered = Gathered(store, plan.recorded, plan.versions, run_id, tally.counts, plan.selection.retry)
        try:
            ask = _asker(job, bundle, plan.versions, run_id, tally)
            _answer(plan.batches, job.channels, ask, gathered, tally, limits, started, stop, quiet=quiet)
        except Stopped as stopped:
            tally.ended = ExitCode(stopped.exit_code), "stopped by a signal; the next run goes on from here"
        finally:
            with stop.committing():
                gathered.commit()
        outcome = tally.outcome(run_id, started_at)
        if outcome.ended is not None:
            log.error("%s", outcome.ended[1])
        with stop.committing():
            store.append_run(_run_row(job, bundle, outcome))
            store.tidy()
    return outcome


@dataclass(frozen=True)
class OpenPlan:
    """A plan over an output as it is now; `batches` can be taken once."""

    versions: Mapping[str, str]
    recorded: Recorded
    selection: Selection
    batches: Iterator[Batch]


def open_plan(
    job: Job, bundle: Bundle, store: Store | None, selection: Selection, counts: Counter[str], *, retry_failures: bool
) -> OpenPlan:
    """What of the job is to be asked, all of it where there is no output yet; nothing is written. `counts` goes up as
    the batches are taken."""
    versions = {task.name: task_version(task, bundle.id, answer_settings(task, job.channels)) for task in job.tasks}
    if store is None:
        held = read_recorded(())
    else:
        keys = [task_key(task, versions) for task in job.tasks]
        retry = _failed_keys(store, keys) if retry_failures else {}
        selection = replace(selection, forgotten=store.forgotten(), retry=retry)
        held = read_recorded(store.iter_rows("recordings", COLUMNS))
    recordings = iter_recordings(job.corpus, job.corpus_base, follow_outside=job.follow_outside)
    return OpenPlan(versions, held, selection, iter_batches(recordings, job.tasks, versions, held, counts, selection))


def _failed_keys(store: Store, keys: Sequence[str]) -> dict[str, set[str]]:
    """Which of the task versions `keys` each uri has failures of: all of them where nothing could be read."""
    failed: dict[str, set[str]] = {}
    for batch in store.iter_rows("failures", ["uri", "task", "task_version"]):
        for row in batch.to_pylist():
            key = f"{row['task']}@{row['task_version']}"
            if of_row := set(keys) if row["task"] is None else {key} & set(keys):
                failed.setdefault(row["uri"], set()).update(of_row)
    return failed


def _asker(job: Job, bundle: Bundle, versions: Mapping[str, str], run_id: str, tally: Tally) -> Ask:
    """What asks a batch, but for known bytes. The first loads the model: torch is imported then, and not where nothing
    is new."""

    @once
    def model() -> "Model":
        from svbatch.ask import check
        from svbatch.fetch import fetch
        from svbatch.model import choose_device, choose_precision, load_model

        fetch(bundle)
        tally.device = device = choose_device(job.device)
        tally.precision = precision = choose_precision(job.precision, device)
        log.info("loading bundle %s (%s) on %s in %s", bundle.ref, bundle.id, device, precision)
        loaded = load_model(bundle, device, precision)
        check(job, loaded)
        return loaded

    def ask(batch: Batch, decoded: Iterator[Decoded], known: Container[str]) -> "Annotated":
        from svbatch.annotate import annotate

        asked = {task.name: versions[task.name] for task in batch.tasks}
        return annotate(batch.recordings, batch.tasks, asked, model(), run_id, job.max_memory_bytes, decoded, known)

    return ask


def _answer(
    batches: Iterator[Batch],
    channels: Channels,
    ask: Ask,
    gathered: Gathered,
    tally: Tally,
    limits: Limits,
    started: float,
    stop: SignalStop,
    *,
    quiet: bool,
) -> None:
    """Asks and commits all batches, or until a limit is reached, of which `tally.ended` tells."""
    num_asked = 0
    with tqdm(unit="recording", desc="annotate", disable=True if quiet else None) as bar:  # None: on a terminal only
        while (first := next(batches, None)) is not None:
            unfound: list[Batch] = []
            with decoded_ahead(first, batches, channels) as planned:
                for batch, decoded in planned:
                    seconds = time.monotonic() - started
                    if num_asked and (ended := _reached(limits, tally.counts["failed"], num_asked, seconds)):
                        tally.ended = ended
                        return
                    annotated = ask(batch, decoded, gathered.known(batch))
                    gathered.add(batch, annotated)
                    tally.add(annotated)
                    num_asked += len(batch.recordings)
                    bar.update(len(batch.recordings))
                    if gathered.is_due:
                        with stop.committing():
                            unfound += gathered.commit()
            with stop.committing():
                unfound += gathered.commit()
            batches = iter(unfound)


def _reached(limits: Limits, num_failed: int, num_asked: int, seconds: float) -> tuple[ExitCode, str] | None:
    """How and why the run is to end, if a limit is reached and there is more to do."""
    if num_asked >= RECORDINGS_BEFORE_RATE and num_failed > limits.max_failure_rate * num_asked:
        rate = f"{num_failed} of {num_asked} recordings failed, more than {limits.max_failure_rate:.1%}"
        return ExitCode.FAILURES, f"given up: {rate}; see the table failures, or give --max-failure-rate more"
    if limits.max_runtime_s is not None and seconds >= limits.max_runtime_s:
        return ExitCode.MORE, f"stopped after {seconds:.0f} s, as --max-runtime says; run again for the rest"
    return None


def _run_row(job: Job, bundle: Bundle, outcome: Outcome) -> pa.Table:
    row: dict[str, Any] = {
        "run_id": outcome.run_id,
        "started_at": outcome.started_at,
        "ended_at": outcome.ended_at,
        "job": str(job.path),
        "bundle": bundle.id,
        "device": outcome.device,
        "precision": outcome.precision,
        "recordings": outcome.recordings,
        "annotated": outcome.annotated,
        "unchanged": outcome.unchanged,
        "empty": outcome.empty,
        "failed": outcome.failed,
        "audio_seconds": outcome.audio_seconds,
        "exit_code": int(outcome.exit_code),
        "version": version("svbatch"),
    }
    return table_of("runs", [row])


def log_failures(outcome: Outcome) -> None:
    """A warning for each kind of failure, with how many there are and what the first says."""
    for (stage, code), (number, first) in sorted(outcome.failures.items()):
        figures = {"stage": stage, "code": code, "failures": number}
        log.warning("%d failures at %s, %s; the first: %s", number, stage, code, first, extra={"figures": figures})
