"""MP4, Matroska, WMA, AMR and AAC through FFmpeg; FLAC that was written to a pipe too.

The demuxer is named here and never chosen by FFmpeg, which knows playlists too: they open other files.
"""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from fractions import Fraction

import av
import numpy as np
from numpy.typing import NDArray

from svbatch.corpus.source import Source, block_frames, refusal, truncated
from svbatch.corpus.wholeness import Container, check_whole

DEMUXERS = {"aac": "aac", "amr": "amr", "asf": "asf", "flac": "flac", "matroska": "matroska", "mp4": "mov"}
LENIENCE_S = 0.25  # a declared length counts an encoder's padding too
MIN_GAP_S = 0.1  # a longer hole in the time stamps is silence; shorter ones are rounding


@contextmanager
def open_container(content: bytes, container: Container) -> Iterator[Source]:
    """The first audio stream of a file's bytes, opened. Raises RecordingError for what cannot be read or is not
    whole."""
    check_whole(content, container)
    try:
        opened = av.open(io.BytesIO(content), mode="r", format=DEMUXERS[container], metadata_errors="ignore")
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise _no_audio(_reason(error)) from error
    with opened:
        if not opened.streams.audio:
            raise _no_audio("no audio track")
        stream = opened.streams.audio[0]
        if not stream.codec_context or not stream.rate or not stream.channels:
            raise _no_audio("its audio track names no codec, rate or channels")
        stream.codec_context.thread_type = "NONE"
        yield Source(
            container=container,
            codec=stream.codec_context.name,
            sample_rate_hz=stream.rate,
            channels=stream.channels,
            num_frames=_declared_frames(opened, stream),
            is_seekable=False,
            blocks_from=lambda _: _iter_blocks(opened, stream),
        )


def _declared_frames(opened: av.container.InputContainer, stream: av.AudioStream) -> int | None:
    """What the file says of the length of its audio; None where it is estimated, or the length of a video."""
    if opened.format.name in ("aac", "amr", "flac"):
        return None
    if stream.duration is not None and stream.time_base is not None:
        return int(stream.duration * stream.time_base * stream.rate)
    if opened.duration is not None and len(opened.streams) == 1:
        return int(Fraction(opened.duration, av.time_base) * stream.rate)
    return None


def _iter_blocks(opened: av.container.InputContainer, stream: av.AudioStream) -> Iterator[NDArray[np.float32]]:
    """Blocks of all that can be read; raises RecordingError if that is less than is declared."""
    rate, num_read = stream.rate, 0
    for block in _gathered(_iter_pieces(opened, stream), block_frames(rate, stream.channels)):
        yield block
        num_read += len(block)
    declared = _declared_frames(opened, stream) or 0
    if num_read + LENIENCE_S * rate < declared:
        raise truncated(f"{num_read / rate:.2f} of {declared / rate:.2f} s can be read")
    if not num_read:
        raise refusal("empty", "has a header and no samples; copy it again, or remove it")


def _gathered(pieces: Iterator[NDArray[np.float32]], frames: int) -> Iterator[NDArray[np.float32]]:
    """Pieces joined to blocks of about `frames`."""
    parts: list[NDArray[np.float32]] = []
    for piece in pieces:
        parts.append(piece)
        if sum(map(len, parts)) >= frames:
            yield np.concatenate(parts)
            parts = []
    if parts:
        yield np.concatenate(parts)


def _iter_pieces(opened: av.container.InputContainer, stream: av.AudioStream) -> Iterator[NDArray[np.float32]]:
    """What the codec gives, a packet's worth at a time, with silence where the time stamps leave a hole."""
    rate, channels, num_read = stream.rate, stream.channels, 0
    resampler = av.AudioResampler(format="flt", layout=stream.layout, rate=rate)
    origin = _origin(opened)
    try:
        for packet in opened.demux(stream):
            for frame in packet.decode():
                if (frame.sample_rate, len(frame.layout.channels)) != (rate, channels):
                    raise refusal("unsupported", "changes its sample rate or channels on the way; convert it to FLAC")
                if frame.pts is not None and frame.time_base is not None:
                    gap = round((frame.pts * frame.time_base - origin) * rate) - num_read
                    if gap > MIN_GAP_S * rate:
                        num_read += gap
                        yield from _silence(gap, rate, channels)
                for converted in resampler.resample(frame):
                    piece = converted.to_ndarray().astype(np.float32, copy=False).reshape(-1, channels)
                    num_read += len(piece)
                    yield piece
    except MemoryError:
        raise
    except (av.FFmpegError, ValueError) as error:
        raise truncated(f"no audio can be read after {num_read / rate:.2f} s ({_reason(error)})") from error


def _origin(opened: av.container.InputContainer) -> Fraction:
    """When the first of all streams starts: the file's own zero, in seconds."""
    return Fraction(opened.start_time or 0, av.time_base)


def _silence(frames: int, rate: int, channels: int) -> Iterator[NDArray[np.float32]]:
    most = block_frames(rate, channels)
    for first in range(0, frames, most):
        yield np.zeros((min(most, frames - first), channels), np.float32)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error).splitlines()[0][:80]


def _no_audio(reason: str) -> Exception:
    return refusal("no_audio", f"holds no audio that can be read ({reason}); convert it to WAV or FLAC, or remove it")
