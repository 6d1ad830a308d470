"""Parts of a source: its spans and its channels."""

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from sounds import FLAC, MP3, OPUS, VORBIS, WAV, decoded, encoded, tone, without_length

from svbatch.corpus.decode import Contents, decode
from svbatch.corpus.recording import Span
from svbatch.corpus.sources import recording_at
from svbatch.errors import RecordingError


@pytest.mark.parametrize(
    ("content", "tolerance"),
    [(WAV, 0), (FLAC, 0), (MP3, 0), (OPUS, 0), (VORBIS, 0)],
    ids=["WAV", "FLAC", "MP3", "Opus", "Vorbis"],
)
def test_a_span_is_the_samples_of_the_whole(tmp_path: Path, content: bytes, tolerance: float) -> None:
    path = tmp_path / "a.wav"
    whole = decoded(path, content)
    span = decode(replace(recording_at(path), span=Span(0.25, 0.75)))
    np.testing.assert_array_equal(span.waveform, whole.waveform[4000:12_000])
    assert (span.duration_s, span.sample_rate_hz) == (0.5, 16_000)


def test_a_span_without_an_end_goes_to_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(WAV)
    span = decode(replace(recording_at(tmp_path / "a.wav"), span=Span(0.75)))
    assert span.waveform.shape == (4000,)


def test_a_spans_id_is_the_hash_of_bytes_and_span(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(WAV)
    span = decode(replace(recording_at(tmp_path / "a.wav"), span=Span(0.25, 0.75)))
    assert span.recording_id == hashlib.sha256(WAV + b"#t=0.25,0.75").hexdigest()
    open_ended = decode(replace(recording_at(tmp_path / "a.wav"), span=Span(0.25)))
    assert open_ended.recording_id == hashlib.sha256(WAV + b"#t=0.25,None").hexdigest()


@pytest.mark.parametrize(
    "content", [WAV, FLAC, MP3, OPUS, without_length(FLAC)], ids=["WAV", "FLAC", "MP3", "Opus", "pipe"]
)
@pytest.mark.parametrize(
    ("span", "said"),
    [
        (Span(0.5, 7.5), "from 0.5 s to 7.5 s"),
        (Span(8.0, 9.0), "from 8 s to 9 s"),
        (Span(8.0), "from 8 s to its end"),
    ],
)
def test_a_span_past_the_end_is_refused_with_both_numbers(
    tmp_path: Path, content: bytes, span: Span, said: str
) -> None:
    (tmp_path / "a.wav").write_bytes(content)
    length = round(decode(recording_at(tmp_path / "a.wav")).duration_s, 3)
    with pytest.raises(RecordingError) as error:
        decode(replace(recording_at(tmp_path / "a.wav"), span=span))
    assert error.value.code == "bad_span"
    assert f"is listed {said}, and the source is {length:g} s long; correct the manifest" in str(error.value)


def test_a_span_may_end_a_rounding_past_the_end(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(WAV)
    assert decode(replace(recording_at(tmp_path / "a.wav"), span=Span(0.5, 1.005))).waveform.shape == (8000,)


def test_a_span_of_a_source_that_is_too_long_is_heard(tmp_path: Path) -> None:
    (tmp_path / "a.wav").write_bytes(encoded(np.zeros(13 * 3600 * 2000), 2000, subtype="PCM_U8"))
    recording = recording_at(tmp_path / "a.wav")
    assert decode(replace(recording, span=Span(45_000, 45_001))).waveform.shape == (16_000,)


def test_the_first_channel_and_each_channel_can_be_heard_alone(tmp_path: Path) -> None:
    left, right = tone(1, 16_000), tone(1, 16_000, hz=880)
    path = tmp_path / "a.wav"
    path.write_bytes(encoded(np.stack([left, right], axis=1), 16_000))
    first, each = decode(recording_at(path), "first"), decode(recording_at(path), "each")
    assert (first.tracks, each.tracks, decode(recording_at(path)).tracks) == ((0,), (0, 1), (None,))
    np.testing.assert_allclose(first.waveform, left, atol=1e-4)
    np.testing.assert_allclose(each.waveforms, [left, right], atol=1e-4)


def test_a_source_is_read_once_for_spans_that_follow_one_another(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(WAV)
    source, contents = recording_at(path), Contents()
    spans = [replace(source, uri=f"{source.uri}#t={at},{at + 0.25}", span=Span(at, at + 0.25)) for at in (0.0, 0.5)]
    expected = [decode(span).recording_id for span in spans]
    assert contents.of(spans[0]) == (WAV, expected[0])
    path.unlink()
    assert contents.of(spans[1]) == (WAV, expected[1])
    with pytest.raises(RecordingError, match="cannot be read"):
        contents.of(source)
