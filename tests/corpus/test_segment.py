import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from svbatch.corpus.segment import (
    DETECTION_DBFS,
    FRAME_SAMPLES,
    MIN_REST_SAMPLES,
    PADDING_SAMPLES,
    REACH_SAMPLES,
    WINDOW_SAMPLES,
    Detector,
    Segment,
    frame_levels,
    loud_frames,
    speech_frames,
    speech_segments,
    windows,
)

SECOND = 16_000

Part = tuple[float, float]  # seconds, level in dB of full scale


def noise(*parts: Part, num_extra_samples: int = 0) -> NDArray[np.float32]:
    """White noise of the given parts, the same at every call; `num_extra_samples` lengthen each part."""
    rng = np.random.default_rng(7)
    pieces = [
        rng.standard_normal(round(seconds * SECOND) + num_extra_samples) * 10 ** (level / 20)
        for seconds, level in parts
    ]
    return np.concatenate([np.zeros(0), *pieces]).astype(np.float32)


parts = st.lists(st.tuples(st.floats(0, 25), st.sampled_from([-200.0, -80.0, -65.0, -50.0, -30.0, -10.0])), max_size=5)
extra_samples = st.integers(0, 2 * FRAME_SAMPLES)


@settings(deadline=None, max_examples=30)
@given(parts, extra_samples)
def test_segments_are_ordered_disjoint_inside_the_recording_and_fit_the_window(
    parts: list[Part], num_extra_samples: int
) -> None:
    waveform = noise(*parts, num_extra_samples=num_extra_samples)
    segments = speech_segments(waveform)
    edges = [edge for segment in segments for edge in (segment.start, segment.end)]
    assert edges == sorted(edges)
    assert all(0 <= edge <= waveform.size for edge in edges)
    assert all(0 < segment.num_samples <= WINDOW_SAMPLES for segment in segments)


@settings(deadline=None, max_examples=30)
@given(parts, extra_samples)
def test_every_sample_above_the_gate_is_covered_and_no_segment_is_without_one(
    parts: list[Part], num_extra_samples: int
) -> None:
    waveform = noise(*parts, num_extra_samples=num_extra_samples)
    loud = np.repeat(loud_frames(frame_levels(waveform)), FRAME_SAMPLES)[: waveform.size]
    covered = np.zeros(waveform.size, dtype=bool)
    segments = speech_segments(waveform)
    for segment in segments:
        covered[segment.start : segment.end] = True
    assert not (loud & ~covered).any()
    assert bool(segments) == bool(loud.any())


@settings(deadline=None, max_examples=30)
@given(parts, extra_samples)
def test_windows_are_the_segments_and_all_that_lies_between(parts: list[Part], num_extra_samples: int) -> None:
    waveform = noise(*parts, num_extra_samples=num_extra_samples)
    segments = speech_segments(waveform)
    found = windows(waveform.size, segments)
    assert set(segments) <= set(found)
    assert [window.start for window in found] == [0, *(window.end for window in found[:-1])][: len(found)]
    assert not found or found[-1].end == waveform.size
    assert all(0 < window.num_samples <= WINDOW_SAMPLES for window in found)


@pytest.mark.parametrize(
    ("num_samples", "expected"),
    [
        (0, []),
        (1, [Segment(0, 1)]),
        (480_000, [Segment(0, 480_000)]),
        (480_001, [Segment(0, 480_000), Segment(480_000, 480_001)]),
    ],
)
def test_windows_of_silence_are_30_s_long(num_samples: int, expected: list[Segment]) -> None:
    assert windows(num_samples, []) == expected


def test_a_recording_with_short_silences_at_its_edges_is_one_segment_and_one_window() -> None:
    waveform = noise((1.5, -60.0), (20, -20.0), (2, -60.0))
    assert speech_segments(waveform) == windows(waveform.size, speech_segments(waveform))
    assert speech_segments(waveform) == [Segment(0, waveform.size)]


@pytest.mark.parametrize(
    "waveform",
    [
        np.zeros(0, np.float32),
        np.ones(1, np.float32),
        np.zeros(50 * SECOND, np.float32),
        np.full(50 * SECOND, 0.1, np.float32),
        noise((5, -80.0)),
    ],
    ids=["no sample", "one sample", "digital silence", "constant offset", "below -70 dB"],
)
def test_silence_has_no_segment(waveform: NDArray[np.float32]) -> None:
    assert speech_segments(waveform) == []


