"""Encoder frames of the training data: computed once and kept on disk as float16, or anew each time.

Several examples share a 30 s window, with gaps, filled to a length drawn for each window: an example is heard alone
as well as among others, as in a run, and five times fewer windows are computed. A cache is a folder of shards, each
written whole, so an interrupted pass goes on where it stopped. What its limit leaves out is heard when it is read,
each time at another speed, loudness and noise.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from svbatch.onnx import OnnxSession
from svbatch.speech.encoder import FRAME_SAMPLES, WINDOW_SAMPLES, encode, num_frames
from svbatch.training.data import Example, Waveforms, augmented, fits, waveform_of
from svbatch.training.progress import with_progress

GAP_SAMPLES = (4_800, 16_000)
FILL_SAMPLES = (96_000, WINDOW_SAMPLES)
WINDOWS_PER_SHARD = 16
LOUDNESS_DB = (-6.0, 6.0)  # of the second of two voices
Layout = Literal["joined", "mixed"]
log = logging.getLogger(__name__)


class Heard(Protocol):
    """Frames of an example: `length` of them, about, where they are heard anew."""

    @property
    def example(self) -> int:
        """Its index."""

    @property
    def length(self) -> int:
        """Frames."""

    def read(self) -> NDArray[np.float16]:
        """(T, D) float16."""


@dataclass(frozen=True)
class Clip:
    """Frames of one example, in one pass: `start` and `length` in frames of the shard's array."""

    example: int
    shard: Path
    start: int
    length: int

    def read(self) -> NDArray[np.float16]:
        """(T, D) float16."""
        frames: NDArray[np.float16] = np.load(self.shard, mmap_mode="r")[self.start : self.start + self.length]
        return np.array(frames)


@dataclass(frozen=True)
class Listener:
    """Hears sound through the encoder. `noises` are what may be laid under speech."""

    examples: Sequence[Example]
    encoder: OnnxSession
    frame_samples: int
    noises: Sequence[NDArray[np.float32]]

    def frames(self, sound: NDArray[np.float32]) -> NDArray[np.float16]:
        """(T, D) float16 of (S,) samples, cut to the window."""
        sound = sound[:WINDOW_SAMPLES]
        frames: NDArray[np.float16] = encode(self.encoder, [sound])[0].astype(np.float16)
        return frames[: num_frames(len(sound), self.frame_samples)]


@dataclass(frozen=True)
class LiveClip:
    """Frames of one example that are computed when they are read, its sound varied by torch's random numbers.

    `other`: an example whose voice comes after it, or at the same time.
    """

    example: int
    length: int
    listener: Listener = field(compare=False, repr=False)
    other: tuple[int, Layout] | None = None

    def read(self) -> NDArray[np.float16]:
        """(T, D) float16."""
        random = np.random.default_rng(int(torch.randint(2**31, ())))
        listener = self.listener
        sound = waveform_of(listener.examples[self.example])
        if self.other is not None:
            index, layout = self.other
            sound = composed(sound, waveform_of(listener.examples[index]), layout, random)
        return listener.frames(augmented(sound, listener.noises, random))


