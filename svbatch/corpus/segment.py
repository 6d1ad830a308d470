"""Which spans of a recording are heard: integer arithmetic on samples at 16 kHz.

Covered: stretches of sound by an energy gate, and windows that hold the silences too. Not covered: telling
speech from other sound; noise and music pass the gate.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svbatch.corpus.decode import SAMPLE_RATE_HZ

WINDOW_SAMPLES = 30 * SAMPLE_RATE_HZ  # the longest segment
FRAME_SAMPLES = SAMPLE_RATE_HZ // 50  # the gate opens and shuts every 20 ms
MAX_GAP_SAMPLES = 2 * SAMPLE_RATE_HZ  # a longer silence parts two segments; a shorter one at an edge belongs to one
PADDING_SAMPLES = SAMPLE_RATE_HZ // 5  # kept before the first and after the last loud frame
CUT_SEARCH_SAMPLES = 10 * SAMPLE_RATE_HZ  # a long stretch is cut in the last 10 s of the window
MIN_REST_SAMPLES = SAMPLE_RATE_HZ  # what a cut leaves is not shorter
CUT_FRAMES = 15  # a cut lies in the middle of the quietest 0.3 s

SILENCE_DBFS = -70.0  # nothing below it is heard; the last bit of 16 is near -96
# The gate lies 10 dB above the noise floor (what 90% of the audible frames exceed), or in a noisy recording
# lower: 25 dB below the loud frames (what 5% exceed; the loudest may be a click, louder than all speech).
ABOVE_NOISE_DB, NOISE_PERCENTILE = 10.0, 10
BELOW_LOUD_DB, LOUD_PERCENTILE = 25.0, 95


@dataclass(frozen=True, order=True)
class Segment:
    """The span [start, end) of a recording, in samples at 16 kHz."""

    start: int
    end: int

    @property
    def start_s(self) -> float:
        return self.start / SAMPLE_RATE_HZ

    @property
    def end_s(self) -> float:
        return self.end / SAMPLE_RATE_HZ

    @property
    def num_samples(self) -> int:
        return self.end - self.start


def windows(num_samples: int, segments: Sequence[Segment]) -> list[Segment]:
    """A whole recording of S samples in windows of at most 30 s, in time order: its `segments`, and what lies before,
    between and after them. None for a recording without samples."""
    edges = [0, *(edge for segment in segments for edge in (segment.start, segment.end)), num_samples]
    between = zip(edges[::2], edges[1::2], strict=True)
    silences = [
        Segment(start, min(start + WINDOW_SAMPLES, end))
        for first, end in between
        for start in range(first, end, WINDOW_SAMPLES)
    ]
    return sorted([*segments, *silences])


def speech_segments(waveform: NDArray[np.float32]) -> list[Segment]:
    """The spans of a waveform (S,) that are louder than its background, in time order, each of at most 30 s.

    They hold every frame that passes the gate, 0.2 s of padding, and silences of at most 2 s, those at the recording's
    edges too. A longer stretch is cut at its quietest point. Empty if nothing passes the gate.
    """
    levels = frame_levels(waveform)
    loud = np.flatnonzero(loud_frames(levels))
    if not loud.size:
        return []
    starts, ends = loud * FRAME_SAMPLES, (loud + 1) * FRAME_SAMPLES
    gaps = np.flatnonzero(starts[1:] - ends[:-1] > MAX_GAP_SAMPLES)
    first = np.maximum(starts[np.r_[0, gaps + 1]] - PADDING_SAMPLES, 0)
    last = np.minimum(ends[np.r_[gaps, loud.size - 1]] + PADDING_SAMPLES, waveform.size)
    first[0] = 0 if first[0] <= MAX_GAP_SAMPLES else first[0]
    last[-1] = waveform.size if waveform.size - last[-1] <= MAX_GAP_SAMPLES else last[-1]
    stretches = zip(first.tolist(), last.tolist(), strict=True)
    return [segment for start, end in stretches for segment in _windows(start, end, levels)]


def frame_levels(waveform: NDArray[np.float32]) -> NDArray[np.float32]:
    """The level of each 20 ms of a waveform (S,): (ceil(S / 320),), in dB of full scale, at least -200.

    A frame's mean is removed first, so a constant offset is silence. The last frame may be shorter.
    """
    whole = waveform.size // FRAME_SAMPLES * FRAME_SAMPLES
    deviations = waveform[:whole].reshape(-1, FRAME_SAMPLES).std(axis=1)
    if whole < waveform.size:
        deviations = np.append(deviations, waveform[whole:].std())
    levels: NDArray[np.float32] = 20 * np.log10(np.maximum(deviations, np.float32(1e-10)))
    return levels


def loud_frames(levels: NDArray[np.float32]) -> NDArray[np.bool_]:
    """The gate: True for each frame (T,) above silence and above this recording's own background."""
    audible = levels[levels > SILENCE_DBFS]
    if not audible.size:
        return np.zeros(levels.shape, np.bool_)
    noise, loud = np.percentile(audible, [NOISE_PERCENTILE, LOUD_PERCENTILE])
    threshold = max(SILENCE_DBFS, min(noise + ABOVE_NOISE_DB, loud - BELOW_LOUD_DB))
    passes: NDArray[np.bool_] = levels > threshold
    return passes


def _windows(start: int, end: int, levels: NDArray[np.float32]) -> list[Segment]:
    """[start, end) in segments of at most 30 s, each but the last cut 20 to 30 s after its start."""
    segments = []
    while end - start > WINDOW_SAMPLES:
        earliest = start + WINDOW_SAMPLES - CUT_SEARCH_SAMPLES
        cut = _quietest(earliest, min(start + WINDOW_SAMPLES, end - MIN_REST_SAMPLES), levels)
        segments.append(Segment(start, cut))
        start = cut
    return [*segments, Segment(start, end)]


def _quietest(start: int, end: int, levels: NDArray[np.float32]) -> int:
    """The middle of the quietest 0.3 s between two samples."""
    first = -(-start // FRAME_SAMPLES)
    sums = np.convolve(levels[first : end // FRAME_SAMPLES], np.ones(CUT_FRAMES), mode="valid")
    return (first + int(sums.argmin())) * FRAME_SAMPLES + CUT_FRAMES * FRAME_SAMPLES // 2
