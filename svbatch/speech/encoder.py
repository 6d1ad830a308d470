"""Waveforms to frames through a bundle's frozen ONNX encoder, one 30 s window a row."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from svbatch.onnx import OnnxSession

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 30 * SAMPLE_RATE_HZ
FRAME_SAMPLES = 320  # 50 frames a second, as most encoders have


def encode(session: OnnxSession, waveforms: Sequence[NDArray[np.float32]]) -> NDArray[np.float32]:
    """Frames (B, T, D) of B waveforms of up to 30 s at 16 kHz, each followed by silence to the full window.

    Frames of the silence are kept: the recogniser needs the whole window, the projector takes `num_frames` of it.
    """
    windows = np.zeros((len(waveforms), WINDOW_SAMPLES), dtype=np.float32)
    for row, waveform in zip(windows, waveforms, strict=True):
        row[: len(waveform)] = waveform
    lengths = np.full(len(waveforms), WINDOW_SAMPLES, dtype=np.int64)
    frames: NDArray[np.float32] = session.run({"waveform": windows, "lengths": lengths})["frames"]
    return frames


def num_frames(num_samples: int, frame_samples: int = FRAME_SAMPLES) -> int:
    """Frames that hold some of `num_samples` samples of sound."""
    return -(-num_samples // frame_samples)
