"""What a run would ask, and how long that may take by the output's own earlier runs. Writes nothing."""

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import soundfile

from svbatch.bundle import find_bundle
from svbatch.corpus.recording import LocalFile, Recording
from svbatch.job import Job
from svbatch.plan import Selection
from svbatch.recorded import NONE, Recorded
from svbatch.run import open_plan
from svbatch.tables.store import Store


def estimate(job: Job, *, cache: Path | None, selection: Selection, retry_failures: bool) -> str:
    """Lines for a person: recordings, hours, questions, time."""
    bundle = find_bundle(job.bundle, cache=cache)
    is_there = isinstance(job.output, str) or job.output.exists()
    store = Store(job.output, make=False) if is_there else None
    counts: Counter[str] = Counter()
    plan = open_plan(job, bundle, store, selection, counts, retry_failures=retry_failures)
    num_recordings = num_questions = num_unknown = 0
    audio_seconds = 0.0
    for batch in plan.batches:
        num_recordings += len(batch.recordings)
        num_questions += len(batch.recordings) * len(batch.tasks)
        for seconds in _seconds(batch.recordings, plan.recorded):
            audio_seconds += seconds or 0.0
            num_unknown += seconds is None
    lines = [
        f"to ask: {num_recordings} recordings, {audio_seconds / 3600:.2f} hours of audio, {num_questions} questions "
        "(one for each task of a recording)",
        f"unchanged: {counts['unchanged']} recordings",
    ]
    if num_unknown:
        lines.append(f"of unknown length: {num_unknown} recordings, not in the hours")
    speed = None if store is None else _speed(store)
    if num_recordings and speed is not None:
        lines.append(f"time: about {audio_seconds / speed / 60:.1f} minutes, by earlier runs with this output")
    elif num_recordings:
        lines.append("time: unknown before a first run with this output")
    return "\n".join(lines)


def _seconds(recordings: Sequence[Recording], recorded: Recorded) -> Iterator[float | None]:
    """The length of each recording: what the output knows, else its span, else what a local file's header says."""
    for recording, row in zip(recordings, recorded.unchanged_rows(recordings), strict=True):
        span = recording.span
        if span is not None and span.end_s is not None:
            yield span.end_s - span.start_s
        elif row != NONE and not math.isnan(recorded.duration_s[row]):
            yield float(recorded.duration_s[row])
        else:
            yield _by_header(recording)


def _by_header(recording: Recording) -> float | None:
    source = recording.location
    if not isinstance(source, LocalFile) or not source.path.is_file():  # opening a FIFO would wait for a writer
        return None
    try:
        return float(soundfile.info(str(source.path)).duration)
    except (OSError, RuntimeError):  # soundfile's own errors are RuntimeErrors
        return None


def _speed(store: Store) -> float | None:
    """Seconds of audio that earlier runs answered in a second; None if there were none."""
    audio_seconds = wall_seconds = 0.0
    for batch in store.iter_rows("runs", ["started_at", "ended_at", "audio_seconds"]):
        for row in batch.to_pylist():
            if row["audio_seconds"]:
                audio_seconds += row["audio_seconds"]
                wall_seconds += (row["ended_at"] - row["started_at"]).total_seconds()
    return audio_seconds / wall_seconds if wall_seconds else None
