"""Recordings that vanish, grow, shrink and become others while a run lists and reads them.

A manifest names them, so that each is listed also at a moment at which it is gone.
"""

import csv
import hashlib
import os
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
from generate import encoded, sound, written

SUFFIXES = ("wav", "flac", "mp3", "m4a", "ogg")
LONG_S = 300.0  # so long that a change falls into the reading
PAUSE_S = 0.002


class Changing:
    """`num_files` in `folder`, named by `folder`/all.csv. `states`: the hashes of what each has held, a change over."""

    def __init__(self, folder: Path, seed: int, *, num_files: int = 60) -> None:
        folder.mkdir()
        self.manifest = folder / "all.csv"
        self.paths = [folder / f"{number:03}.{SUFFIXES[number % 5]}" for number in range(num_files)]
        self.states: defaultdict[Path, set[str]] = defaultdict(set)
        self.num_changes = 0
        self._random = np.random.default_rng(seed)
        with self.manifest.open("w", newline="") as file:
            csv.writer(file).writerows([["path"], *([path.name] for path in self.paths)])
        for number in range(num_files):
            whole(number, 1)  # encoded now, so that a change takes no time
        self.restore()

    def restore(self) -> None:
        """Makes each what it was in the beginning."""
        for path in self.paths:
            path.unlink(missing_ok=True)
            self._put(path, self._version(path, 0))

    def first_id(self, path: Path) -> str:
        """The hash of what it was in the beginning."""
        return hashlib.sha256(self._version(path, 0)).hexdigest()

    @contextmanager
    def while_changing(self) -> Iterator[None]:
        """Within, files change all the time, the first ones far more often than the last."""
        ended = threading.Event()
        weights = 1 / np.arange(1, len(self.paths) + 1) ** 2
        weights /= weights.sum()

        def change() -> None:
            while not ended.wait(PAUSE_S):
                self._change(self.paths[self._random.choice(len(self.paths), p=weights)])
                self.num_changes += 1

        thread = threading.Thread(target=change)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()

    def _change(self, path: Path) -> None:
        content = self._version(path, int(self._random.integers(2)))
        match int(self._random.integers(6)):
            case 0:
                path.unlink(missing_ok=True)
            case 1:
                self._put(path, content + b"more")
            case 2:
                self._put(path, content[: len(content) // 2])
            case 3:  # another file under its name
                other = path.with_suffix(".new")
                self._put(other, content)
                self.states[path] |= self.states.pop(other)
                os.replace(other, path)
            case 4 if path.exists():  # over the bytes that are there, piece by piece
                self._know(path, content)
                with path.open("r+b", buffering=0) as file:
                    for start in range(0, len(content), 2**16):
                        file.write(content[start : start + 2**16])
                    file.truncate()
            case _:
                self._put(path, content)

    def _put(self, path: Path, content: bytes) -> None:
        self._know(path, content)
        path.write_bytes(content)

    def _know(self, path: Path, content: bytes) -> None:
        self.states[path].add(hashlib.sha256(content).hexdigest())

    def _version(self, path: Path, version: int) -> bytes:
        return whole(self.paths.index(path), version)


@cache
def whole(number: int, version: int) -> bytes:
    """One of two recordings of a file, those of WAV of the same size; the first three are long, and too quiet to be
    speech."""
    if number < 3:
        return written(sound(version, LONG_S) * 1e-3, 16_000)
    return encoded(SUFFIXES[number % 5], seed=1000 + 2 * number + version)
