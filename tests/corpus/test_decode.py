import hashlib
import io
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import soundfile
from sounds import FLAC, MP3, OPUS, VORBIS, WAV, decoded, encoded, refusal, tone, without_length

from svbatch.corpus.decode import decode
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import RecordingError


def test_16_khz_mono_is_decoded_as_it_is(tmp_path: Path) -> None:
    audio = decoded(tmp_path / "a.wav", WAV)
    expected, _ = soundfile.read(io.BytesIO(WAV), dtype="float32")
    np.testing.assert_array_equal(audio.waveform, expected)
    assert audio.waveform.dtype == np.float32
    assert audio.recording_id == hashlib.sha256(WAV).hexdigest()
    assert (audio.duration_s, audio.sample_rate_hz, audio.channels) == (1.0, 16_000, 1)


@pytest.mark.parametrize("rate", [8_000, 11_025, 22_050, 44_100, 48_000, 96_000])
def test_any_rate_becomes_16_khz(tmp_path: Path, rate: int) -> None:
    audio = decoded(tmp_path / "a.wav", encoded(tone(1, rate), rate))
    assert audio.waveform.shape == (16_000,)
    inner = slice(400, -400)
    np.testing.assert_allclose(audio.waveform[inner], tone(1, 16_000)[inner], atol=2e-3)
    assert (audio.duration_s, audio.sample_rate_hz) == (1.0, rate)


def test_what_16_khz_cannot_hold_is_filtered_out(tmp_path: Path) -> None:
    audio = decoded(tmp_path / "a.wav", encoded(tone(1, 48_000, hz=12_000), 48_000))
    assert np.abs(audio.waveform[400:-400]).max() < 1e-3


def test_channels_are_mixed_by_their_mean(tmp_path: Path) -> None:
    left = tone(1, 16_000)
    audio = decoded(tmp_path / "a.wav", encoded(np.stack([left, np.zeros(16_000)], axis=1), 16_000))
    np.testing.assert_allclose(audio.waveform, left / 2, atol=1e-4)
    assert audio.channels == 2


@pytest.mark.parametrize(
    ("container", "subtype", "tolerance"),
    [
        ("WAV", "PCM_U8", 1e-2),
        ("WAV", "PCM_24", 1e-6),
        ("WAV", "PCM_32", 1e-6),
        ("WAV", "FLOAT", 1e-6),
        ("WAV", "DOUBLE", 1e-6),
        ("WAV", "ULAW", 2e-2),
        ("WAVEX", "PCM_24", 1e-6),
        ("RF64", "PCM_16", 1e-4),
        ("AIFF", "PCM_16", 1e-4),
        ("FLAC", "PCM_24", 1e-6),
        ("OGG", "VORBIS", 5e-2),
        ("OGG", "OPUS", 5e-2),
        ("MP3", "MPEG_LAYER_III", 5e-2),
    ],
)
def test_every_format_is_decoded(tmp_path: Path, container: str, subtype: str, tolerance: float) -> None:
    audio = decoded(tmp_path / "a.wav", encoded(tone(1, 16_000), 16_000, container, subtype))
    assert audio.waveform.shape == (16_000,)
    inner = slice(2000, -2000)
    np.testing.assert_allclose(audio.waveform[inner], tone(1, 16_000)[inner], atol=tolerance)


def test_a_recording_longer_than_a_block_is_resampled_without_a_seam(tmp_path: Path) -> None:
    rate, duration_s = 48_000, 100
    audio = decoded(tmp_path / "a.wav", encoded(tone(duration_s, rate), rate))
    assert audio.waveform.shape == (16_000 * duration_s,)
    inner = slice(400, -400)
    np.testing.assert_allclose(audio.waveform[inner], tone(duration_s, 16_000)[inner], atol=2e-3)


def test_one_sample_is_a_recording(tmp_path: Path) -> None:
    audio = decoded(tmp_path / "a.wav", encoded(np.array([0.5]), 16_000))
    np.testing.assert_array_equal(audio.waveform, [0.5])


def test_less_than_one_sample_at_16_khz_is_an_empty_waveform(tmp_path: Path) -> None:
    audio = decoded(tmp_path / "a.wav", encoded(np.array([0.5]), 48_000))
    assert audio.waveform.shape == (0,)
    assert audio.duration_s == 1 / 48_000


