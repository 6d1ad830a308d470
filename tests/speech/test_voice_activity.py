from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from svbatch.bundle import VoiceActivityPart, describe_file, find_bundle
from svbatch.corpus.segment import Detector, speech_segments
from svbatch.fetch import fetch
from svbatch.model import load_voice_activity
from svbatch.onnx import OnnxSession
from svbatch.speech import voice_activity
from svbatch.speech.voice_activity import (
    CHUNK_SAMPLES,
    CONTEXT_SAMPLES,
    SPEECH_BEGINS,
    SPEECH_ENDS,
    spans_of,
    speech_probabilities,
    speech_spans,
)
from svbatch.training.data import read_manifest, read_waveform
from svbatch.training.publish import publish

SECOND = 16_000
QUICKSTART = Path(__file__).parents[2] / "jobs" / "quickstart"
TIMES = np.arange(6 * SECOND) / SECOND


def noise(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    return (0.1 * np.random.default_rng(seed).standard_normal(num_samples)).astype(np.float32)


def one_by_one(waveform: NDArray[np.float32], session) -> list[float]:
    """The slow version: a chunk after the other, each with the last 64 samples of the one before."""
    state = {"h": np.zeros((1, 1, 128), np.float32), "c": np.zeros((1, 1, 128), np.float32)}
    context = np.zeros(CONTEXT_SAMPLES, np.float32)
    probabilities = []
    for start in range(0, len(waveform), CHUNK_SAMPLES):
        chunk = np.zeros(CHUNK_SAMPLES, np.float32)
        chunk[: len(waveform) - start] = waveform[start : start + CHUNK_SAMPLES]
        found = session.run({"input": np.concatenate([context, chunk])[None], **state})
        probabilities.append(float(found["speech_probs"][0]))
        state = {"h": found["hn"], "c": found["cn"]}
        context = chunk[-CONTEXT_SAMPLES:]
    return probabilities


@pytest.mark.parametrize("num_samples", [0, 1, 511, 512, 513, 20_000])
def test_there_is_a_probability_for_each_32_ms_begun(detector_graph, num_samples):
    assert speech_probabilities(noise(num_samples), OnnxSession(detector_graph())).shape == (
        -(-num_samples // CHUNK_SAMPLES),
    )


@pytest.mark.parametrize("chunks_per_call", [1, 7, 2048])
def test_however_it_is_divided_into_calls_the_probabilities_are_those_of_one_chunk_at_a_time(
    detector_graph, monkeypatch, chunks_per_call
):
    monkeypatch.setattr(voice_activity, "CHUNKS_PER_CALL", chunks_per_call)
    session, waveform = OnnxSession(detector_graph()), noise(20_000)
    expected = one_by_one(waveform, session)
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(speech_probabilities(waveform, session), expected, atol=1e-5)


def test_a_recording_is_heard_as_if_there_were_no_other(detector_graph):
    session = OnnxSession(detector_graph())
    alone = speech_probabilities(noise(9_000), session)
    speech_probabilities(noise(30_000, seed=1), session)
    np.testing.assert_array_equal(speech_probabilities(noise(9_000), session), alone)


def test_the_last_span_ends_with_the_waveform(detector_graph):
    assert speech_spans(noise(1_000), OnnxSession(detector_graph(bias=50))) == [(0, 1_000)]
    assert speech_spans(noise(1_000), OnnxSession(detector_graph(bias=-50))) == []


@pytest.mark.parametrize(
    ("probabilities", "expected"),
    [
        ([], []),
        ([0.1, 0.3, 0.39, 0.3], []),
        ([0.1, 0.4, 0.1], [(1, 2)]),
        ([0.3, 0.9, 0.25, 0.26, 0.24, 0.9], [(1, 4), (5, 6)]),
        ([0.9, 0.2, 0.3, 0.2, 0.3, 0.4], [(0, 1), (5, 6)]),
    ],
)
def test_speech_begins_at_one_probability_and_ends_below_a_lower_one(probabilities, expected):
    assert spans_of(np.array(probabilities, np.float32)) == expected


@settings(deadline=None)
@given(st.lists(st.floats(0, 1, width=32), max_size=60))
def test_spans_hold_all_that_is_surely_speech_and_nothing_that_surely_is_not(listed: list[float]) -> None:
    probabilities = np.array(listed, np.float32)
    spans = spans_of(probabilities)
    edges = [edge for span in spans for edge in span]
    assert edges == sorted(edges)
    inside = np.zeros(len(listed), bool)
    for start, end in spans:
        assert probabilities[start] >= SPEECH_BEGINS
        assert end == len(listed) or probabilities[end] < SPEECH_ENDS
        inside[start:end] = True
    assert inside[probabilities >= SPEECH_BEGINS].all()
    assert not inside[probabilities < SPEECH_ENDS].any()


def test_a_bundle_that_is_trained_over_another_keeps_its_detector(
    detector_graph, tiny_base, tiny_parts, tiny_recipe, tmp_path, exporting
):
    graph = detector_graph()
    entry = {**describe_file(graph, "MIT").model_dump(), "from": [f"file:{graph}"]}
    fields = tiny_base.manifest.model_dump(by_alias=True)
    fields |= {"voice_activity": {"graph": "detector.onnx"}}
    fields["fetched"] |= {"detector.onnx": entry}
    base = replace(tiny_base, manifest=type(tiny_base.manifest).model_validate(fields))
    facts = {"description": "for a test", "data": [], "figures": {}, "not_for": ""}
    with exporting():
        made = publish(tiny_parts, tiny_recipe, base, tmp_path / "made", calibration={}, facts=facts)
    assert made.manifest.voice_activity == VoiceActivityPart(graph="detector.onnx")
    assert made.id != replace(made, manifest=made.manifest.model_copy(update={"voice_activity": None})).id
    fetch(made)
    assert load_voice_activity(made) is not None


@pytest.fixture(scope="module")
def silero() -> Detector:
    """The detector of mini, fetched into the user's cache. For slow tests."""
    bundle = find_bundle("mini")
    fetch(bundle)
    return partial(speech_spans, session=load_voice_activity(bundle))


def tones(*frequencies: float, decay: float = 0.0) -> NDArray[np.float32]:
    """Six seconds of sines at once, struck every half second and dying away by `decay` per second."""
    waves = sum(np.sin(2 * np.pi * frequency * TIMES) for frequency in frequencies)
    return (0.1 * waves * np.exp(-decay * (TIMES % 0.5))).astype(np.float32)


def clicks() -> NDArray[np.float32]:
    waveform = 1e-3 * noise(TIMES.size)
    waveform[np.random.default_rng(1).integers(0, TIMES.size, 12)] = 0.9
    return waveform


@pytest.mark.slow
@pytest.mark.parametrize(
    "waveform",
    [
        *(10 ** (level / 20) * noise(TIMES.size) for level in (-40, -20, 0)),
        np.cumsum(noise(TIMES.size)).astype(np.float32) / 100,
        tones(440.0),
        tones(1000.0),
        pytest.param(
            tones(*(50.0 * k for k in range(1, 8))) + 0.02 * noise(TIMES.size),
            marks=pytest.mark.xfail(
                strict=True, reason="the first second of a buzz that sets in at once is taken for speech"
            ),
        ),
        tones(220.0, 277.2, 329.6, decay=4.0),
        tones(110.0, 130.8, 164.8, 220.0, decay=6.0),
        clicks(),
    ],
    ids=["faint hiss", "hiss", "loud hiss", "rumble", "440 Hz", "1 kHz", "buzz", "major", "minor", "clicks"],
)
def test_sound_without_speech_has_no_segment(silero: Detector, waveform: NDArray[np.float32]) -> None:
    assert speech_segments(waveform)
    assert speech_segments(waveform, silero) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["appointment", "delivery", "late", "refund"])
def test_clean_speech_has_the_segments_that_the_gate_alone_gives(silero: Detector, name: str) -> None:
    waveform = read_waveform(QUICKSTART / f"{name}.ogg")
    assert speech_segments(waveform, silero) == speech_segments(waveform) != []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["noise", "silence"])