def composed(
    first: NDArray[np.float32], second: NDArray[np.float32], layout: Layout, random: np.random.Generator
) -> NDArray[np.float32]:
    """Two voices in one waveform: one after the other with a pause, or the second beginning during the first."""
    ratio = float(np.sqrt(np.mean(first**2) / max(float(np.mean(second**2)), 1e-12)))
    second = second * np.float32(ratio * 10 ** (random.uniform(*LOUDNESS_DB) / 20))
    if layout == "joined":
        start = len(first) + int(random.integers(*GAP_SAMPLES))
    else:
        start = int(random.integers(0, max(1, len(first) // 2)))
    mixed = np.zeros(max(len(first), start + len(second)), np.float32)
    mixed[: len(first)] += first
    mixed[start : start + len(second)] += second
    return mixed


def cached_frames(
    examples: Sequence[Example],
    encoder: OnnxSession,
    encoder_id: str,
    cache: Path,
    *,
    num_passes: int,
    seed: int,
    frame_samples: int = FRAME_SAMPLES,
    max_bytes: int | None = None,
) -> tuple[list[Heard], Listener]:
    """Clips of every example that fits a window, and what hears more: the first pass as recorded, the later ones
    changed in speed, gain and noise. What would take the cache beyond `max_bytes` is heard anew each time instead."""
    identity = json.dumps([[e.key for e in examples], encoder_id, seed])
    folder = cache / "frames" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    lengths = _lengths(examples, folder)
    noises = Waveforms(examples, [i for i in lengths if examples[i].is_silent])
    listener = Listener(examples, encoder, frame_samples, noises)
    plan = folder / f"passes-{num_passes}{'' if max_bytes is None else f'-{max_bytes}'}.json"
    if not plan.exists():
        cached = _fill(lengths, listener, folder, num_passes=num_passes, seed=seed, max_bytes=max_bytes)
        _write_whole(plan, json.dumps([[c.example, c.shard.name, c.start, c.length] for c in cached]))
    clips: list[Heard] = [Clip(e, folder / name, start, n) for e, name, start, n in json.loads(plan.read_text())]
    kept = {clip.example for clip in clips}
    if live := [LiveClip(i, num_frames(n, frame_samples), listener) for i, n in lengths.items() if i not in kept]:
        log.info("frames: %d examples are cached, %d are heard anew each time", len(kept), len(live))
    return [*clips, *live], listener


def _lengths(examples: Sequence[Example], folder: Path) -> dict[int, int]:
    """Samples of every example that fits a window, by its index; decoded once."""
    path = folder / "lengths.json"
    if not path.exists():
        measured = [len(waveform_of(example)) for example in with_progress(examples, "lengths")]
        _write_whole(path, json.dumps(measured))
    return {i: n for i, n in enumerate(json.loads(path.read_text())) if fits(n)}


def _fill(
    lengths: Mapping[int, int],
    listener: Listener,
    folder: Path,
    *,
    num_passes: int,
    seed: int,
    max_bytes: int | None,
) -> list[Clip]:
    """Writes the shards that are not there yet; clips of all, up to `max_bytes`."""
    clips: list[Clip] = []
    num_bytes = 0
    for number in range(num_passes):
        windows = list(_pack(lengths, listener.frame_samples, np.random.default_rng([seed, number])))
        starts = range(0, len(windows), WINDOWS_PER_SHARD)
        for start in with_progress(starts, f"frames, pass {number + 1}"):
            shard = folder / f"pass{number}-{start:06d}.npy"
            index = shard.with_suffix(".json")
            if not index.exists():
                generator = np.random.default_rng([seed, number, start])
                chunk = windows[start : start + WINDOWS_PER_SHARD]
                sound = [_change(w, listener, generator if number else None) for w in chunk]
                _write_shard(listener, sound, shard)
            num_bytes += shard.stat().st_size
            if max_bytes is not None and num_bytes > max_bytes:
                shard.unlink()
                index.unlink()
                return clips
            clips += [Clip(e, shard, s, n) for e, s, n in json.loads(index.read_text())]
    return clips


def _pack(lengths: Mapping[int, int], frame_samples: int, random: np.random.Generator) -> Iterator[list[int]]:
    """Example indices window by window, in random order; room is left for a slower speed."""
    window: list[int] = []
    used = 0.0
    fill = random.uniform(*FILL_SAMPLES)
    for index in random.permutation(sorted(lengths)):
        needed = lengths[index] * 1.13 + GAP_SAMPLES[1] + frame_samples
        if window and used + needed > fill:
            yield window
            window, used, fill = [], 0.0, random.uniform(*FILL_SAMPLES)
        window.append(int(index))
        used += needed
    if window:
        yield window


def _change(
    window: Sequence[int], listener: Listener, random: np.random.Generator | None
) -> list[tuple[int, NDArray[np.float32]]]:
    sounds = [(i, waveform_of(listener.examples[i])) for i in window]
    if random is None:
        return sounds
    return [(i, augmented(sound, listener.noises, random)[:WINDOW_SAMPLES]) for i, sound in sounds]


def _write_shard(listener: Listener, windows: Sequence[Sequence[tuple[int, NDArray[np.float32]]]], shard: Path) -> None:
    random = np.random.default_rng(zlib.crc32(shard.name.encode()))
    pieces: list[NDArray[np.float16]] = []
    index: list[tuple[int, int, int]] = []
    step = listener.frame_samples
    total = 0
    for window in windows:
        sound = np.zeros(WINDOW_SAMPLES, dtype=np.float32)
        places = []
        at = 0
        for example, waveform in window:
            end = min(at + len(waveform), WINDOW_SAMPLES)
            sound[at:end] = waveform[: end - at]
            places.append((example, at // step, num_frames(end - at, step)))
            at = -(-(end + int(random.integers(*GAP_SAMPLES))) // step) * step
        frames = encode(listener.encoder, [sound])[0].astype(np.float16)
        for example, start, length in places:
            pieces.append(frames[start : start + length])
            index.append((example, total, length))
            total += length
    part = shard.with_suffix(".part")
    with part.open("wb") as file:
        np.save(file, np.concatenate(pieces))
    part.rename(shard)
    _write_whole(shard.with_suffix(".json"), json.dumps(index))


def _write_whole(path: Path, text: str) -> None:
    part = path.with_suffix(".json.part")
    part.write_text(text)
    part.rename(path)
