"""What is answered and not yet committed: gathered for some minutes, so that tables have few files.

A kill loses at most this much work.
"""

import logging
import time
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING

import pyarrow as pa

from svbatch.copies import copies
from svbatch.plan import Batch, task_key
from svbatch.recorded import Recorded
from svbatch.tables.schemas import table_of
from svbatch.tables.store import Store

if TYPE_CHECKING:
    from svbatch.annotate import Annotated

SECONDS_PER_COMMIT = 300.0
ROWS_PER_COMMIT = 100_000  # of all tables
log = logging.getLogger(__name__)


class Gathered:
    """Batches that wait for the next commit, and which bytes need no asking because they are answered.

    counts: goes up by the status of each recording. retried: uris whose answers are not copied.
    """

    def __init__(
        self,
        store: Store,
        recorded: Recorded,
        versions: Mapping[str, str],
        run_id: str,
        counts: Counter[str],
        retried: Collection[str] = (),
    ) -> None:
        self._store, self._versions, self._run_id, self._counts = store, versions, run_id, counts
        self._recorded, self._retried = recorded, retried
        self._known: dict[tuple[str, ...], set[str]] = {}
        self._waiting: list[tuple[Batch, Annotated]] = []
        self._num_rows = 0
        self._since = time.monotonic()

    def known(self, batch: Batch) -> set[str]:
        """Ids of bytes that are answered for all that `batch` is asked, in earlier runs or this one."""
        keys = tuple(task_key(task, self._versions) for task in batch.tasks)
        if keys not in self._known:
            self._known[keys] = set(self._recorded.ids_answered(keys, self._retried))
        return self._known[keys]

    def add(self, batch: Batch, annotated: "Annotated") -> None:
        """Takes a batch with what was said of it."""
        self._waiting.append((batch, annotated))
        self._num_rows += sum(len(rows) for rows in annotated.answers.values()) + len(batch.recordings)
        whole = annotated.recordings.filter(annotated.recordings["span_start"].is_null())
        self.known(batch).update(whole["recording_id"].drop_null().to_pylist())
        self._counts.update(annotated.recordings["status"].to_pylist())

    @property
    def is_due(self) -> bool:
        """Whether it is time for a commit."""
        return self._num_rows >= ROWS_PER_COMMIT or time.monotonic() - self._since >= SECONDS_PER_COMMIT

    def commit(self) -> list[Batch]:
        """Writes what was gathered: a commit for each set of tasks, since it replaces the answers to these; then, under
        their own uris, the recordings of the same bytes. Those whose bytes lost their answers meanwhile, because the
        file that had them has changed too, are returned, to be asked after all."""
        groups: dict[tuple[str, ...], list[tuple[Batch, Annotated]]] = {}
        for batch, annotated in self._waiting:
            groups.setdefault(tuple(task.name for task in batch.tasks), []).append((batch, annotated))
        for members in groups.values():
            self._commit_asked(members)
        unfound = [left for members in groups.values() if (left := self._commit_same(members))]
        if self._waiting:
            self._log()
        self._waiting, self._num_rows, self._since = [], 0, time.monotonic()
        return unfound

    def _log(self) -> None:
        figures = {
            "recordings": sum(len(batch.recordings) for batch, _ in self._waiting),
            "audio_seconds": round(sum(annotated.audio_seconds for _, annotated in self._waiting), 1),
            "seconds": round(time.monotonic() - self._since, 1),
            "failed_so_far": self._counts["failed"],
        }
        said = "committed %(recordings)d recordings, %(audio_seconds).1f s of audio, in %(seconds).1f s"
        log.info(said, figures, extra={"figures": figures})

    def _commit_asked(self, members: "Sequence[tuple[Batch, Annotated]]") -> None:
        kept = _kept(members)
        said = [annotated for _, annotated in members]
        recordings = pa.concat_tables([each.recordings for each in said])
        if not len(recordings):
            return
        rows = [row | {"answered": [*kept[row["uri"]], *row["answered"]]} for row in recordings.to_pylist()]
        self._store.commit(
            {name: pa.concat_tables([each.answers[name] for each in said]) for name in said[0].answers},
            pa.concat_tables([each.failures for each in said]),
            table_of("recordings", rows),
        )

    def _commit_same(self, members: "Sequence[tuple[Batch, Annotated]]") -> Batch | None:
        """Returns what could not be copied."""
        same = [each for _, annotated in members for each in annotated.same]
        if not same:
            return None
        batch, kept = members[0][0], _kept(members)
        copied = copies(same, kept, batch.tasks, self._versions, self._store, self._run_id)
        if len(copied.recordings):
            self._store.commit(copied.answers, copied.failures, copied.recordings)
            self._counts.update(copied.recordings["status"].to_pylist())
        done = set(copied.recordings["uri"].to_pylist())
        left = [each for each in same if each[0].uri not in done]
        if not left:
            return None
        self.known(batch).difference_update(recording_id for _, recording_id in left)
        return Batch(tuple(recording for recording, _ in left), batch.tasks, kept)


def _kept(members: "Sequence[tuple[Batch, Annotated]]") -> dict[str, list[str]]:
    return {uri: keys for batch, _ in members for uri, keys in batch.kept.items()}
