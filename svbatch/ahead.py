"""The batches of a plan with their recordings' audio: while one is asked, the next are listed and decoded."""

from collections.abc import Iterator
from contextlib import contextmanager
from queue import SimpleQueue

from svbatch.corpus.decode import Channels
from svbatch.corpus.recording import Recording
from svbatch.corpus.workers import Decoded, decoding, workers_for
from svbatch.plan import RECORDINGS_PER_BATCH, Batch


@contextmanager
def decoded_ahead(
    first: Batch, others: Iterator[Batch], channels: Channels
) -> Iterator[Iterator[tuple[Batch, Iterator[Decoded]]]]:
    """Each batch, with an iterator that gives what its recordings decode to next. `others` are taken by another thread;
    an error that they raise comes after their last batch."""
    planned: SimpleQueue[Batch | None] = SimpleQueue()

    def recordings() -> Iterator[Recording]:
        try:
            planned.put(first)
            yield from first.recordings
            for batch in others:
                planned.put(batch)
                yield from batch.recordings
        finally:
            planned.put(None)

    def taken(decoded: Iterator[Decoded]) -> Iterator[tuple[Batch, Iterator[Decoded]]]:
        while (batch := planned.get()) is not None:
            yield batch, decoded
        next(decoded, None)

    is_all = len(first.recordings) < RECORDINGS_PER_BATCH
    num_workers = workers_for(len(first.recordings) if is_all else None)
    with decoding(recordings(), channels, num_workers=num_workers) as decoded:
        yield taken(decoded)
