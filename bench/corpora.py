"""Two corpora of about ten minutes from a manifest of English speech: what the figures of docs/speed.md are taken over.

    python bench/corpora.py MANIFEST.jsonl FOLDER

FOLDER/long: recordings of 20 to 30 s, each of clips of one speaker, joined in the manifest's order.
FOLDER/short: clips of 3 to 8 s as they are.
"""

import argparse
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import soundfile as sf
from numpy.typing import NDArray

SECONDS = 600.0
LONG_S = (20.0, 30.0)
SHORT_S = (3.0, 8.0)
Clip = dict[str, Any]


def joined(clips: Sequence[Clip]) -> Iterator[list[Clip]]:
    """Clips of one speaker in groups that last as LONG_S says."""
    by_speaker: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        group = by_speaker[clip["speaker"]]
        group.append(clip)
        seconds = sum(each["duration"] for each in group)
        if seconds > LONG_S[1]:
            by_speaker[clip["speaker"]] = [clip]
        elif seconds >= LONG_S[0]:
            yield group
            by_speaker[clip["speaker"]] = []


def write(groups: Iterator[list[Clip]], root: Path, folder: Path) -> None:
    """The groups as one file each, until there are SECONDS of sound."""
    folder.mkdir(parents=True)
    total = 0.0
    for number, group in enumerate(groups):
        sounds = [_read(root / clip["audio"]) for clip in group]
        sf.write(folder / f"{number:03}.flac", np.concatenate(sounds), 16_000)
        total += sum(sound.size for sound in sounds) / 16_000
        if total >= SECONDS:
            break
    print(f"{folder}: {number + 1} recordings, {total:.0f} s")


def _read(path: Path) -> NDArray[np.float32]:
    samples, rate = sf.read(path, dtype="float32")
    assert rate == 16_000, f"{path} has {rate} samples a second"
    return np.asarray(samples, dtype=np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("manifest", type=Path)
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    lines = [json.loads(line) for line in options.manifest.read_text(encoding="utf-8").splitlines()]
    english = [clip for clip in lines if clip["lang"] == "en" and clip["text"] and clip["speaker"]]
    root = options.manifest.parent
    short = ([clip] for clip in english if SHORT_S[0] <= clip["duration"] <= SHORT_S[1])
    write(joined(english), root, options.folder / "long")
    write(short, root, options.folder / "short")


if __name__ == "__main__":
    main()
