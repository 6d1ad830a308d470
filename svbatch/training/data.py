"""Training data: spoken examples, from manifests of our own JSON lines or whatever else a corpus may be.

Keys of our own: `audio` (relative to the manifest), `text`, `speaker`, `source`, `licence`, `lang`; any other key is a
label (`emotion`, `gender`, `speech` …). Only `audio` is required; null and a missing key are the same. Of another
manifest the transcript is the text, and the metadata hold the other keys under the same names.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import soxr
from numpy.typing import NDArray

from svbatch.corpus.decode import SAMPLE_RATE_HZ, decode
from svbatch.corpus.recording import Recording
from svbatch.corpus.sources import iter_recordings, recording_at
from svbatch.errors import RecordingError, TrainingError

MAX_SECONDS = 29.0
NAMED = ("audio", "text", "speaker", "source", "licence", "lang")


@dataclass(frozen=True)
class Example:
    """One spoken example; `path` is its audio, `labels` what a manifest says beside the named keys. `recording`: where
    a corpus says that its audio is; None for the file at `path`."""

    path: Path
    text: str | None = None
    speaker: str | None = None
    source: str = ""
    licence: str = ""
    lang: str | None = None
    labels: dict[str, Any] = field(default_factory=dict)
    recording: Recording | None = None

    @property
    def key(self) -> str:
        """What tells its audio from all others."""
        return str(self.path) if self.recording is None else self.recording.uri

    @property
    def is_silent(self) -> bool:
        """Whether it is known that nobody speaks."""
        return self.labels.get("speech") is False


def read_manifests(folder: Path, names: Sequence[str]) -> list[Example]:
    """The examples of all manifests `names` below `folder`, in order: our own, or else what a job's corpus may name.

    Raises TrainingError with file and line, CorpusError.
    """
    examples: list[Example] = []
    for name in names:
        if _is_our_own(folder / name):
            examples += read_manifest(folder / name)
        else:
            examples += [example_of(recording) for recording in iter_recordings([name], folder)]
    return examples


def _is_our_own(manifest: Path) -> bool:
    """Whether it is JSON lines with `audio`; a file that is not there is taken for one, to be missed by name."""
    if manifest.suffix != ".jsonl":
        return False
    if not manifest.exists():
        return True
    with manifest.open(encoding="utf-8", errors="replace") as file:
        first = next((line for line in file if line.strip()), "")
    try:
        row = json.loads(first)
    except ValueError:
        return True
    return not isinstance(row, dict) or "audio_filepath" not in row


def example_of(recording: Recording) -> Example:
    """A recording of a corpus as an example: its manifest's transcript and metadata."""
    said = dict(recording.metadata)
    named = {key: said.pop(key, None) for key in NAMED[2:]}
    labels: dict[str, Any] = {key: value for key, value in said.items() if value}
    if labels.get("speech", "").lower() in ("true", "false"):
        labels["speech"] = labels["speech"].lower() == "true"
    return Example(
        path=Path(recording.uri),
        text=recording.reference,
        speaker=named["speaker"],
        source=named["source"] or "",
        licence=named["licence"] or "",
        lang=named["lang"],
        labels=labels,
        recording=recording,
    )


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
    keys = [example.speaker or example.key for example in examples]
    for key in keys:
        order.setdefault(key, len(order))
    return {index for index, key in enumerate(keys) if order[key] % every == every - 1}


def read_waveform(path: Path) -> NDArray[np.float32]:
    """(S,) float32, mono, 16 kHz, decoded as a run decodes it. Raises TrainingError naming the file."""
    return _decoded(recording_at(path))


def waveform_of(example: Example) -> NDArray[np.float32]:
    """(S,) float32, mono, 16 kHz, of an example. Raises TrainingError naming the file."""
    return _decoded(example.recording or recording_at(example.path))


def _decoded(recording: Recording) -> NDArray[np.float32]:
    try:
        return decode(recording).waveform
    except RecordingError as error:
        raise TrainingError(f"{error}, or take it out of the manifest") from error


class Waveforms(Sequence[NDArray[np.float32]]):
    """Waveforms of some examples, read when they are asked for; the last KEPT are kept."""

    KEPT = 64

    def __init__(self, examples: Sequence[Example], indices: Sequence[int]) -> None:
        self._examples, self._indices = examples, list(indices)
        self._read = lru_cache(self.KEPT)(lambda index: waveform_of(examples[index]))

    def __len__(self) -> int:
        return len(self._indices)

    @overload
    def __getitem__(self, place: int) -> NDArray[np.float32]: ...
    @overload
    def __getitem__(self, place: slice) -> Sequence[NDArray[np.float32]]: ...
    def __getitem__(self, place: int | slice) -> NDArray[np.float32] | Sequence[NDArray[np.float32]]:
        if isinstance(place, slice):
            return Waveforms(self._examples, self._indices[place])
        return self._read(self._indices[place])


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


def fits(num_samples: int) -> bool:
    """Whether so much sound has a place in one window; an example that has none is left out."""
    return 0 < num_samples <= MAX_SECONDS * SAMPLE_RATE_HZ
