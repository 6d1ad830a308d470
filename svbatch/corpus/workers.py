"""Recordings decoded ahead of whoever asks for them, in processes of their own with limits.

A decoder that crashes, hangs or takes too much memory costs its recording a failure and its process the life, and no
other recording anything. Results come in the order of the recordings; what has been decoded and not yet been taken
stays below AHEAD_BYTES and one recording.
"""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from svbatch.corpus.decode import Audio, Channels
from svbatch.corpus.recording import Recording
from svbatch.corpus.worker import Limits, Worker
from svbatch.errors import RecordingError

AHEAD_BYTES = 256 * 2**20  # 70 minutes
AHEAD_RECORDINGS = 256
RECORDINGS_PER_WORKER = 8  # fewer are decoded before a second process has started

Decoded = Audio | RecordingError


@contextmanager
def decoding(
    recordings: Iterable[Recording], channels: Channels, *, num_workers: int, limits: Limits | None = None
) -> Iterator[Iterator[Decoded]]:
    """`recordings` decoded in order, each its audio or why there is none. Decoding starts at once; the processes live
    as long as the context. An error that `recordings` raises comes after what it gave."""
    ahead = _Ahead(iter(recordings))
    workers = [Worker(channels, limits or Limits()) for _ in range(num_workers)]
    threads = [threading.Thread(target=ahead.serve, args=(worker,), daemon=True) for worker in workers]
    for thread in threads:
        thread.start()
    try:
        yield ahead.take()
    finally:
        ahead.close()
        for worker in workers:
            worker.stop()
        for thread in threads:
            thread.join()


def workers_for(num_recordings: int | None) -> int:
    """How many processes decode so many recordings (None: many) beside a model: half of the processors at most."""
    most = max(1, num_processors() // 2)
    return most if num_recordings is None else max(1, min(most, -(-num_recordings // RECORDINGS_PER_WORKER)))


def num_processors() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


class _ClosedError(Exception):
    """Nobody takes results any more."""


class _Ahead:
    """What is claimed by the workers' threads, decoded, and taken: counted by the recordings' place in their order."""

    def __init__(self, recordings: Iterator[Recording]) -> None:
        self._recordings = recordings
        self._changed = threading.Condition()
        self._results: dict[int, Decoded | BaseException] = {}
        self._num_claimed = self._num_taken = self._num_bytes = 0
        self._is_exhausted = self._is_closed = False

    def take(self) -> Iterator[Decoded]:
        """The results in order, waited for."""
        while True:
            with self._changed:
                self._changed.wait_for(self._can_take)
                if self._num_taken not in self._results:
                    return
                result = self._results.pop(self._num_taken)
                self._num_taken += 1
                if isinstance(result, Audio):
                    self._num_bytes -= result.waveforms.nbytes
                self._changed.notify_all()
            if not isinstance(result, Audio | RecordingError):
                raise result
            yield result

    def _can_take(self) -> bool:
        return self._num_taken in self._results or (self._is_exhausted and self._num_taken == self._num_claimed)

    def close(self) -> None:
        """Nothing more is taken; those who wait for room are woken."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def serve(self, worker: Worker) -> None:
        """Has one recording after the other decoded, until there are no more. The worker's process dies with this
        thread."""
        try:
            while claimed := self._claim():
                self._put(claimed[0], self._decoded(worker, *claimed))
        except _ClosedError:
            return
        finally:
            worker.end()

    def _claim(self) -> tuple[int, Recording] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._is_exhausted or self._has_room(self._num_claimed))
            if self._is_closed or self._is_exhausted:
                return None
            index = self._num_claimed
            try:
                recording = next(self._recordings, None)
            except BaseException as error:  # of the listing: raised where the results are taken
                self._results[index] = error
                recording = None
            if recording is None:
                self._is_exhausted = True
                self._changed.notify_all()
                return None
            self._num_claimed += 1
            return index, recording

    def _decoded(self, worker: Worker, index: int, recording: Recording) -> Decoded | BaseException:
        try:
            return worker.decode(recording, lambda num_bytes: self._came(index, num_bytes))
        except RecordingError as failure:
            return failure
        except _ClosedError:
            raise
        except BaseException as error:  # our own: raised where the results are taken
            return error

    def _came(self, index: int, num_bytes: int) -> None:
        """Counts what came of a recording, and waits until there is room for more."""
        with self._changed:
            self._num_bytes += num_bytes
            self._changed.wait_for(lambda: self._is_closed or num_bytes < 0 or self._has_room(index))
            if self._is_closed:
                raise _ClosedError

    def _has_room(self, index: int) -> bool:
        """What is taken next always has."""
        is_next = index == self._num_taken
        return is_next or (self._num_bytes < AHEAD_BYTES and index - self._num_taken < AHEAD_RECORDINGS)

    def _put(self, index: int, result: Decoded | BaseException) -> None:
        with self._changed:
            self._results[index] = result
            self._changed.notify_all()
