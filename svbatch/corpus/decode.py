"""A recording's bytes -> its samples at 16 kHz, or the reason why not.

Covered: bytes are read once, so that hash and samples belong together; a recording that is cut short, or that a
decoder would read only in part, is an error and never a shorter recording; what is decoded is bounded in channels and
seconds before it is there. A run decodes in processes of their own: see workers.
"""

import hashlib
from collections.abc import Generator, Hashable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import soxr
from numpy.typing import NDArray

from svbatch.corpus.content import content_of
from svbatch.corpus.recording import Recording, Span
from svbatch.corpus.sound_files import open_sound_file
from svbatch.corpus.source import Source, refusal
from svbatch.corpus.wholeness import container_of
from svbatch.errors import RecordingError

SAMPLE_RATE_HZ = 16_000
MAX_DECODED_S = 12 * 60 * 60  # of all tracks together: 2.8 GB
MAX_CHANNELS = 32
MIN_SOURCE_RATE_HZ = 2_000  # a header that says less is wrong, or the source holds no speech
SPAN_LENIENCE_S = 0.01  # manifests round the end of a source

Channels = Literal["mix", "first", "each"]


@dataclass(frozen=True)
class Properties:
    """What decoding found out of a recording.

    `recording_id` is the SHA-256 of the file's bytes in hex, of a span that of bytes and span. `duration_s` is the
    recording's, so of a span its own; `sample_rate_hz`, `channels`, `container` and `codec` are the source's. `tracks`
    are the channels that were decoded, from 0, or None alone where all were mixed.
    """

    recording_id: str
    duration_s: float
    sample_rate_hz: int
    channels: int
    container: str
    codec: str
    tracks: tuple[int | None, ...]


@dataclass(frozen=True, eq=False)
class Audio(Properties):
    """One recording's samples: `waveforms` is float32 (tracks, S) at 16 kHz, full scale 1.0 (a float source may exceed
    it); S is 0 if the source is shorter than one sample."""

    waveforms: NDArray[np.float32]

    @property
    def waveform(self) -> NDArray[np.float32]:
        """The only track, (S,)."""
        assert len(self.waveforms) == 1
        waveform: NDArray[np.float32] = self.waveforms[0]
        return waveform

    @property
    def num_samples(self) -> int:
        return int(self.waveforms.shape[1])


def decode(recording: Recording, channels: Channels = "mix") -> Audio:
    """A recording at 16 kHz: its channels mixed to mono by their mean, the first alone, or each as a track.

    Raises RecordingError, stage "decode", with a code of `svbatch.corpus.source.Code` or `svbatch.corpus.content`.
    """
    blocks = iter_decoded(recording, channels)
    samples = bytearray()
    while True:
        try:
            samples += next(blocks)
        except StopIteration as end:
            return audio_of(end.value, samples)


def audio_of(properties: Properties, samples: bytearray) -> Audio:
    """The audio whose samples are these bytes: float32, the tracks' values of one moment side by side."""
    values: NDArray[np.float32] = np.frombuffer(samples, np.float32).reshape(-1, len(properties.tracks))
    return Audio(**vars(properties), waveforms=np.ascontiguousarray(values.T))


class Contents:
    """The bytes of sources. Those of a source that was asked for a span are kept for its next span."""

    def __init__(self) -> None:
        self._kept: tuple[Hashable, bytes, hashlib._Hash] | None = None

    def of(self, recording: Recording) -> tuple[bytes, str]:
        """A recording's bytes and its id. Raises as `content_of` does."""
        source = (recording.uri.rpartition("#t=")[0], recording.size_bytes, recording.modified_at, recording.etag)
        if not self._kept or self._kept[0] != source:
            self._kept = None  # before the next is read: they might not fit into memory together
            content = content_of(recording)
            self._kept = source, content, hashlib.sha256(content)
        _, content, digest = self._kept
        if recording.span is None:
            self._kept = None
            return content, digest.hexdigest()
        of_span = digest.copy()
        of_span.update(f"#t={recording.span.start_s!r},{recording.span.end_s!r}".encode())
        return content, of_span.hexdigest()


