"""Sounds composed for tests whose answer is known by construction: several speakers one after another, and no speech.

Everything follows from a seed; nothing is read before a sound is loaded.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from svbatch.corpus.decode import SAMPLE_RATE_HZ
from svbatch.training.data import read_waveform

Sound = NDArray[np.float32]
MAX_PART_S = 8.0  # three parts and their gaps fit into one window
GAP_S = (0.15, 0.5)
LEVEL = 0.06  # root mean square of every part, so that no speaker is told by loudness
NOTES_HZ = tuple(220.0 * 2 ** (step / 12) for step in (0, 2, 4, 5, 7, 9, 11, 12))
NO_SPEECH = ("silence", "hiss", "noise", "music")


def joined(paths: Sequence[Path], seed: Sequence[int]) -> Sound:
    """The recordings (S,) one after another with gaps of silence, each at the same level and at most MAX_PART_S."""
    random = np.random.default_rng(seed)
    pieces: list[Sound] = []
    for path in paths:
        waveform = read_waveform(path)[: round(MAX_PART_S * SAMPLE_RATE_HZ)]
        loudness = float(np.sqrt(np.mean(waveform**2))) if waveform.size else 0.0
        pieces += [waveform * np.float32(LEVEL / max(loudness, 1e-6)), _silence(random.uniform(*GAP_S))]
    return np.clip(np.concatenate(pieces[:-1]), -1, 1)


def without_speech(kind: str, seed: Sequence[int]) -> Sound:
    """Two to eight seconds (S,) of one of NO_SPEECH: nothing at all, faint hiss, coloured noise, or played chords."""
    random = np.random.default_rng(seed)
    size = round(random.uniform(2.0, 8.0) * SAMPLE_RATE_HZ)
    match kind:
        case "silence":
            return np.zeros(size, np.float32)
        case "hiss":
            return (random.standard_normal(size) * 10 ** random.uniform(-4.0, -3.0)).astype(np.float32)
        case "noise":
            return _noise(size, random)
        case "music":
            return _chords(size, random)
        case _:
            raise ValueError(f"{kind} is none of {', '.join(NO_SPEECH)}")


def _silence(seconds: float) -> Sound:
    return np.zeros(round(seconds * SAMPLE_RATE_HZ), np.float32)


def _noise(size: int, random: np.random.Generator) -> Sound:
    """Between white and brown, swelling slowly."""
    spectrum = np.fft.rfft(random.standard_normal(size))
    shaped = np.fft.irfft(spectrum / np.maximum(np.arange(spectrum.size), 20) ** random.uniform(0.0, 1.0), n=size)
    swell = 1 + 0.5 * np.sin(2 * np.pi * random.uniform(0.1, 2.0) * np.arange(size) / SAMPLE_RATE_HZ)
    return _scaled(shaped * swell, random)


def _chords(size: int, random: np.random.Generator) -> Sound:
    """Chords of three notes of a scale, each with overtones that fade as a plucked string's do."""
    beat = round(random.uniform(0.25, 0.8) * SAMPLE_RATE_HZ)
    times = np.arange(beat) / SAMPLE_RATE_HZ
    sound = np.zeros(size + beat)
    for start in range(0, size, beat):
        for note in random.choice(NOTES_HZ, 3, replace=False) * random.choice([0.5, 1.0, 2.0]):
            for overtone in range(1, 6):
                tone = np.sin(2 * np.pi * note * overtone * times + random.uniform(0, 2 * np.pi))
                sound[start : start + beat] += tone * np.exp(-3 * overtone * times) / overtone
    return _scaled(sound[:size], random)


def _scaled(sound: NDArray[np.float64], random: np.random.Generator) -> Sound:
    return (sound * random.uniform(0.05, 0.5) / max(float(np.abs(sound).max()), 1e-9)).astype(np.float32)
