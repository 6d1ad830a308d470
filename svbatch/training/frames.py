"""Encoder frames of the training data, computed once and kept on disk as float16.

Several examples share a 30 s window, with gaps, filled to a length drawn for each window: an example is heard alone
as well as among others, as in a run, and five times fewer windows are computed. A cache is a folder of shards, each
written whole, so an interrupted pass goes on where it stopped.
"""

import hashlib
import json
import logging
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from svbatch.onnx import OnnxSession
from svbatch.speech.encoder import FRAME_SAMPLES, WINDOW_SAMPLES, encode, num_frames
from svbatch.training.data import Example, augmented, iter_waveforms

GAP_SAMPLES = (4_800, 16_000)
FILL_SAMPLES = (96_000, WINDOW_SAMPLES)
WINDOWS_PER_SHARD = 16
log = logging.getLogger(__name__)


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


def cached_frames(
    examples: Sequence[Example],
    encoder: OnnxSession,
    encoder_id: str,
    cache: Path,
    *,
    num_passes: int,
    seed: int,
) -> list[Clip]:
    """Clips of every example: the first pass as recorded, the later ones changed in speed, gain and noise."""
    identity = json.dumps([[str(e.path) for e in examples], encoder_id, seed])
    folder = cache / "frames" / hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder.mkdir(parents=True, exist_ok=True)
    plan = folder / f"passes-{num_passes}.json"
    if plan.exists():
        return [Clip(e, folder / name, start, length) for e, name, start, length in json.loads(plan.read_text())]
    waveforms = dict(iter_waveforms(examples))
    noises = [waveforms[i] for i in waveforms if examples[i].labels.get("speech") is False]
    clips: list[Clip] = []
    for number in range(num_passes):
        windows = list(_pack(waveforms, np.random.default_rng([seed, number])))
        starts = range(0, len(windows), WINDOWS_PER_SHARD)
        for start in tqdm(starts, desc=f"frames, pass {number + 1}", disable=None):
            shard = folder / f"pass{number}-{start:06d}.npy"
            index = shard.with_suffix(".json")
            if not index.exists():
                generator = np.random.default_rng([seed, number, start])
                chunk = windows[start : start + WINDOWS_PER_SHARD]
                sound = [_change(w, waveforms, noises, generator if number else None) for w in chunk]
                _write_shard(encoder, sound, shard)
            clips += [Clip(e, shard, s, n) for e, s, n in json.loads(index.read_text())]
    _write_whole(plan, json.dumps([[c.example, c.shard.name, c.start, c.length] for c in clips]))
    return clips


def _pack(waveforms: dict[int, NDArray[np.float32]], random: np.random.Generator) -> Iterator[list[int]]:
    """Example indices window by window, in random order; room is left for a slower speed."""
    window: list[int] = []
    used = 0.0
    fill = random.uniform(*FILL_SAMPLES)
    for index in random.permutation(sorted(waveforms)):
        needed = len(waveforms[index]) * 1.13 + GAP_SAMPLES[1] + FRAME_SAMPLES
        if window and used + needed > fill:
            yield window
            window, used, fill = [], 0.0, random.uniform(*FILL_SAMPLES)
        window.append(int(index))
        used += needed
    if window:
        yield window


def _change(
    window: Sequence[int],
    waveforms: dict[int, NDArray[np.float32]],
    noises: Sequence[NDArray[np.float32]],
    random: np.random.Generator | None,
) -> list[tuple[int, NDArray[np.float32]]]:
    if random is None:
        return [(i, waveforms[i]) for i in window]
    changed = [(i, augmented(waveforms[i], noises, random)) for i in window]
    return [(i, w[:WINDOW_SAMPLES]) for i, w in changed]


def _write_shard(
    encoder: OnnxSession, windows: Sequence[Sequence[tuple[int, NDArray[np.float32]]]], shard: Path
) -> None:
    random = np.random.default_rng(zlib.crc32(shard.name.encode()))
    pieces: list[NDArray[np.float16]] = []
    index: list[tuple[int, int, int]] = []
    total = 0
    for window in windows:
        sound = np.zeros(WINDOW_SAMPLES, dtype=np.float32)
        places = []
        at = 0
        for example, waveform in window:
            end = min(at + len(waveform), WINDOW_SAMPLES)
            sound[at:end] = waveform[: end - at]
            places.append((example, at // FRAME_SAMPLES, num_frames(end - at)))
            at = -(-(end + int(random.integers(*GAP_SAMPLES))) // FRAME_SAMPLES) * FRAME_SAMPLES
        frames = encode(encoder, [sound])[0].astype(np.float16)
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
