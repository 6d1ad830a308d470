"""Which spans of a recording are heard: integer arithmetic on samples at 16 kHz.

An energy gate first: what is below it is not looked at. Of what passes, a voice activity detector says what is speech;
without one (a bundle may have none) noise and music are segments too. Windows hold the silences as well.
"""

from collections.abc import Callable, Sequence
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

# A detector hears each stretch with its loud frames at this level (what 5% of them exceed), so that quiet speech is
# heard too. What is loud this near to its speech is speech as well: soft beginnings and endings of words.
DETECTION_DBFS = -15.0
REACH_SAMPLES = SAMPLE_RATE_HZ // 2

Detector = Callable[[NDArray[np.float32]], Sequence[tuple[int, int]]]
"""From a waveform (S,) to the spans [start, end) of it, in samples, in which somebody speaks."""


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


def speech_segments(waveform: NDArray[np.float32], detect: Detector | None = None) -> list[Segment]:
    """The spans of a waveform (S,) that hold speech, in time order, each of at most 30 s.

    They hold every frame of speech, 0.2 s of padding, and silences of at most 2 s, those at the recording's edges too.
    A longer stretch is cut at its quietest point. Empty if there is no speech. `detect` tells speech from other sound;
    without it all that passes the gate is taken for speech.
    """
    levels = frame_levels(waveform)
    speech = loud_frames(levels) if detect is None else speech_frames(waveform, levels, detect)
    return [segment for stretch in _stretches(speech, waveform.size) for segment in _windows(stretch, levels)]


def speech_frames(waveform: NDArray[np.float32], levels: NDArray[np.float32], detect: Detector) -> NDArray[np.bool_]:
    """True for each frame (T,) of a waveform (S,) that passes the gate within 0.5 s of what is detected as speech.

    Each stretch of loud frames is heard by itself, so that one holds nothing of another but its own silences.
    """
    loud = loud_frames(levels)
    near = np.zeros_like(loud)
    for stretch in _stretches(loud, waveform.size):
        frames = slice(stretch.start // FRAME_SAMPLES, -(-stretch.end // FRAME_SAMPLES))
        loudness = np.percentile(levels[frames][loud[frames]], LOUD_PERCENTILE)
        gain = np.float32(10 ** ((DETECTION_DBFS - loudness) / 20))
        for start, end in detect(waveform[stretch.start : stretch.end] * gain):
            first = (stretch.start + start - REACH_SAMPLES) // FRAME_SAMPLES
            near[max(first, 0) : -(-(stretch.start + end + REACH_SAMPLES) // FRAME_SAMPLES)] = True
    return loud & near


def _stretches(speech: NDArray[np.bool_], num_samples: int) -> list[Segment]:
    """Frames of speech (T,) in a recording of S samples with the padding and the silences that belong to them, of any
    length."""
    frames = np.flatnonzero(speech)
    if not frames.size:
        return []
    starts, ends = frames * FRAME_SAMPLES, (frames + 1) * FRAME_SAMPLES
    gaps = np.flatnonzero(starts[1:] - ends[:-1] > MAX_GAP_SAMPLES)
    first = np.maximum(starts[np.r_[0, gaps + 1]] - PADDING_SAMPLES, 0)
    last = np.minimum(ends[np.r_[gaps, frames.size - 1]] + PADDING_SAMPLES, num_samples)
    first[0] = 0 if first[0] <= MAX_GAP_SAMPLES else first[0]
    last[-1] = num_samples if num_samples - last[-1] <= MAX_GAP_SAMPLES else last[-1]
    return [Segment(start, end) for start, end in zip(first.tolist(), last.tolist(), strict=True)]


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


def _windows(stretch: Segment, levels: NDArray[np.float32]) -> list[Segment]:
    """A stretch in segments of at most 30 s, each but the last cut 20 to 30 s after its start."""
    segments = []
    start, end = stretch.start, stretch.end
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
