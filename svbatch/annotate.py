"""Recordings in, Arrow tables out: hear every span once, then ask it all its questions.

    decode ─► spans ─► encoder ─┬─► projector ─► speech embeddings, read-out, tone
                                └─► recogniser ─► transcript
    [speech embeddings] [transcript] read once by the LLM ─► each task's question ─► rows

Nothing here writes or knows an output. Whatever keeps one recording from an answer becomes a row of failures.
"""

import logging
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from svbatch.ask import ask
from svbatch.contract import contract_of
from svbatch.corpus.decode import SAMPLE_RATE_HZ, Audio, decode
from svbatch.corpus.recording import Recording, listed_columns
from svbatch.corpus.segment import Detector, Segment, speech_segments, windows
from svbatch.errors import RecordingError
from svbatch.generate import Unanswered
from svbatch.hear import Hearing, Span, hear
from svbatch.memory import fitting, prefix_lengths, questions_of
from svbatch.model import Model
from svbatch.speech.voice_activity import speech_spans
from svbatch.tables.schemas import table_of
from svbatch.tasks.answers import Answer
from svbatch.tasks.combine import combined
from svbatch.tasks.task import Task
from svbatch.timing import part

SPANS_AT_ONCE = 32
MAX_MEMORY_BYTES = 2 * 2**30
MAX_SOUND_BYTES = 512 * 2**20  # of the recordings that are heard together: 2.3 hours, or one
log = logging.getLogger(__name__)

Hear = Callable[[Sequence[Span], Model], list[Hearing]]
"""What `hear` does, or what was heard before."""


@dataclass(frozen=True)
class Annotated:
    """Tables of some recordings: answers by the task's name, failures, and a row per recording. `num_unanswered`
    counts the questions among the failures. `same` are recordings that have no row, because their bytes are answered
    already or with another recording, with the bytes' ids."""

    answers: dict[str, pa.Table]
    failures: pa.Table
    recordings: pa.Table
    audio_seconds: float
    num_unanswered: int
    same: tuple[tuple[Recording, str], ...] = ()


@dataclass
class Item:
    """One recording on its way: its audio, whose samples are let go once they are heard, or why there is none; its
    segments that hold speech, and whether all of it could be heard."""

    recording: Recording
    audio: Audio | None = None
    failure: RecordingError | None = None
    num_samples: int = 0
    num_segments: int = 0
    is_whole: bool = True

    @property
    def start_s(self) -> float:
        """Where the recording starts in its source."""
        return self.recording.span.start_s if self.recording.span else 0.0


@dataclass(frozen=True)
class Place:
    """A span of one track of a recording that is heard once: a segment, or a window without one."""

    item: Item
    track: int
    span: Segment
    is_segment: bool

    @property
    def waveform(self) -> NDArray[np.float32]:
        assert self.item.audio is not None
        return self.item.audio.waveforms[self.track, self.span.start : self.span.end]

    @property
    def channel(self) -> int | None:
        """Of the source; None where all are mixed."""
        assert self.item.audio is not None
        return self.item.audio.tracks[self.track]


def annotate(
    recordings: Sequence[Recording],
    tasks: Sequence[Task],
    versions: Mapping[str, str],
    model: Model,
    run_id: str,
    max_memory_bytes: int = MAX_MEMORY_BYTES,
    decoded: Iterator[Audio | RecordingError] | None = None,
    known: Container[str] = frozenset(),
    listen: Hear = hear,
) -> Annotated:
    """Everything that `tasks` ask of `recordings`; `versions` are the tasks' versions by name. What is asked at a time
    takes at most `max_memory_bytes` beside the model, by estimate, or is one segment. As many of `decoded` are taken as
    there are recordings, one for each; without it they are decoded here. Whole recordings whose bytes' ids are among
    `known`, or the same as another's, are not asked. `listen` hears the spans."""
    items: list[Item] = []
    same: list[tuple[Recording, str]] = []
    answers: dict[str, list[tuple[Place, Answer]]] = {task.name: [] for task in tasks}
    unanswered = []
    for together in _heard_together(recordings, _decoded(recordings) if decoded is None else decoded):
        together = _unknown(together, known, items, same)
        with part("segmentation"):
            places = [place for item in together for place in _places(item, tasks, detector_of(model))]
        with torch.inference_mode():
            for batch in _batches(places):
                for task, place, answer in _within_memory(tasks, batch, model, max_memory_bytes, listen):
                    if isinstance(answer, Unanswered):
                        unanswered.append(_unanswered(place, task.name, versions[task.name], answer, run_id))
                    else:
                        answers[task.name].append((place, answer))
        items += map(_without_samples, together)
    failures = [_failure(item.recording, item.failure, run_id) for item in items if item.failure]
    return Annotated(
        answers={task.name: _table(task, answers[task.name], versions[task.name], run_id) for task in tasks},
        failures=table_of("failures", failures + unanswered),
        recordings=table_of("recordings", [_recording(item, versions, run_id) for item in items]),
        audio_seconds=sum(item.audio.duration_s for item in items if item.audio),
        num_unanswered=len(unanswered),
        same=tuple(same),
    )


