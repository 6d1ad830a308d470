"""What a decoder gives: the properties of a source, its samples in blocks, or the reason why not."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from svbatch.errors import RecordingError

Code = Literal[
    "bad_samples",
    "bad_span",
    "crashed",
    "empty",
    "no_audio",
    "out_of_memory",
    "timed_out",
    "too_long",
    "too_many_channels",
    "truncated",
    "unsupported",
]

BLOCK_VALUES = 2**22  # frames times channels read at once: 16 MiB
BLOCK_S = 60  # nor more than this at once: at 1 Hz it is 16,000 times as many samples at 16 kHz


@dataclass(frozen=True)
class Source:
    """An open source. `num_frames` is what its header promises, None if nothing; a frame is one value per channel.

    `blocks_from(n)` gives float32 blocks (frames, channels) from frame n on; n is 0 where it is not seekable. Raises
    RecordingError for what is wrong or missing.
    """

    container: str
    codec: str
    sample_rate_hz: int
    channels: int
    num_frames: int | None
    is_seekable: bool
    blocks_from: Callable[[int], Iterator[NDArray[np.float32]]]


def block_frames(sample_rate_hz: int, channels: int) -> int:
    """How many frames are decoded at once."""
    return max(1, min(BLOCK_VALUES // channels, sample_rate_hz * BLOCK_S))


def refusal(code: Code, what: str) -> RecordingError:
    """Why a source is not decoded; `what` goes on from the name of the recording."""
    return RecordingError("decode", code, what)


def truncated(what: str) -> RecordingError:
    """What is missing of a source, or damaged in it."""
    return refusal("truncated", f"is cut short or damaged: {what}; copy or record it again")
