"""Recordings in, Arrow tables out: hear every span once, then ask it all its questions.

    decode ─► spans ─► encoder ─┬─► projector ─► speech embeddings, read-out
                                └─► recogniser ─► transcript
    [speech embeddings] [transcript] read once by the LLM ─► each task's question ─► rows

Nothing here writes or knows an output. Whatever keeps one recording from an answer becomes a row of failures.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa
import torch

from svbatch.ask import ask
from svbatch.contract import contract_of
from svbatch.corpus.decode import SAMPLE_RATE_HZ, Audio, decode
from svbatch.corpus.recording import Recording
from svbatch.corpus.segment import Detector, Segment, speech_segments, windows
from svbatch.errors import RecordingError
from svbatch.generate import Answer, Unanswered
from svbatch.hear import Hearing, Span, hear
from svbatch.memory import fitting, prefix_lengths, questions_of
from svbatch.model import Model
from svbatch.speech.voice_activity import speech_spans
from svbatch.tables.schemas import table_of
from svbatch.tasks.combine import combined
from svbatch.tasks.task import Task
from svbatch.timing import part

SPANS_AT_ONCE = 32
MAX_MEMORY_BYTES = 2 * 2**30
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Annotated:
    """Tables of some recordings: answers by the task's name, failures, and a row per recording. `num_unanswered`
    counts the questions among the failures."""

    answers: dict[str, pa.Table]
    failures: pa.Table
    recordings: pa.Table
    audio_seconds: float
    num_unanswered: int


@dataclass
class Item:
    """One recording on its way: its audio, or why there is none, its segments that hold speech, and whether all of it
    could be heard."""

    recording: Recording
    audio: Audio | None = None
    failure: RecordingError | None = None
    num_segments: int = 0
    is_whole: bool = True


@dataclass(frozen=True)
class Place:
    """A span of one recording that is heard once: a segment, or a window without one."""

    item: Item
    span: Segment
    is_segment: bool


def annotate(
    recordings: Sequence[Recording],
    tasks: Sequence[Task],
    versions: Mapping[str, str],
    model: Model,
    run_id: str,
    max_memory_bytes: int = MAX_MEMORY_BYTES,
) -> Annotated:
    """Everything that `tasks` ask of `recordings`; `versions` are the tasks' versions by name. What is asked at a time
    takes at most `max_memory_bytes` beside the model, by estimate, or is one segment."""
    items = [_decoded(recording) for recording in recordings]
    with part("segmentation"):
        places = [place for item in items for place in _places(item, tasks, _detector(model))]
    answers: dict[str, list[tuple[Place, Answer]]] = {task.name: [] for task in tasks}
    failures = [_failure(item.recording, item.failure, run_id) for item in items if item.failure]
    num_broken = len(failures)
    with torch.inference_mode():
        for batch in _batches(places):
            for task, place, answer in _within_memory(tasks, batch, model, max_memory_bytes):
                if isinstance(answer, Unanswered):
                    failures.append(_unanswered(place, task.name, versions[task.name], answer, run_id))
                else:
                    answers[task.name].append((place, answer))
    return Annotated(
        answers={task.name: _table(task, answers[task.name], versions[task.name], run_id) for task in tasks},
        failures=table_of("failures", failures),
        recordings=table_of("recordings", [_recording(item, versions, run_id) for item in items]),
        audio_seconds=sum(item.audio.duration_s for item in items if item.audio),
        num_unanswered=len(failures) - num_broken,
    )


def _within_memory(
    tasks: Sequence[Task], batch: Sequence[Place], model: Model, max_memory_bytes: int
) -> list[tuple[Task, Place, Answer | Unanswered]]:
    """Hears a batch and asks it everything; a batch that does not fit into memory after all is halved."""
    try:
        hearings = hear([_span(place, tasks) for place in batch], model)
        lengths = prefix_lengths(hearings, model)
        answers = [
            answer
            for rows in fitting(questions_of(tasks, model), lengths, model, max_memory_bytes)
            for answer in _asked(tasks, batch[rows], hearings[rows], model)
        ]
    except Exception as error:  # torch and onnxruntime share no class for it
        if not is_out_of_memory(error):
            raise
        answers = None
    if answers is not None:
        for place, hearing in zip(batch, hearings, strict=True):
            place.item.num_segments += place.is_segment and hearing.has_speech
        return answers
    if len(batch) == 1:
        [place] = batch
        why = Unanswered("out_of_memory", f"{place.span.num_samples / SAMPLE_RATE_HZ:.1f} s do not fit into memory")
        place.item.is_whole = False
        return [(task, place, why) for task in tasks if place.is_segment or task.scope == "window"]
    log.warning("%d segments at once do not fit into memory; going on with half of them", len(batch))
    half = len(batch) // 2
    return [
        *_within_memory(tasks, batch[:half], model, max_memory_bytes),
        *_within_memory(tasks, batch[half:], model, max_memory_bytes),
    ]


def is_out_of_memory(error: Exception) -> bool:
    """Whether memory ran out, of this machine or of its GPU: torch and onnxruntime say so in words."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(
        words in said for words in ("out of memory", "can't allocate memory", "failed to allocate", "bad allocation")
    )