@pytest.mark.parametrize("name", ["Grüße 你好.wav".encode(), b"latin-\xfc.wav"], ids=["non-ASCII", "not UTF-8"])
def test_any_name_is_read(tmp_path: Path, name: bytes) -> None:
    path = tmp_path / os.fsdecode(name)
    try:
        path.write_bytes(WAV)
    except OSError:
        pytest.skip("this file system takes only Unicode names")
    (recording,) = iter_recordings(["."], tmp_path)
    assert decode(recording).waveform.shape == (16_000,)


def test_an_empty_file_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.wav", "empty", b"") == "is an empty file; copy it again, or remove it"


@pytest.mark.parametrize("container", ["WAV", "RF64", "AIFF"])
def test_zero_frames_are_refused(tmp_path: Path, container: str) -> None:
    content = encoded(np.zeros(0), 16_000, container)
    assert refusal(tmp_path / "a.wav", "empty", content) == ("has a header and no samples; copy it again, or remove it")


def test_text_named_wav_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.wav", "no_audio", b"These are the minutes of the meeting.\n" * 100) == (
        "holds no audio that can be read (Format not recognised); convert it to WAV or FLAC, or remove it"
    )


def test_a_format_that_cannot_be_told_to_be_whole_is_refused(tmp_path: Path) -> None:
    content = encoded(tone(1, 16_000), 16_000, "AU")
    assert refusal(tmp_path / "a.wav", "unsupported", content) == ("is AU (Sun/NeXT); convert it to WAV or FLAC")


