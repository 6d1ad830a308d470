"""A test: a task, and recordings whose answers to it are known."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from svbatch.tasks.task import Task, load_task

MIN_ITEMS, MIN_SPEAKERS = 100, 10
"""A test with fewer is indicative: shown, not counted."""


@dataclass(frozen=True)
class Item:
    """One recording: `recording` tells it from all others, `truth` is its answer (svbatch.training.metrics), `speaker`
    is None where unknown, `load` gives its waveform (S,) float32 at 16 kHz."""

    recording: str
    speaker: str | None
    source: str
    truth: Any
    load: Callable[[], NDArray[np.float32]]


@dataclass(frozen=True)
class Benchmark:
    """`name` is the test's, `entry` the task as a job names it. `kind`: real recordings, recordings put together, or
    synthesised speech."""

    name: str
    entry: object
    kind: Literal["real", "composed", "synthetic"]
    items: tuple[Item, ...]

    @cached_property
    def task(self) -> Task:
        """What is asked; where the truth is a mapping, with the first recording's entries."""
        return self.task_of(self.items[0])

    def task_of(self, item: Item) -> Task:
        """What is asked of one recording, under the test's name."""
        entry = {self.entry: {"keywords": list(item.truth)}} if isinstance(item.truth, Mapping) else self.entry
        return load_task(entry, Path()).model_copy(update={"name": self.name})

    @property
    def num_speakers(self) -> int:
        """Speakers that are known."""
        return len({item.speaker for item in self.items} - {None})

    @property
    def is_counted(self) -> bool:
        """Whether it is large enough for a verdict."""
        return len(self.items) >= MIN_ITEMS and self.num_speakers >= MIN_SPEAKERS

    def limited(self, limit: int, *, seed: int) -> "Benchmark":
        """At most `limit` of its items, drawn so that every answer and every speaker comes up as evenly as it can."""
        order = np.random.default_rng(seed).permutation(len(self.items))
        ranks: dict[tuple[str, str | None], int] = {}
        of_answer: dict[str, int] = {}
        ranked = []
        for place in order:
            item = self.items[place]
            answer = item.truth if self.task.answer == "label" else ""
            rank = ranks[answer, item.speaker] = ranks.get((answer, item.speaker), -1) + 1
            ranked.append((rank, int(place), answer))
        chosen = []
        for rank, place, answer in sorted(ranked, key=lambda each: each[0]):
            of_answer[answer] = of_answer.get(answer, -1) + 1
            chosen.append((of_answer[answer], rank, place))
        kept = sorted(place for _, _, place in sorted(chosen)[:limit])
        return replace(self, items=tuple(self.items[place] for place in kept))
