"""Sounds in memory, and what a file of them decodes to."""

import io
from pathlib import Path

import numpy as np
import pytest
import soundfile
from numpy.typing import NDArray

from svbatch.corpus.decode import Audio, decode
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import RecordingError


def tone(duration_s: float, rate: int, hz: float = 440.0) -> NDArray[np.float64]:
    return 0.5 * np.sin(2 * np.pi * hz * np.arange(round(duration_s * rate)) / rate)


def encoded(samples: NDArray[np.float64], rate: int, container: str = "WAV", subtype: str = "PCM_16") -> bytes:
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, format=container, subtype=subtype)
    return buffer.getvalue()


WAV = encoded(tone(1, 16_000), 16_000)
FLAC = encoded(tone(1, 16_000), 16_000, "FLAC")
OPUS = encoded(tone(5, 16_000), 16_000, "OGG", "OPUS")
VORBIS = encoded(tone(5, 16_000), 16_000, "OGG", "VORBIS")
MP3 = encoded(tone(5, 16_000), 16_000, "MP3", "MPEG_LAYER_III")


def decoded(path: Path, content: bytes | None = None) -> Audio:
    """What `path` decodes to, after `content` is written to it."""
    if content is not None:
        path.write_bytes(content)
    (recording,) = iter_recordings([path.name], path.parent)
    return decode(recording)


def refusal(path: Path, code: str, content: bytes | None = None) -> str:
    """The message, without the uri in front, with which `path` is refused as `code`."""
    with pytest.raises(RecordingError) as error:
        decoded(path, content)
    message = str(error.value)
    assert (error.value.stage, error.value.code) == ("decode", code)
    assert message.startswith(f"{path} ")
    assert "\n" not in message
    return message.removeprefix(f"{path} ")


def without_length(flac: bytes) -> bytes:
    content = bytearray(flac)
    content[21] &= 0xF0  # the number of samples in STREAMINFO: 36 bits, 0 for unknown
    content[22:26] = bytes(4)
    return bytes(content)