@pytest.mark.parametrize(
    "content",
    [
        WAV[:-1],
        WAV[:20_000],
        WAV[:30],
        encoded(tone(1, 16_000), 16_000, "RF64")[:-1],
        encoded(tone(1, 16_000), 16_000, "AIFF")[:-1],
        FLAC[:-1],
        FLAC[: len(FLAC) // 2],
        OPUS[:-1],
        OPUS[: OPUS.rindex(b"OggS")],
        OPUS[: len(OPUS) // 2],
        VORBIS[:-1],
        VORBIS[: len(VORBIS) // 2],
        MP3[: len(MP3) // 2],
        MP3[:-1],
    ],
    ids=[
        "WAV by a byte",
        "WAV in the middle",
        "WAV in its header",
        "RF64",
        "AIFF",
        "FLAC by a byte",
        "FLAC in the middle",
        "Opus by a byte",
        "Opus by a page",
        "Opus in the middle",
        "Vorbis by a byte",
        "Vorbis in the middle",
        "MP3 in the middle",
        "MP3 by a byte",
    ],
)
def test_a_file_cut_short_is_refused(tmp_path: Path, content: bytes) -> None:
    message = refusal(tmp_path / "a.wav", "truncated", content)
    assert message.startswith("is cut short or damaged: ")
    assert message.endswith("; copy or record it again")


def test_a_cut_wav_is_refused_with_the_number_of_missing_bytes(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.wav", "truncated", WAV[:-500]) == (
        "is cut short or damaged: 500 bytes that its header promises are not there; copy or record it again"
    )


@pytest.mark.parametrize(("whole", "at"), [(FLAC, 0.5), (OPUS, 0.6), (OPUS, 0.99), (VORBIS, 0.6)])
def test_a_flipped_byte_inside_is_refused(tmp_path: Path, whole: bytes, at: float) -> None:
    content = bytearray(whole)
    content[int(len(content) * at)] ^= 0xFF
    refusal(tmp_path / "a.wav", "truncated", bytes(content))


@pytest.mark.parametrize("size", [0xFFFFFFFF, 0x7FFFF000])
def test_a_wav_written_to_a_pipe_is_read_to_its_end(tmp_path: Path, size: int) -> None:
    content = WAV[:4] + struct.pack("<I", 0xFFFFFFFF) + WAV[8:40] + struct.pack("<I", size) + WAV[44:]
    assert decoded(tmp_path / "a.wav", content).waveform.shape == (16_000,)


def test_a_flac_written_to_a_pipe_is_read_to_its_end(tmp_path: Path) -> None:
    expected = decoded(tmp_path / "a.flac", FLAC).waveform
    np.testing.assert_array_equal(decoded(tmp_path / "b.flac", without_length(FLAC)).waveform, expected)


def test_a_flac_written_to_a_pipe_and_cut_inside_a_frame_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "a.flac", "truncated", without_length(FLAC)[:-100])


def test_chunks_beside_the_samples_do_not_matter(tmp_path: Path) -> None:
    odd = b"LIST" + struct.pack("<I", 5) + b"INFOx\0"
    size = struct.pack("<I", len(WAV) - 8 + 2 * len(odd))
    content = WAV[:4] + size + WAV[8:36] + odd + WAV[36:] + odd
    assert decoded(tmp_path / "a.wav", content).waveform.shape == (16_000,)


@pytest.mark.parametrize("stream", [OPUS, VORBIS], ids=["Opus", "Vorbis"])
def test_ogg_streams_that_follow_one_another_are_one_recording(tmp_path: Path, stream: bytes) -> None:
    once, twice = decoded(tmp_path / "a.ogg", stream), decoded(tmp_path / "b.ogg", stream + stream)
    assert twice.duration_s == 2 * once.duration_s
    inner = slice(400, 79_600)
    np.testing.assert_allclose(twice.waveform[inner], once.waveform[inner], atol=1e-6)
    np.testing.assert_allclose(twice.waveform[80_000:][inner], once.waveform[inner], atol=1e-6)


def test_ogg_streams_of_two_rates_in_one_file_are_refused(tmp_path: Path) -> None:
    other = encoded(tone(1, 8_000), 8_000, "OGG", "VORBIS")
    assert refusal(tmp_path / "a.ogg", "unsupported", VORBIS + other) == (
        "changes its sample rate or channels from stream to stream; convert it to FLAC"
    )


def test_a_cut_in_the_last_of_several_ogg_streams_is_refused(tmp_path: Path) -> None:
    refusal(tmp_path / "a.ogg", "truncated", OPUS + OPUS[:-1])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
def test_samples_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    samples = np.zeros((100, 2))
    samples[50, 1] = value
    content = encoded(samples, 16_000, subtype="DOUBLE")
    assert refusal(tmp_path / "a.wav", "bad_samples", content) == (
        "holds samples that are not finite numbers; write it again without NaN and infinity"
    )


def test_more_than_12_hours_are_refused_by_the_header(tmp_path: Path) -> None:
    content = encoded(np.zeros(12 * 3600 * 2000 + 1), 2000, subtype="PCM_U8")
    assert refusal(tmp_path / "a.wav", "too_long", content) == (
        "is 12.0 hours long, and at most 12 hours are heard at once; split it, or list it in spans"
    )


def test_too_many_channels_are_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.wav", "too_many_channels", encoded(np.zeros((10, 64)), 16_000)) == (
        "has 64 channels, and at most 32 are read; split it"
    )


def test_a_rate_that_holds_no_speech_is_refused(tmp_path: Path) -> None:
    assert refusal(tmp_path / "a.wav", "unsupported", encoded(np.zeros(10), 1)) == (
        "has a sample rate of 1 Hz, too low for speech; correct its header, or remove it"
    )


def test_a_fifo_is_refused_without_being_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.wav")
    assert refusal(tmp_path / "a.wav", "unreadable") == "is a FIFO, socket or device, not a file; remove it"


def test_a_folder_named_wav_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").mkdir()
    assert refusal(tmp_path / "a.wav", "unreadable") == (
        "is a folder named like a recording, or cannot be listed; rename it, or make it readable"
    )


def test_a_broken_link_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.wav").symlink_to("lost.wav")
    assert refusal(tmp_path / "a.wav", "unreadable") == (
        "cannot be read (No such file or directory); make it readable, or remove it"
    )


def test_a_file_without_permission_is_refused(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root reads every file")
    (tmp_path / "a.wav").touch(mode=0)
    assert refusal(tmp_path / "a.wav", "unreadable") == (
        "cannot be read (Permission denied); make it readable, or remove it"
    )


def test_a_file_that_changed_after_it_was_listed_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.wav"
    path.write_bytes(WAV)
    (recording,) = iter_recordings(["a.wav"], tmp_path)
    os.utime(path, ns=(0, 0))
    with pytest.raises(RecordingError, match="has changed since it was listed") as error:
        decode(recording)
    assert error.value.code == "changed"
