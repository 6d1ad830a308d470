"""What is still to be asked: corpus × tasks, minus what the output already holds. Cheap, no model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from svbatch.corpus.recording import Recording
from svbatch.corpus.sources import iter_recordings
from svbatch.tasks.task import Task

RECORDINGS_PER_BATCH = 32
ANSWER_SETTINGS = {
    "segmentation": "energy gate 2, voice activity 1",
    "hearing": 3,
}  # what else changes an answer, for task_version


@dataclass(frozen=True)
class Batch:
    """Recordings that are asked the same tasks; `kept` are the answers they have besides, by uri."""

    recordings: tuple[Recording, ...]
    tasks: tuple[Task, ...]
    kept: Mapping[str, list[str]]


@dataclass(frozen=True)
class Plan:
    """Batches to annotate, and how many recordings need nothing."""

    batches: tuple[Batch, ...]
    num_unchanged: int

    @property
    def num_recordings(self) -> int:
        """Recordings that are asked something."""
        return sum(len(batch.recordings) for batch in self.batches)


def make_plan(
    corpus: Sequence[str], base: Path, tasks: Sequence[Task], versions: Mapping[str, str], recorded: pa.Table
) -> Plan:
    """The plan for `corpus` (entries relative to `base`), given the `recordings` of the output.

    A recording is unchanged if its size and time of modification are; then only tasks whose version it has not been
    answered for are asked. Raises CorpusError where there is nothing.
    """
    known = {row["uri"]: row for row in recorded.to_pylist()}
    wanted = {f"{task.name}@{versions[task.name]}": task for task in tasks}
    groups: dict[tuple[str, ...], list[tuple[Recording, list[str]]]] = {}
    num_unchanged = 0
    for recording in iter_recordings(corpus, base):
        row = known.get(recording.uri)
        unchanged = row is not None and (row["size_bytes"], row["modified_at"]) == (
            recording.size_bytes,
            recording.modified_at,
        )
        answered = list(row["answered"]) if row is not None and unchanged else []
        missing = tuple(key for key in wanted if key not in answered)
        if not missing:
            num_unchanged += 1
            continue
        names = {wanted[key].name for key in missing}
        kept = [key for key in answered if key.split("@")[0] not in names]
        groups.setdefault(missing, []).append((recording, kept))
    batches = [
        Batch(
            tuple(r for r, _ in part),
            tuple(wanted[key] for key in missing),
            {r.uri: kept for r, kept in part},
        )
        for missing, members in groups.items()
        for part in _parts(members)
    ]
    return Plan(tuple(batches), num_unchanged)


def _parts(members: Sequence[tuple[Recording, list[str]]]) -> Iterator[Sequence[tuple[Recording, list[str]]]]:
    for start in range(0, len(members), RECORDINGS_PER_BATCH):
        yield members[start : start + RECORDINGS_PER_BATCH]