def iter_decoded(
    recording: Recording, channels: Channels, contents: Contents | None = None
) -> Generator[bytes, None, Properties]:
    """The bytes that `audio_of` takes, block by block, the first empty when the source has been read; at the end what
    they are of. Raises as `decode` does."""
    content, recording_id = (contents or Contents()).of(recording)
    yield b""
    try:
        with _opened(content) as source:
            del content  # the source has it
            tracks = _tracks(source, channels)
            start, end = _span(source, recording.span, len(tracks))
            num_frames = 0
            resampler = soxr.ResampleStream(
                source.sample_rate_hz, SAMPLE_RATE_HZ, len(tracks), dtype="float32", quality="HQ"
            )
            for block in _iter_cut(source, start, end, recording.span):
                num_frames += len(block)
                if num_frames * len(tracks) > MAX_DECODED_S * source.sample_rate_hz:
                    raise _too_long(num_frames / source.sample_rate_hz, len(tracks))
                yield resampler.resample_chunk(_tracks_of(block, channels)).tobytes()
            rest = np.zeros((0, len(tracks)), np.float32)
            yield resampler.resample_chunk(rest, last=True).tobytes()
            return Properties(
                recording_id=recording_id,
                duration_s=num_frames / source.sample_rate_hz,
                sample_rate_hz=source.sample_rate_hz,
                channels=source.channels,
                container=source.container,
                codec=source.codec,
                tracks=tracks,
            )
    except RecordingError as error:
        raise RecordingError(error.stage, error.code, f"{recording.uri} {error}") from error


def _opened(content: bytes) -> AbstractContextManager[Source]:
    """libsndfile reads it unless its first bytes say otherwise."""
    container = container_of(content)
    if container is None:
        return open_sound_file(content)
    from svbatch.corpus.containers import open_container  # imports av, which few corpora need

    return open_container(content, container)


def _tracks(source: Source, channels: Channels) -> tuple[int | None, ...]:
    """Which channels are decoded. Raises RecordingError for a source that holds too many, or no speech."""
    if source.channels > MAX_CHANNELS:
        what = f"has {source.channels} channels, and at most {MAX_CHANNELS} are read; split it"
        raise refusal("too_many_channels", what)
    if source.sample_rate_hz < MIN_SOURCE_RATE_HZ:
        what = f"has a sample rate of {source.sample_rate_hz} Hz, too low for speech; correct its header, or remove it"
        raise refusal("unsupported", what)
    match channels:
        case "mix":
            return (None,)
        case "first":
            return (0,)
        case "each":
            return tuple(range(source.channels))


def _span(source: Source, span: Span | None, num_tracks: int) -> tuple[int, int | None]:
    """From which frame to which, None for the source's end. Raises RecordingError for more than can be decoded, and for
    a span that lies past the source's end by its header."""
    rate, known = source.sample_rate_hz, source.num_frames
    start = round(span.start_s * rate) if span else 0
    end = round(span.end_s * rate) if span and span.end_s is not None else None
    if span and known is not None:
        _check_span(span, known / rate)
    last = end if end is not None else known
    if last is not None and (last - start) * num_tracks > MAX_DECODED_S * rate:
        raise _too_long((last - start) / rate, num_tracks)
    return start, end


def _iter_cut(source: Source, start: int, end: int | None, span: Span | None) -> Iterator[NDArray[np.float32]]:
    """The frames from `start` to `end`; what is not seekable is decoded up to `start`."""
    position = start if source.is_seekable else 0
    for block in source.blocks_from(position):
        cut = block[max(0, start - position) : None if end is None else max(0, end - position)]
        position += len(block)
        if len(cut):
            yield cut
        if end is not None and position >= end:
            return
    if span:
        _check_span(span, position / source.sample_rate_hz)


def _check_span(span: Span, duration_s: float) -> None:
    if span.start_s >= duration_s or (span.end_s is not None and span.end_s > duration_s + SPAN_LENIENCE_S):
        end = "its end" if span.end_s is None else f"{span.end_s:g} s"
        what = f"is listed from {span.start_s:g} s to {end}, and the source is {duration_s:g} s long"
        raise refusal("bad_span", f"{what}; correct the manifest")


def _tracks_of(block: NDArray[np.float32], channels: Channels) -> NDArray[np.float32]:
    """(frames, channels) -> (frames, tracks). Raises RecordingError for a value that is not finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        mixed = block.mean(axis=1, keepdims=True) if channels == "mix" else block
    tracks = np.ascontiguousarray(mixed[:, :1] if channels == "first" else mixed)
    if not np.isfinite(tracks).all():
        what = "holds samples that are not finite numbers; write it again without NaN and infinity"
        raise refusal("bad_samples", what)
    return tracks


def _too_long(duration_s: float, num_tracks: int) -> RecordingError:
    hours = f"{duration_s / 3600:.1f} hours" + (f" in each of {num_tracks} channels" if num_tracks > 1 else "")
    limit = f"at most {MAX_DECODED_S // 3600} hours are heard at once"
    return refusal("too_long", f"is {hours} long, and {limit}; split it, or list it in spans")
