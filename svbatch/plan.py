"""What is still to be asked: corpus × tasks, minus what the output already holds. Cheap, no model."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from itertools import islice

from svbatch.corpus.content import content_of
from svbatch.corpus.recording import EPOCH, Recording
from svbatch.errors import RecordingError
from svbatch.recorded import NONE, Recorded
from svbatch.tasks.task import Task

RECORDINGS_PER_BATCH = 32
RECORDINGS_LOOKED_UP = 50_000  # at once: the uris of the output are hashed anew for each such lot
ANSWER_SETTINGS = {"segmentation": "energy gate 2, voice activity 1", "hearing": 3}
"""What else changes an answer, for task_version."""
LABEL_SETTINGS = {"scoring": 2}
"""What else changes a label, and no other answer: the habit that is taken off."""


@dataclass(frozen=True)
class Batch:
    """Recordings that are asked the same tasks; `kept` are the answers they have besides, by uri."""

    recordings: tuple[Recording, ...]
    tasks: tuple[Task, ...]
    kept: Mapping[str, list[str]]


@dataclass(frozen=True)
class Selection:
    """Which recordings a run looks at. since: modified then or later, or at an unknown time. shard: (i, n), the i-th of
    n parts, from 1; a source's spans are in one. limit: at most so many are asked. rehash: the bytes of unchanged ones
    are compared too. retry: task versions that are asked again, by uri. forgotten: ids that are never asked."""

    since: datetime | None = None
    shard: tuple[int, int] | None = None
    limit: int | None = None
    rehash: bool = False
    retry: Mapping[str, Collection[str]] = field(default_factory=dict)
    forgotten: frozenset[str] = frozenset()


def answer_settings(task: Task, channels: str) -> dict[str, object]:
    """What changes a task's answers besides task and bundle."""
    return ANSWER_SETTINGS | {"channels": channels} | (LABEL_SETTINGS if task.answer == "label" else {})


def task_key(task: Task, versions: Mapping[str, str]) -> str:
    """How `answered` names a task in the version that is asked."""
    return f"{task.name}@{versions[task.name]}"


def iter_batches(
    recordings: Iterable[Recording],
    tasks: Sequence[Task],
    versions: Mapping[str, str],
    recorded: Recorded,
    counts: Counter[str],
    selection: Selection,
) -> Iterator[Batch]:
    """The plan, batch by batch while `recordings` are listed. `counts["unchanged"]` goes up by each one that needs
    nothing, because it has its answers or its bytes are forgotten.

    An unchanged recording is asked only the tasks whose version it has not been answered for.
    """
    wanted = {task_key(task, versions): task for task in tasks}
    lacking = [tuple(key for key in wanted if key not in history) for history in recorded.histories]
    waiting: dict[tuple[str, ...], list[tuple[Recording, tuple[str, ...]]]] = {}
    num_asked = 0
    for recording, row in _looked_up(recordings, recorded, selection):
        missing = tuple(wanted) if row == NONE else lacking[recorded.history[row]]
        if again := selection.retry.get(recording.uri):
            missing = tuple(key for key in wanted if key in missing or key in again)
        if not missing or (row == NONE and _is_forgotten(recording, selection.forgotten)):
            counts["unchanged"] += 1
            continue
        members = waiting.setdefault(missing, [])
        members.append((recording, recorded.answered(row)))
        num_asked += 1
        if len(members) == RECORDINGS_PER_BATCH:
            yield _batch(missing, waiting.pop(missing), wanted)
        if num_asked == selection.limit:
            break
    for missing, members in waiting.items():
        yield _batch(missing, members, wanted)


def _batch(
    missing: Sequence[str], members: Sequence[tuple[Recording, tuple[str, ...]]], wanted: Mapping[str, Task]
) -> Batch:
    """Of a task that is asked anew no other version is kept."""
    names = {wanted[key].name for key in missing}
    kept = {r.uri: [key for key in answered if key.split("@")[0] not in names] for r, answered in members}
    return Batch(tuple(r for r, _ in members), tuple(wanted[key] for key in missing), kept)


def _looked_up(
    recordings: Iterable[Recording], recorded: Recorded, selection: Selection
) -> Iterator[tuple[Recording, int]]:
    """The recordings that a run looks at, each with its row of `recorded`, or NONE if it is new or changed."""
    looked_at = (recording for recording in recordings if _is_selected(recording, selection))
    while lot := list(islice(looked_at, RECORDINGS_LOOKED_UP)):
        for recording, row in zip(lot, recorded.unchanged_rows(lot), strict=True):
            if selection.rehash and row != NONE and recorded.recording_ids[row].is_valid:
                row = row if content_hash(recording) == recorded.recording_ids[row].as_py() else NONE
            yield recording, row


def _is_selected(recording: Recording, selection: Selection) -> bool:
    if selection.since is not None and EPOCH < recording.modified_at < selection.since:
        return False
    return selection.shard is None or shard_of(recording.uri, selection.shard[1]) == selection.shard[0]


def shard_of(uri: str, num_shards: int) -> int:
    """Which of the shards 1 to n a recording belongs to, by the address of its source: its spans stay together."""
    source = uri.partition("#t=")[0].encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(source, digest_size=8).digest(), "big") % num_shards + 1


def _is_forgotten(recording: Recording, forgotten: frozenset[str]) -> bool:
    return bool(forgotten) and content_hash(recording) in forgotten


def content_hash(recording: Recording) -> str | None:
    """The recording_id of the bytes as they are now; None if they cannot be read."""
    try:
        return hashlib.sha256(content_of(recording)).hexdigest()
    except RecordingError:
        return None