def _asked(
    tasks: Sequence[Task], batch: Sequence[Place], hearings: Sequence[Hearing], model: Model
) -> Iterator[tuple[Task, Place, Answer | Unanswered]]:
    """Every task's answers to those of the batch that it is about."""
    about = {
        task.name: [
            row
            for row, (place, hearing) in enumerate(zip(batch, hearings, strict=True))
            if (place.is_segment or task.scope == "window") and (hearing.has_speech or not task.needs_speech)
        ]
        for task in tasks
    }
    answers = ask(tasks, hearings, model, about)
    for task in tasks:
        for row, answer in zip(about[task.name], answers[task.name], strict=True):
            yield task, batch[row], answer


def _decoded(recording: Recording) -> Item:
    try:
        with part("decode"):
            return Item(recording, audio=decode(recording))
    except RecordingError as failure:
        return Item(recording, failure=failure)


def _places(item: Item, tasks: Sequence[Task], detect: Detector | None) -> Iterator[Place]:
    """The spans of a recording that are heard, each once: its segments where a task is about them, and the silences
    between them where one is about windows."""
    if item.audio is None:
        return
    waveform = item.audio.waveform
    segments = speech_segments(waveform, detect)
    has_windows = any(task.scope == "window" for task in tasks)
    is_segment = set(segments).__contains__
    for span in windows(waveform.size, segments) if has_windows else segments:
        yield Place(item, span, is_segment(span))


def _detector(model: Model) -> Detector | None:
    """What tells speech from other sound, where the bundle has it."""
    return partial(speech_spans, session=model.voice_activity) if model.voice_activity else None


def _batches(places: Sequence[Place]) -> Iterator[Sequence[Place]]:
    """Spans of similar length together, the longest first, so that a batch too large is met at once."""
    by_length = sorted(places, key=lambda place: -place.span.num_samples)
    for start in range(0, len(by_length), SPANS_AT_ONCE):
        yield by_length[start : start + SPANS_AT_ONCE]


def _span(place: Place, tasks: Sequence[Task]) -> Span:
    """Segments are transcribed if any task is about them: the recogniser has a say in whether they hold speech."""
    is_asked = any(task.scope != "window" for task in tasks)
    assert place.item.audio is not None
    waveform = place.item.audio.waveform[place.span.start : place.span.end]
    return Span(waveform, place.span.start_s, transcribed=place.is_segment and is_asked)


def _common(place: Place, version: str, run_id: str) -> dict[str, Any]:
    item = place.item
    assert item.audio is not None
    return {
        "uri": item.recording.uri,
        "recording_id": item.audio.recording_id,
        "channel": None,
        "start": place.span.start_s,
        "end": place.span.end_s,
        "task_version": version,
        "run_id": run_id,
        "annotated_at": datetime.now(UTC),
    }


def _table(task: Task, answers: Sequence[tuple[Place, Answer]], version: str, run_id: str) -> pa.Table:
    if task.scope == "recording":
        answers = list(_of_recordings(task, answers))
    rows = [_common(place, version, run_id) | task.carried | answer for place, answer in answers]
    return table_of(contract_of(task), sorted(rows, key=lambda row: (row["uri"], row["start"])))


def _of_recordings(task: Task, answers: Sequence[tuple[Place, Answer]]) -> Iterator[tuple[Place, Answer]]:
    """One answer for each recording, combined from those of its segments."""
    by_uri: dict[str, list[tuple[Place, Answer]]] = {}
    for place, answer in sorted(answers, key=lambda each: each[0].span):
        by_uri.setdefault(place.item.recording.uri, []).append((place, answer))
    for parts in by_uri.values():
        item = parts[0][0].item
        assert item.audio is not None
        whole = Place(item, Segment(0, item.audio.waveform.size), is_segment=False)
        yield whole, combined(task, [answer for _, answer in parts], [p.span.num_samples for p, _ in parts])


def _failure(recording: Recording, failure: RecordingError, run_id: str) -> dict[str, Any]:
    return {
        "uri": recording.uri,
        "recording_id": None,
        "channel": None,
        "start": None,
        "end": None,
        "task": None,
        "task_version": None,
        "stage": failure.stage,
        "code": failure.code,
        "message": str(failure),
        "run_id": run_id,
        "failed_at": datetime.now(UTC),
    }


def _unanswered(place: Place, task: str, version: str, why: Unanswered, run_id: str) -> dict[str, Any]:
    """One question of one span that has no answer."""
    row = _common(place, version, run_id)
    failed = {
        "task": task,
        "stage": "answer",
        "code": why.code,
        "message": why.message,
        "failed_at": row.pop("annotated_at"),
    }
    return row | failed


def _recording(item: Item, versions: Mapping[str, str], run_id: str) -> dict[str, Any]:
    audio, span = item.audio, item.recording.span
    return {
        "uri": item.recording.uri,
        "recording_id": audio.recording_id if audio else None,
        "size_bytes": item.recording.size_bytes,
        "modified_at": item.recording.modified_at,
        "etag": item.recording.etag,
        "span_start": span.start_s if span else None,
        "span_end": span.end_s if span else None,
        "reference": item.recording.reference,
        "metadata": [{"name": name, "value": value} for name, value in item.recording.metadata.items()],
        "duration": audio.duration_s if audio else None,
        "sample_rate": audio.sample_rate_hz if audio else None,
        "channels": audio.channels if audio else None,
        "num_segments": item.num_segments,
        "status": "failed" if audio is None else "annotated" if item.num_segments or not item.is_whole else "empty",
        "answered": [f"{name}@{version}" for name, version in versions.items()] if item.is_whole else [],
        "run_id": run_id,
        "annotated_at": datetime.now(UTC),
    }