def test_a_short_recording_is_trimmed_to_what_is_loud_and_its_padding() -> None:
    waveform = noise((3, -60.0), (2, -20.0), (1.5, -60.0), (1, -20.0), (3, -60.0))
    assert speech_segments(waveform) == [Segment(3 * SECOND - PADDING_SAMPLES, 15 * SECOND // 2 + PADDING_SAMPLES)]


def test_padding_stays_inside_the_recording() -> None:
    assert speech_segments(noise((1, -20.0))) == [Segment(0, SECOND)]


@pytest.mark.parametrize(("gap_s", "num_segments"), [(2.0, 1), (2.02, 2)])
def test_a_gap_over_2_s_parts_two_segments(gap_s: float, num_segments: int) -> None:
    waveform = noise((2, -20.0), (gap_s, -200.0), (2, -20.0))
    assert len(speech_segments(waveform)) == num_segments


def test_quiet_speech_is_heard_beside_loud_clicks() -> None:
    click, background = (0.02, -3.0), (1.0, -60.0)
    waveform = noise(background, click, background, (4, -35.0), background, click, background)
    (segment,) = speech_segments(waveform)
    assert segment.start <= 2.02 * SECOND
    assert segment.end >= 6.02 * SECOND


@pytest.mark.parametrize("pause_s", [21.0, 25.0, 28.0])
def test_a_long_stretch_is_cut_in_its_quietest_pause(pause_s: float) -> None:
    waveform = noise((pause_s, -20.0), (0.5, -50.0), (40 - pause_s, -20.0))
    first, second = speech_segments(waveform)
    assert first.end == second.start
    assert pause_s * SECOND < first.end < (pause_s + 0.5) * SECOND


@pytest.mark.parametrize("num_samples", [WINDOW_SAMPLES, WINDOW_SAMPLES + 1, 2 * WINDOW_SAMPLES + 1])
def test_no_segment_is_a_splinter(num_samples: int) -> None:
    waveform = noise((num_samples / SECOND, -20.0))
    segments = speech_segments(waveform)
    assert (segments[0].start, segments[-1].end) == (0, waveform.size)
    assert min(segment.num_samples for segment in segments) >= MIN_REST_SAMPLES


def test_an_offset_changes_no_segment() -> None:
    waveform = noise((3, -60.0), (2, -20.0), (3, -60.0))
    assert speech_segments(waveform + np.float32(0.1)) == speech_segments(waveform)


spoken = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), max_size=3)  # spans, as shares of a stretch


def detecting(spans: list[tuple[float, float]]) -> Detector:
    return lambda stretch: [(int(min(span) * stretch.size), int(max(span) * stretch.size)) for span in spans]


def samples_of(segments: list[Segment], num_samples: int) -> NDArray[np.bool_]:
    inside = np.zeros(num_samples, dtype=bool)
    for segment in segments:
        inside[segment.start : segment.end] = True
    return inside


@settings(deadline=None, max_examples=40)
@given(parts, extra_samples, spoken)
def test_with_a_detector_segments_hold_every_loud_frame_of_its_speech_and_nothing_beyond_the_gates(
    parts: list[Part], num_extra_samples: int, spans: list[tuple[float, float]]
) -> None:
    waveform = noise(*parts, num_extra_samples=num_extra_samples)
    detect = detecting(spans)
    segments = speech_segments(waveform, detect)
    edges = [edge for segment in segments for edge in (segment.start, segment.end)]
    assert edges == sorted(edges)
    assert all(0 < segment.num_samples <= WINDOW_SAMPLES for segment in segments)
    inside = samples_of(segments, waveform.size)
    assert not (inside & ~samples_of(speech_segments(waveform), waveform.size)).any()
    speech = speech_frames(waveform, frame_levels(waveform), detect)
    assert not (np.repeat(speech, FRAME_SAMPLES)[: waveform.size] & ~inside).any()
    assert bool(segments) == bool(speech.any())
    found = windows(waveform.size, segments)
    assert [window.start for window in found] == [0, *(window.end for window in found[:-1])][: len(found)]
    assert not found or found[-1].end == waveform.size


@settings(deadline=None, max_examples=20)
@given(parts, extra_samples)
def test_a_detector_that_hears_speech_in_all_or_nothing_gives_all_segments_or_none(
    parts: list[Part], num_extra_samples: int
) -> None:
    waveform = noise(*parts, num_extra_samples=num_extra_samples)
    assert speech_segments(waveform, detecting([(0, 1)])) == speech_segments(waveform)
    assert speech_segments(waveform, detecting([])) == []


def test_a_detector_hears_each_stretch_that_passes_the_gate_alone_and_at_one_level() -> None:
    heard: list[NDArray[np.float32]] = []

    def detect(stretch: NDArray[np.float32]) -> list[tuple[int, int]]:
        heard.append(stretch)
        return []

    speech_segments(noise((3, -200.0), (2, -20.0), (5, -200.0), (4, -40.0), (3, -200.0)), detect)
    assert [stretch.size for stretch in heard] == [2 * SECOND + 2 * PADDING_SAMPLES, 4 * SECOND + 2 * PADDING_SAMPLES]
    for stretch in heard:
        levels = frame_levels(stretch)
        assert np.percentile(levels[levels > -70], 95) == pytest.approx(DETECTION_DBFS, abs=0.1)
    heard.clear()
    speech_segments(noise((30, -80.0)), detect)
    assert heard == []


def test_noise_over_2_s_beside_speech_is_left_out_and_its_edge_is_kept() -> None:
    waveform = noise((20, -20.0))
    [segment] = speech_segments(waveform, lambda _: [(8 * SECOND, 10 * SECOND)])
    assert segment == Segment(
        8 * SECOND - REACH_SAMPLES - PADDING_SAMPLES, 10 * SECOND + REACH_SAMPLES + PADDING_SAMPLES
    )


def test_seconds_and_samples_agree() -> None:
    segment = Segment(8_000, 40_000)
    assert (segment.start_s, segment.end_s, segment.num_samples) == (0.5, 2.5, 32_000)