def test_the_recordings_of_the_quickstart_without_speech_have_no_segment(silero: Detector, name: str) -> None:
    assert speech_segments(read_waveform(QUICKSTART / f"{name}.ogg"), silero) == []


@pytest.mark.slow
def test_noise_around_speech_is_not_part_of_its_segment(silero: Detector) -> None:
    speech = read_waveform(QUICKSTART / "refund.ogg")
    hiss = 0.02 * noise(20 * SECOND)
    waveform = np.concatenate([hiss, speech, hiss])
    [segment] = speech_segments(waveform, silero)
    assert segment.start > 18 * SECOND
    assert segment.end < waveform.size - 18 * SECOND
    assert segment.num_samples > 0.5 * speech.size


@pytest.mark.slow
@pytest.mark.parametrize("name", ["appointment", "delivery", "late", "refund"])
@pytest.mark.parametrize("change", ["quiet", "telephone", "one sound"])
def test_speech_is_heard_quiet_narrow_and_short(silero: Detector, name: str, change: str) -> None:
    waveform = read_waveform(QUICKSTART / f"{name}.ogg")
    if change == "quiet":
        waveform = waveform * np.float32(0.003 / np.abs(waveform).max())
    elif change == "telephone":
        spectrum, frequencies = np.fft.rfft(waveform), np.fft.rfftfreq(waveform.size, 1 / SECOND)
        spectrum[(frequencies < 300) | (frequencies > 3400)] = 0
        waveform = np.fft.irfft(spectrum, waveform.size).astype(np.float32)
    else:
        loudest = int(np.convolve(waveform**2, np.ones(6_400), "valid").argmax())
        waveform = waveform[loudest : loudest + 6_400]
    assert speech_segments(waveform, silero)


@pytest.mark.slow
def test_held_out_speech_is_kept_and_most_other_sound_is_not(held_out_data: Path, silero: Detector) -> None:
    kept = {True: 0, False: 0}
    heard = {True: 0, False: 0}
    for example in read_manifest(held_out_data / "dev.jsonl"):
        speaks = example.source not in ("esc10", "librosa_data")
        waveform = read_waveform(example.path)
        heard[speaks] += bool(speech_segments(waveform))
        kept[speaks] += bool(speech_segments(waveform, silero))
    print(f"speech {kept[True]} of {heard[True]}, other sound {kept[False]} of {heard[False]}")
    assert kept[True] >= 0.99 * heard[True]
    assert kept[False] <= 0.4 * heard[False]
