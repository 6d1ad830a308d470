"""What FFmpeg reads: written here by FFmpeg itself, then cut, damaged and lied about."""

import io
from contextlib import suppress
from pathlib import Path

import av
import numpy as np
import pytest
from generate import CONTAINERS, muxed

from svbatch.corpus.decode import Audio, decode
from svbatch.corpus.sources import AUDIO_SUFFIXES, iter_recordings, recording_at
from svbatch.errors import RecordingError


def whole(suffix: str, *, duration_s: float = 3.0, channels: int = 1, pause_s: float = 0.0) -> bytes:
    """A tone of 440 Hz."""
    rate = CONTAINERS[suffix][2]
    tone = (0.5 * np.sin(2 * np.pi * 440 * np.arange(round(duration_s * rate)) / rate)).astype(np.float32)
    return muxed(suffix, np.repeat(tone[None], channels, axis=0), pause_s=pause_s)


def decoded(path: Path, content: bytes) -> Audio:
    path.write_bytes(content)
    return decode(recording_at(path))


def refusal(path: Path, content: bytes) -> str:
    with pytest.raises(RecordingError) as error:
        decoded(path, content)
    assert error.value.stage == "decode"
    assert str(error.value).startswith(f"{path} ")
    return error.value.code


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_container_is_decoded_in_place(tmp_path: Path, suffix: str) -> None:
    audio = decoded(tmp_path / f"a.{suffix}", whole(suffix))
    assert audio.duration_s == pytest.approx(3.0, abs=0.15)
    assert audio.sample_rate_hz == CONTAINERS[suffix][2]
    spectrum = np.abs(np.fft.rfft(audio.waveform[16_000:32_000]))
    assert spectrum.argmax() == 440
    assert np.sqrt(np.mean(audio.waveform[16_000:32_000] ** 2)) == pytest.approx(0.5 / np.sqrt(2), rel=0.25)


@pytest.mark.parametrize("suffix", CONTAINERS)
def test_every_container_is_found_in_a_folder(tmp_path: Path, suffix: str) -> None:
    (tmp_path / f"a.{suffix}").touch()
    assert f".{suffix}" in AUDIO_SUFFIXES
    assert len(list(iter_recordings(["."], tmp_path))) == 1


@pytest.mark.parametrize("suffix", CONTAINERS)
@pytest.mark.parametrize("at", [0.0, 0.02, 0.3, 0.6, 0.9, 1.0])
def test_a_container_that_is_cut_short_is_refused(tmp_path: Path, suffix: str, at: float) -> None:
    content = whole(suffix)
    keep = max(24, min(int(len(content) * at), len(content) - 3))
    assert refusal(tmp_path / f"a.{suffix}", content[:keep]) in ("truncated", "no_audio")


def test_both_channels_are_heard(tmp_path: Path) -> None:
    audio = decoded(tmp_path / "a.m4a", whole("m4a", channels=2))
    assert (audio.channels, audio.tracks) == (2, (None,))
    each = decode(recording_at(tmp_path / "a.m4a"), "each")
    assert each.tracks == (0, 1)
    np.testing.assert_allclose(each.waveforms.mean(axis=0), audio.waveform, atol=1e-6)


def test_a_pause_in_the_time_stamps_is_silence(tmp_path: Path) -> None:
    audio = decoded(tmp_path / "a.webm", whole("webm", pause_s=5.0))
    assert audio.duration_s == pytest.approx(8.0, abs=0.15)
    assert np.abs(audio.waveform[2 * 16_000 : 5 * 16_000]).max() < 1e-3
    assert np.abs(audio.waveform[7 * 16_000 : 7 * 16_000 + 1600]).max() > 0.4


def test_a_video_without_sound_is_refused(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 32
        stream.pix_fmt = "yuv420p"
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame(32, 32, "yuv420p")))
        container.mux(stream.encode(None))
    assert refusal(tmp_path / "a.mp4", buffer.getvalue()) == "no_audio"


def test_a_playlist_is_never_followed(tmp_path: Path) -> None:
    """FFmpeg, left to choose, would open what a playlist names."""
    (tmp_path / "secret.aac").write_bytes(whole("aac"))
    playlist = f"#EXTM3U\n#EXT-X-TARGETDURATION:3\n#EXTINF:3,\nfile://{tmp_path}/secret.aac\n#EXT-X-ENDLIST\n"
    assert refusal(tmp_path / "a.m4a", playlist.encode()) == "no_audio"


def test_a_wrong_suffix_does_not_matter(tmp_path: Path) -> None:
    assert decoded(tmp_path / "a.wav", whole("m4a")).codec == "aac"
    assert decoded(tmp_path / "b.mp3", whole("wma")).container == "asf"


def test_random_damage_is_an_answer_or_a_refusal(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for suffix in CONTAINERS:
        undamaged = whole(suffix)
        for _ in range(8):
            content = bytearray(undamaged)
            for at in random.integers(0, len(content), 3):
                content[at] ^= int(random.integers(1, 256))
            (tmp_path / f"a.{suffix}").write_bytes(content)
            with suppress(RecordingError):
                assert decode(recording_at(tmp_path / f"a.{suffix}")).duration_s < 3600
