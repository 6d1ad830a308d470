"""WAV, AIFF, FLAC, MP3 and Ogg through libsndfile, and whether they are whole.

Not covered: a cut WAV that was written to a pipe, a cut MP3 without a count in its first frame: nothing says how
long they were.
"""

import io
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from itertools import chain
from typing import Literal

import numpy as np
import soundfile
from numpy.typing import NDArray

from svbatch.corpus.source import Source, block_frames, refusal, truncated

# What libsndfile reads and this module can tell to be whole.
FORMATS = ("AIFF", "FLAC", "MP3", "OGG", "RF64", "WAV", "WAVEX")
SEEKABLE = ("AIFF", "FLAC", "RF64", "WAV", "WAVEX")  # to the very frame

_UNKNOWN_FRAMES = 2**63 - 1  # libsndfile's SF_COUNT_MAX: the header does not say
_MALLOC_FAILED = 17  # libsndfile's SFE_MALLOC_FAILED
_MP3_FRAME_SAMPLES = 1152
_OGG_FIRST_PAGE, _OGG_LAST_PAGE = 2, 4  # flags of a page, RFC 3533 section 6
_REVERSED_BITS = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))


@contextmanager
def open_sound_file(content: bytes) -> Iterator[Source]:
    """A sound file's bytes, opened. Raises RecordingError for what cannot be read or is not whole."""
    if content[:4] in (b"RIFF", b"RIFX", b"RF64", b"FORM") and (missing := _missing_bytes(content)):
        raise truncated(f"{missing} bytes that its header promises are not there")
    parts = _ogg_streams(content) if content[:4] == b"OggS" else [content]
    with ExitStack() as stack:
        files = [stack.enter_context(_opened(part)) for part in parts]
        first = files[0]
        if len({(file.samplerate, file.channels) for file in files}) > 1:
            raise refusal(
                "unsupported", "changes its sample rate or channels from stream to stream; convert it to FLAC"
            )
        # Some encoders count an MP3's first frame, which holds the counts and no audio.
        lenience = _MP3_FRAME_SAMPLES if first.format == "MP3" and not _is_short_mp3(content) else 0
        yield Source(
            container=first.format.lower(),
            codec=first.subtype.lower(),
            sample_rate_hz=first.samplerate,
            channels=first.channels,
            num_frames=sum(file.frames for file in files),
            is_seekable=first.format in SEEKABLE,  # so it is the only one
            blocks_from=lambda start: chain.from_iterable(_iter_file(file, start, lenience) for file in files),
        )


def _check_memory(error: soundfile.LibsndfileError) -> None:
    """libsndfile says in a code of its own that memory ran out."""
    if error.code == _MALLOC_FAILED:
        raise MemoryError from error


def _opened(content: bytes) -> soundfile.SoundFile:
    try:
        file = soundfile.SoundFile(io.BytesIO(content))
    except soundfile.LibsndfileError as error:
        _check_memory(error)
        reason = error.error_string.rstrip(".")
        what = f"holds no audio that can be read ({reason}); convert it to WAV or FLAC, or remove it"
        raise refusal("no_audio", what) from error
    if file.format not in FORMATS:
        raise refusal("unsupported", f"is {file.format_info}; convert it to WAV or FLAC")
    if file.frames == 0:
        raise refusal("empty", "has a header and no samples; copy it again, or remove it")
    if file.frames == _UNKNOWN_FRAMES:
        raise refusal("unsupported", "does not tell its length; write it to a file, not to a pipe")
    return file


def _iter_file(file: soundfile.SoundFile, start: int, lenience: int) -> Iterator[NDArray[np.float32]]:
    rate, num_read = file.samplerate, start
    while True:
        try:
            if num_read == start > 0:
                file.seek(start)
            block = file.read(block_frames(rate, file.channels), dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            _check_memory(error)
            raise truncated(f"no audio can be read after {num_read / rate:.2f} s") from error
        if not len(block):
            break
        num_read += len(block)
        yield block
    if num_read < file.frames - lenience:
        raise truncated(f"{num_read / rate:.2f} of {file.frames / rate:.2f} s can be read")


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


def _is_short_mp3(content: bytes) -> bool:
    """Whether an MP3's first frame (Xing's or LAME's) counts more bytes than there are."""
    start = 0
    if content[:3] == b"ID3":
        start = 10 + sum(byte << shift for byte, shift in zip(content[6:10], (21, 14, 7, 0), strict=False))
    for side_bytes in (9, 17, 32):  # mono or stereo, MPEG 1 or 2
        at = start + 4 + side_bytes
        flags = int.from_bytes(content[at + 4 : at + 8], "big")
        if content[at : at + 4] in (b"Xing", b"Info") and flags & 2:
            counted = at + (12 if flags & 1 else 8)
            return start + int.from_bytes(content[counted : counted + 4], "big") > len(content)
    return False


def _known_size(size: int) -> int:
    """`size`, or 0 if it means "unknown": just below 2**31 or 2**32, as sox and ffmpeg write into a pipe."""
    return 0 if -size % 2**31 < 2**16 else size


def _ogg_streams(content: bytes) -> list[bytes]:
    """The streams that follow one another in an Ogg file; libsndfile reads the first alone.

    Raises RecordingError for what it would leave out: damaged pages, a missing end.
    """
    position, was_last, starts = 0, False, [0]
    while content[position : position + 4] == b"OggS" and position + 27 <= len(content):
        flags, num_lacing = content[position + 5], content[position + 26]
        if was_last and flags & _OGG_FIRST_PAGE:
            starts.append(position)
        was_last = bool(flags & _OGG_LAST_PAGE)
        size = 27 + num_lacing + sum(content[position + 27 : position + 27 + num_lacing])
        page = content[position : position + size]
        if len(page) == size and _ogg_checksum(page) != page[22:26]:
            raise truncated(f"the checksum of the Ogg page at byte {position} is wrong")
        position += size
    if not was_last or position > len(content):
        raise truncated("the end of its Ogg stream is not there")
    ends = [*starts[1:], len(content)]
    return [content[start:end] for start, end in zip(starts, ends, strict=True)]


def _ogg_checksum(page: bytes) -> bytes:
    """The CRC-32 of RFC 3533 section 6, at byte 22: that of zlib with bits reversed, nothing inverted."""
    reversed_page = (page[:22] + bytes(4) + page[26:]).translate(_REVERSED_BITS)
    crc = zlib.crc32(reversed_page, 0xFFFFFFFF) ^ 0xFFFFFFFF
    return crc.to_bytes(4, "big").translate(_REVERSED_BITS)
