"""Training data: manifests of JSON lines, one spoken example a line.

Keys: `audio` (relative to the manifest), `text`, `speaker`, `source`, `licence`, `lang`; any other key is a label
(`emotion`, `gender`, `speech` …). Only `audio` is required; null and a missing key are the same.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import soxr
from numpy.typing import NDArray

from svbatch.corpus.decode import SAMPLE_RATE_HZ, decode
from svbatch.corpus.sources import recording_at
from svbatch.errors import RecordingError, TrainingError

MAX_SECONDS = 29.0
NAMED = ("audio", "text", "speaker", "source", "licence", "lang")


@dataclass(frozen=True)
class Example:
    """One spoken example; `path` is its audio, `labels` what a manifest says beside the named keys."""

    path: Path
    text: str | None = None
    speaker: str | None = None
    source: str = ""
    licence: str = ""
    lang: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)


def read_manifests(folder: Path, names: Sequence[str]) -> list[Example]:
    """The examples of all manifests `names` below `folder`, in order. Raises TrainingError with file and line."""
    return [example for name in names for example in read_manifest(folder / name)]


def read_manifest(manifest: Path) -> list[Example]:
    """The examples of one manifest. Raises TrainingError with file and line."""
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise TrainingError(f"{manifest}: {error.strerror}; give a folder that holds it with --data") from error
    return [_example(manifest, number, line) for number, line in enumerate(lines, 1) if line.strip()]


def _example(manifest: Path, number: int, line: str) -> Example:
    try:
        row = json.loads(line)
        path = manifest.parent / row.pop("audio")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise TrainingError(
            f"{manifest}, line {number}: wants a JSON object with `audio`, found {line[:60]!r} ({error})"
        ) from error
    named = {key: row.pop(key, None) for key in NAMED[1:]}
    return Example(
        path=path,
        text=named["text"],
        speaker=named["speaker"],
        source=named["source"] or "",
        licence=named["licence"] or "",
        lang=named["lang"],
        labels={key: value for key, value in row.items() if value is not None},
    )


def held_out(examples: Sequence[Example], *, every: int) -> set[int]:
    """Indices of the examples kept for choosing and calibrating: one speaker in `every`, whole, by the order of
    first appearance; examples without a speaker count one by one."""
    order: dict[str, int] = {}
    keys = [example.speaker or str(example.path) for example in examples]
    for key in keys:
        order.setdefault(key, len(order))
    return {index for index, key in enumerate(keys) if order[key] % every == every - 1}


def read_waveform(path: Path) -> NDArray[np.float32]:
    """(S,) float32, mono, 16 kHz, decoded as a run decodes it. Raises TrainingError naming the file."""
    try:
        return decode(recording_at(path)).waveform
    except RecordingError as error:
        raise TrainingError(f"{error}, or take it out of the manifest") from error


def augmented(
    waveform: NDArray[np.float32], noises: Sequence[NDArray[np.float32]], random: np.random.Generator
) -> NDArray[np.float32]:
    """`waveform` at another speed (0.88 to 1.12) and gain, mostly with noise at 8 to 30 dB below it."""
    speed = random.uniform(0.88, 1.12)
    changed: NDArray[np.float32] = soxr.resample(waveform, SAMPLE_RATE_HZ, SAMPLE_RATE_HZ / speed, quality="MQ")
    if random.random() < 0.7:
        changed = changed + _noise(changed, noises, random)
    peak = float(np.abs(changed).max(initial=1e-6))
    return (changed * (random.uniform(0.1, 0.95) / peak)).astype(np.float32)


def _noise(
    speech: NDArray[np.float32], noises: Sequence[NDArray[np.float32]], random: np.random.Generator
) -> NDArray[np.float32]:
    if noises and random.random() < 0.6:
        source = noises[int(random.integers(len(noises)))]
        noise = np.resize(np.roll(source, int(random.integers(len(source)))), len(speech))
    else:
        white = np.fft.rfft(random.standard_normal(len(speech)))
        slope = random.uniform(0.0, 1.0)
        spectrum = white / np.maximum(np.arange(len(white)), 1) ** slope
        noise = np.asarray(np.fft.irfft(spectrum, n=len(speech)), dtype=np.float32)
    ratio_db = random.uniform(8.0, 30.0)
    power = float(np.mean(speech**2)) / max(float(np.mean(noise**2)), 1e-12)
    scale = np.sqrt(power * 10 ** (-ratio_db / 10))
    return np.asarray(noise * scale, dtype=np.float32)


def iter_waveforms(examples: Sequence[Example]) -> Iterator[tuple[int, NDArray[np.float32]]]:
    """(index, waveform) of every example that fits a window; longer ones are left out."""
    for index, example in enumerate(examples):
        waveform = read_waveform(example.path)
        if 0 < len(waveform) <= MAX_SECONDS * SAMPLE_RATE_HZ:
            yield index, waveform
