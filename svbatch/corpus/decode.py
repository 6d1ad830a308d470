"""A recording's bytes -> its samples, mono at 16 kHz, or the reason why not.

Covered: bytes are read once, so that hash and samples belong together; a recording that is cut short, or
that libsndfile would read only in part, is an error and never a shorter recording. Not covered: a cut WAV
that was written to a pipe, a cut MP3 without a count in its first frame: nothing says how long they were.
"""

import hashlib
import io
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soundfile
import soxr
from numpy.typing import NDArray

from svbatch.corpus.content import content_of
from svbatch.corpus.recording import Recording
from svbatch.errors import RecordingError

SAMPLE_RATE_HZ = 16_000
MAX_DURATION_S = 24 * 60 * 60

# What libsndfile reads and this module can tell to be whole.
FORMATS = ("AIFF", "FLAC", "MP3", "OGG", "RF64", "WAV", "WAVEX")

Code = Literal["unreadable", "changed", "empty", "no_audio", "unsupported", "truncated", "too_long", "bad_samples"]

_BLOCK_VALUES = 2**22  # frames times channels read at once: 16 MiB
_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's SF_COUNT_MAX: the header does not say
_MP3_FRAME_SAMPLES = 1152
_OGG_FIRST_PAGE, _OGG_LAST_PAGE = 2, 4  # flags of a page, RFC 3533 section 6
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@dataclass(frozen=True, eq=False)
class Audio:
    """One recording's samples.

    `waveform` is float32 (S,), mono, 16 kHz, full scale 1.0 (a float source may exceed it); S is 0 if the
    source is shorter than one sample. `recording_id` is the SHA-256 of the file's bytes, in hex.
    `duration_s`, `sample_rate_hz` and `channels` are the source's.
    """

    waveform: NDArray[np.float32]
    recording_id: str
    duration_s: float
    sample_rate_hz: int
    channels: int


def decode(recording: Recording) -> Audio:
    """All channels of a recording mixed to mono by their mean, at 16 kHz.

    Raises RecordingError, stage "decode", with one of the codes in `Code`.
    """
    content = content_of(recording)
    if content[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM") and (missing := _missing_bytes(content)):
        raise _truncated(recording, f"{missing} bytes that its header promises are not there")
    if content[:4] == b"OggS":
        _check_ogg(recording, content)
    try:
        source = soundfile.SoundFile(io.BytesIO(content))
    except soundfile.LibsndfileError as error:
        reason = error.error_string.rstrip(".")
        what = f"holds no audio that can be read ({reason}); convert it to WAV or FLAC, or remove it"
        raise _failure(recording, "no_audio", what) from error
    with source:
        if source.format not in FORMATS:
            raise _failure(recording, "unsupported", f"is {source.format_info}; convert it to WAV or FLAC")
        if source.frames == 0:
            raise _failure(recording, "empty", "has a header and no samples; copy it again, or remove it")
        if source.frames == _UNKNOWN_FRAMES:
            raise _failure(recording, "unsupported", "does not tell its length; write it to a file, not to a pipe")
        if source.frames > MAX_DURATION_S * source.samplerate:
            raise _failure(recording, "too_long", f"is longer than {MAX_DURATION_S // 3600} hours; split it")
        num_frames = 0
        resampler = soxr.ResampleStream(source.samplerate, SAMPLE_RATE_HZ, 1, dtype="float32", quality="HQ")
        parts = []
        for block in _iter_mono(recording, source):
            num_frames += block.size
            parts.append(resampler.resample_chunk(block))
        parts.append(resampler.resample_chunk(np.zeros(0, np.float32), last=True))
        return Audio(
            waveform=np.concatenate(parts),
            recording_id=hashlib.sha256(content).hexdigest(),
            duration_s=num_frames / source.samplerate,
            sample_rate_hz=source.samplerate,
            channels=source.channels,
        )


def _iter_mono(recording: Recording, source: soundfile.SoundFile) -> Iterator[NDArray[np.float32]]:
    """Mono blocks of `source` at its own rate. Raises RecordingError for what is wrong or missing."""
    rate = source.samplerate
    num_read = 0
    while True:
        try:
            block = source.read(_BLOCK_VALUES // source.channels, dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise _truncated(recording, f"no audio can be read after {num_read / rate:.2f} s") from error
        if not len(block):
            break
        num_read += len(block)
        with np.errstate(over="ignore", invalid="ignore"):
            mono = block.mean(axis=1)
        if not np.isfinite(mono).all():
            what = "holds samples that are not finite numbers; write it again without NaN and infinity"
            raise _failure(recording, "bad_samples", what)
        yield mono
    # Some encoders count an MP3's first frame, which holds the count and no audio.
    lenience = _MP3_FRAME_SAMPLES if source.format == "MP3" else 0
    if num_read < source.frames - lenience:
        raise _truncated(recording, f"{num_read / rate:.2f} of {source.frames / rate:.2f} s can be read")


def _missing_bytes(content: bytes) -> int:
    """How many bytes a WAV, RF64 or AIFF header promises for the samples beyond the end of `content`."""
    order: Literal["big", "little"] = "big" if content[:4] in (b"FORM", b"RIFX") else "little"
    end = 8 + _known_size(int.from_bytes(content[4:8], order))
    size_64 = 0
    position = 12
    while min(name := content[position : position + 4], default=0) >= ord(" "):
        size = int.from_bytes(content[position + 4 : position + 8], order)
        body = position + 8
        if name == b"ds64":
            size_64 = int.from_bytes(content[body + 8 : body + 16], "little")
        if name in (b"data", b"SSND"):
            end = body + (size_64 or _known_size(size))
            break
        position = body + size + size % 2
    return max(0, end - len(content))


def _known_size(size: int) -> int:
    """`size`, or 0 if it means "unknown": just below 2**31 or 2**32, as sox and ffmpeg write into a pipe."""
    return 0 if -size % 2**31 < 2**16 else size


def _check_ogg(recording: Recording, content: bytes) -> None:
    """Raises RecordingError for what libsndfile leaves out: damaged pages, the streams after the first."""
    position, was_last = 0, False
    while content[position : position + 4] == b"OggS" and position + 27 <= len(content):
        flags, num_lacing = content[position + 5], content[position + 26]
        if was_last and flags & _OGG_FIRST_PAGE:
            raise _failure(recording, "unsupported", "is several Ogg streams in one file; convert it to FLAC")
        was_last = bool(flags & _OGG_LAST_PAGE)
        size = 27 + num_lacing + sum(content[position + 27 : position + 27 + num_lacing])
        page = content[position : position + size]
        if len(page) == size and _ogg_checksum(page) != page[22:26]:
            raise _truncated(recording, f"the checksum of the Ogg page at byte {position} is wrong")
        position += size
    if not was_last or position > len(content):
        raise _truncated(recording, "the end of its Ogg stream is not there")


def _ogg_checksum(page: bytes) -> bytes:
    """The CRC-32 of RFC 3533 section 6, at byte 22: that of zlib with bits reversed, nothing inverted."""
    reversed_page = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED_BITS)
    crc = zlib.crc32(reversed_page, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(_REVERSED_BITS)


def _truncated(recording: Recording, what: str) -> RecordingError:
    return _failure(recording, "truncated", f"is cut short or damaged: {what}; copy or record it again")


def _failure(recording: Recording, code: Code, what: str) -> RecordingError:
    return RecordingError("decode", code, f"{recording.uri} {what}")
