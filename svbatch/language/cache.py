"""Keys and values of every position that the LLM has seen.

Row b of a batch keeps the key of its prefix's position p at slot p, whatever its neighbours' lengths are, and what
follows comes after that: a question's tokens, or those of several answers in the order they were written, each seen
by its own alone. A slot past a row's length holds nothing that is ever seen: what was written there (a question that
has been answered, a refused draft) is dropped by not counting it, and the next one overwrites it. Transformers' own
DynamicCache copies everything at each step, and keeps the padding between a prefix and what follows it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from svbatch.language.new_tokens import NewTokens

CAPACITY_STEP = 64
"""Slots are added in steps of so many, so that what is there rarely moves."""

MANY_TOKENS = 16
"""Fewer tokens a row attend to all slots, the free ones masked: matrix products copy what is not in one piece. For so
many that pays."""


class KeyValueCache:
    """What transformers' decoders ask of a cache when they are given positions and a mask: `update`."""

    def __init__(self, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
        """From each layer's keys and values, (B, key-value heads, positions, head width)."""
        self._layers = list(layers)
        self.num_seen = 0
        self.before: list[int] = []
        self._rows = self._slots = torch.arange(0)

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self._layers[0][0].shape[2]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (B, key-value heads, capacity, head width)."""
        return iter(self._layers)

    def aim(self, lengths: Tensor, new: NewTokens) -> None:
        """The next forward's tokens go to slots `lengths[b]` and on of their row b. lengths: (B,) int64.

        They attend to `num_seen` slots, and `before` is what `attention` is told of the rows.
        """
        self._rows = new.rows
        self._slots = lengths[new.rows] + new.places
        wanted = slots_for(int(lengths.max()) + new.most)
        is_cut = new.most >= MANY_TOKENS
        self.num_seen = wanted if is_cut else max(wanted, self.capacity)
        self.before = lengths.tolist() if is_cut else [self.num_seen] * len(lengths)
        if wanted > self.capacity:
            for index, (keys, values) in enumerate(self):  # one layer at a time is held twice
                self._layers[index] = (_resized(keys, wanted), _resized(values, wanted))

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes the tokens' (1, key-value heads, T, head width) where `aim` said; returns the slots that are
        attended to."""
        all_keys, all_values = self._layers[layer_index]
        all_keys[self._rows, :, self._slots] = keys[0].transpose(0, 1)
        all_values[self._rows, :, self._slots] = values[0].transpose(0, 1)
        return all_keys[:, :, : self.num_seen], all_values[:, :, : self.num_seen]

    def part(self, rows: slice) -> "KeyValueCache":
        """Some rows, in the same memory: what is written to them is here too. They have no room to grow."""
        return KeyValueCache((keys[rows], values[rows]) for keys, values in self)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, in the order of `closed_up`."""
        for index, (keys, values) in enumerate(self):
            self._layers[index] = (moved_up(keys, rows), moved_up(values, rows))

    def select(self, rows: Tensor) -> "KeyValueCache":
        """A copy that holds these rows (int64 indices) in this order."""
        return KeyValueCache([(keys[rows], values[rows]) for keys, values in self])

    def copied(self, num_slots: int) -> "KeyValueCache":
        """A copy with at least so many slots, and none of those that come after them."""
        wanted = slots_for(num_slots)
        return KeyValueCache([(_resized(keys, wanted), _resized(values, wanted)) for keys, values in self])


def slots_for(positions: int) -> int:
    """Slots that hold so many positions."""
    return -(-positions // CAPACITY_STEP) * CAPACITY_STEP


def closed_up(rows: Sequence[int]) -> list[int]:
    """Ascending `rows` in an order that moves few: the last ones take the places of those that are missing."""
    here = set(rows)
    missing = sum(1 for place in range(len(rows)) if place not in here)
    late = iter(rows[len(rows) - missing :])
    return [place if place in here else next(late) for place in range(len(rows))]


def moved_up(states: Tensor, rows: Tensor) -> Tensor:
    """`states[rows]` without a copy of those that stay where they are: row i is i, or one that comes after all kept."""
    for place, row in enumerate(rows.tolist()):
        if row != place:
            states[place] = states[row]
    return states[: len(rows)]


def _resized(states: Tensor, num_slots: int) -> Tensor:
    """A copy with so many slots, those past its own zero: what is masked must be finite."""
    resized = states.new_empty(*states.shape[:2], num_slots, states.shape[3])
    kept = min(num_slots, states.shape[2])
    resized[:, :, :kept] = states[:, :, :kept]
    resized[:, :, kept:] = 0
    return resized