def _unknown(
    items: Sequence[Item], known: Container[str], before: Sequence[Item], same: list[tuple[Recording, str]]
) -> list[Item]:
    """The items that are asked; those whose bytes are known, or the same as of one of these or `before`, join `same`
    with their ids."""
    asked: list[Item] = []
    ids = {_whole_id(item) for item in before} - {None}
    for item in items:
        recording_id = _whole_id(item)
        if recording_id is not None and (recording_id in known or recording_id in ids):
            same.append((item.recording, recording_id))
        else:
            asked.append(item)
            ids.add(recording_id)
    return asked


def _whole_id(item: Item) -> str | None:
    """The id of a whole recording's bytes; None for a span, or where they could not be read."""
    return item.audio.recording_id if item.audio and item.recording.span is None else None


def _within_memory(
    tasks: Sequence[Task], batch: Sequence[Place], model: Model, max_memory_bytes: int, listen: Hear
) -> list[tuple[Task, Place, Answer | Unanswered]]:
    """Hears a batch and asks it everything; a batch that does not fit into memory after all is halved."""
    try:
        hearings = listen([_span(place, tasks) for place in batch], model)
        lengths = prefix_lengths(hearings, model)
        by_length = sorted(range(len(batch)), key=lambda row: -lengths[row])
        batch, hearings = [batch[row] for row in by_length], [hearings[row] for row in by_length]
        lengths.sort(reverse=True)
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
        *_within_memory(tasks, batch[:half], model, max_memory_bytes, listen),
        *_within_memory(tasks, batch[half:], model, max_memory_bytes, listen),
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


def _decoded(recordings: Sequence[Recording]) -> Iterator[Audio | RecordingError]:
    for recording in recordings:
        try:
            yield decode(recording)
        except RecordingError as failure:
            yield failure


def _heard_together(
    recordings: Sequence[Recording], decoded: Iterator[Audio | RecordingError]
) -> Iterator[Sequence[Item]]:
    """The recordings in order, as many at a time as hold MAX_SOUND_BYTES."""
    together: list[Item] = []
    num_bytes = 0
    for recording in recordings:
        with part("decode"):
            found = next(decoded)
        if isinstance(found, RecordingError):
            together.append(Item(recording, failure=found))
        else:
            together.append(Item(recording, found, num_samples=found.num_samples))
            num_bytes += found.waveforms.nbytes
        if num_bytes >= MAX_SOUND_BYTES:
            yield together
            together, num_bytes = [], 0
    yield together


def _without_samples(item: Item) -> Item:
    if item.audio:
        item.audio = replace(item.audio, waveforms=item.audio.waveforms[:, :0].copy())
    return item


def _places(item: Item, tasks: Sequence[Task], detect: Detector | None) -> Iterator[Place]:
    """The spans of a recording that are heard, each once: its segments where a task is about them, and the silences
    between them where one is about windows."""
    if item.audio is None:
        return
    has_windows = any(task.scope == "window" for task in tasks)
    for track, waveform in enumerate(item.audio.waveforms):
        segments = speech_segments(waveform, detect)
        is_segment = set(segments).__contains__
        for span in windows(waveform.size, segments) if has_windows else segments:
            yield Place(item, track, span, is_segment(span))


def detector_of(model: Model) -> Detector | None:
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
    return Span(place.waveform, place.item.start_s + place.span.start_s, transcribed=place.is_segment and is_asked)


def _common(place: Place, version: str, run_id: str) -> dict[str, Any]:
    item = place.item
    assert item.audio is not None
    return {
        "uri": item.recording.uri,
        "recording_id": item.audio.recording_id,
        "channel": place.channel,
        "start": item.start_s + place.span.start_s,
        "end": item.start_s + place.span.end_s,
        "task_version": version,
        "run_id": run_id,
        "annotated_at": datetime.now(UTC),
    }


def _table(task: Task, answers: Sequence[tuple[Place, Answer]], version: str, run_id: str) -> pa.Table:
    if task.scope == "recording":
        answers = list(_of_recordings(task, answers))
    rows = [_common(place, version, run_id) | task.carried | answer for place, answer in answers]
    return table_of(contract_of(task), sorted(rows, key=lambda row: (row["uri"], row["channel"] or 0, row["start"])))


def _of_recordings(task: Task, answers: Sequence[tuple[Place, Answer]]) -> Iterator[tuple[Place, Answer]]:
    """One answer for each track of a recording, combined from those of its segments."""
    by_track: dict[tuple[str, int], list[tuple[Place, Answer]]] = {}
    for place, answer in sorted(answers, key=lambda each: each[0].span):
        by_track.setdefault((place.item.recording.uri, place.track), []).append((place, answer))
    for parts in by_track.values():
        first = parts[0][0]
        whole = replace(first, span=Segment(0, first.item.num_samples), is_segment=False)
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
    audio = item.audio
    return {
        **listed_columns(item.recording),
        "recording_id": audio.recording_id if audio else None,
        "duration": audio.duration_s if audio else None,
        "sample_rate": audio.sample_rate_hz if audio else None,
        "channels": audio.channels if audio else None,
        "num_segments": item.num_segments,
        "status": "failed" if audio is None else "annotated" if item.num_segments or not item.is_whole else "empty",
        "answered": [f"{name}@{version}" for name, version in versions.items()],
        "run_id": run_id,
        "annotated_at": datetime.now(UTC),
    }
