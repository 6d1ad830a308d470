"""What an output holds of every recording, in columns: small enough for a million of them, looked up many at a time.

Covered: whether a listed recording is unchanged, and what it has been answered for. `answered`, which says the same of
nearly all, is kept as one number per recording.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from svbatch.corpus.recording import Recording

COLUMNS = ["uri", "recording_id", "size_bytes", "modified_at", "etag", "span_start", "duration", "status", "answered"]
NONE = -1
WHEN = pa.timestamp("us", tz="UTC")


@dataclass(frozen=True, eq=False)
class Recorded:
    """N rows of `recordings`: `uris`, `recording_ids` and `etags` are large strings (N,), sizes in bytes, times in
    microseconds since 1970, durations in seconds (NaN where unknown); `copyable` is False for spans and for what could
    not be read. `history` (N,) are places in `histories`, the distinct values of `answered`."""

    uris: pa.Array
    recording_ids: pa.Array
    etags: pa.Array
    size_bytes: NDArray[np.int64]
    modified_us: NDArray[np.int64]
    duration_s: NDArray[np.float64]
    copyable: NDArray[np.bool_]
    history: NDArray[np.int32]
    histories: tuple[tuple[str, ...], ...]

    def unchanged_rows(self, recordings: Sequence[Recording]) -> list[int]:
        """The row of each recording that is as it was: the same ETag where both have one, else the same size and time
        of modification. NONE for a new or changed one."""
        uris = pa.array([recording.uri for recording in recordings], pa.large_string())
        found = pc.index_in(uris, value_set=self.uris).fill_null(NONE).to_numpy(zero_copy_only=False)
        if not len(self.uris):
            return [NONE] * len(recordings)
        listed = pa.array([recording.etag for recording in recordings], pa.large_string())
        held = self.etags.take(pa.array(np.maximum(found, 0)))
        told = pc.and_(listed.is_valid(), held.is_valid()).to_numpy(zero_copy_only=False)
        same_etag = pc.equal(listed, held).fill_null(False).to_numpy(zero_copy_only=False)
        sizes = np.fromiter((recording.size_bytes for recording in recordings), np.int64, len(recordings))
        same = (sizes == self.size_bytes[found]) & (_microseconds(recordings) == self.modified_us[found])
        rows: list[int] = np.where(np.where(told, same_etag, same), found, NONE).tolist()
        return rows

    def answered(self, row: int) -> tuple[str, ...]:
        """The task versions that the recording of a row has been answered for."""
        return self.histories[self.history[row]] if row != NONE else ()

    def ids_answered(self, keys: Sequence[str], besides: Iterable[str]) -> frozenset[str]:
        """The ids of whole recordings that are answered for all task versions of `keys`, without those of the uris
        `besides`."""
        has_all = np.array([set(keys) <= set(history) for history in self.histories], np.bool_)
        usable = self.copyable & has_all[self.history]
        gone = pc.is_in(self.uris, value_set=pa.array(list(besides), pa.large_string()))
        usable &= ~gone.to_numpy(zero_copy_only=False)
        return frozenset(self.recording_ids.filter(pa.array(usable)).drop_null().to_pylist())


def read_recorded(batches: Iterable[pa.RecordBatch]) -> Recorded:
    """The rows of record batches with the columns COLUMNS, which are let go one after another."""
    places: dict[str, int] = {}
    parts: list[dict[str, pa.Array]] = []
    for batch in batches:
        columns = dict(zip(batch.schema.names, batch.columns, strict=True))
        joined = pc.binary_join(columns["answered"], "\n").dictionary_encode()
        of_batch = [places.setdefault(history, len(places)) for history in joined.dictionary.to_pylist()]
        is_whole = pc.and_(columns["span_start"].is_null(), pc.not_equal(columns["status"], "failed"))
        parts.append(
            {
                "uri": columns["uri"].cast(pa.large_string()),
                "recording_id": columns["recording_id"].cast(pa.large_string()),
                "etag": columns["etag"].cast(pa.large_string()),
                "size": columns["size_bytes"],
                "modified": columns["modified_at"].cast(WHEN).cast(pa.int64()),
                "duration": columns["duration"].fill_null(float("nan")),
                "copyable": is_whole,
                "history": pa.array(np.array(of_batch, np.int32)[joined.indices.to_numpy()], pa.int32()),
            }
        )

    def column(name: str, kind: pa.DataType) -> pa.Array:
        return pa.concat_arrays([part[name] for part in parts]) if parts else pa.array([], kind)

    def numbers(name: str, kind: pa.DataType) -> NDArray[np.generic]:
        values: NDArray[np.generic] = column(name, kind).to_numpy(zero_copy_only=False)
        return values

    return Recorded(
        uris=column("uri", pa.large_string()),
        recording_ids=column("recording_id", pa.large_string()),
        etags=column("etag", pa.large_string()),
        size_bytes=numbers("size", pa.int64()).astype(np.int64),
        modified_us=numbers("modified", pa.int64()).astype(np.int64),
        duration_s=numbers("duration", pa.float64()).astype(np.float64),
        copyable=numbers("copyable", pa.bool_()).astype(np.bool_),
        history=numbers("history", pa.int32()).astype(np.int32),
        histories=tuple(tuple(history.split("\n")) if history else () for history in places),
    )


def _microseconds(recordings: Sequence[Recording]) -> NDArray[np.int64]:
    times = pa.array([recording.modified_at for recording in recordings], WHEN)
    values: NDArray[np.int64] = times.cast(pa.int64()).to_numpy()
    return values
