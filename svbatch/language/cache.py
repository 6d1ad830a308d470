"""Keys and values of every position that the LLM has seen.

Row b of a batch keeps the key of its position p at slot p, whatever its neighbours' lengths are. So a row is
dense, and a slot past a row's length holds nothing that is ever seen: what was written there (padding, a
question that has been answered, a refused draft) is dropped by not counting it, and the next one overwrites
it. Transformers' own DynamicCache copies everything at each step, and keeps the padding between a prefix and
what follows it.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

CAPACITY_STEP = 64
"""Slots are added in steps of so many, so that what is there rarely moves. All are attended to, the free ones masked:
matrix products want them in one piece."""


class KeyValueCache:
    """What transformers' decoders ask of a cache when they are given positions and a mask: `update`."""

    def __init__(self, layers: Iterable[tuple[Tensor, Tensor]]) -> None:
        """From each layer's keys and values, (B, key-value heads, positions, head width)."""
        self._layers = list(layers)
        self._rows = torch.arange(0)
        self._slots = torch.zeros(0, 0, dtype=torch.int64)

    @property
    def capacity(self) -> int:
        """Slots per row."""
        return self._layers[0][0].shape[2]

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Keys and values of each layer, (B, key-value heads, capacity, head width)."""
        return iter(self._layers)

    def aim(self, lengths: Tensor, num_tokens: int) -> None:
        """The next forward's token n goes to slot `lengths[b] + n` of row b. lengths: (B,) int64."""
        self._rows = torch.arange(len(lengths), device=lengths.device)[:, None]
        self._slots = lengths[:, None] + torch.arange(num_tokens, device=lengths.device)
        wanted = slots_for(int(lengths.max()) + num_tokens)
        if wanted > self.capacity:
            for index, (keys, values) in enumerate(self):  # one layer at a time is held twice
                self._layers[index] = (_resized(keys, wanted), _resized(values, wanted))

    def update(self, keys: Tensor, values: Tensor, layer_index: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes (B, key-value heads, N, head width) where `aim` said; returns all slots."""
        all_keys, all_values = self._layers[layer_index]
        all_keys[self._rows, :, self._slots] = keys.transpose(1, 2)
        all_values[self._rows, :, self._slots] = values.transpose(1, 2)
        return all_keys, all_values

    @classmethod
    def stacked(cls, caches: Sequence["KeyValueCache"], num_slots: int) -> "KeyValueCache":
        """The rows of several caches, with at least so many slots; they are emptied layer by layer."""
        num_slots = slots_for(num_slots)
        layers = []
        for index in range(len(caches[0]._layers)):
            pairs = [cache._layers[index] for cache in caches]
            keys, values = (
                torch.cat([_resized(each, num_slots) for each in kind]) for kind in zip(*pairs, strict=True)
            )
            layers.append((keys, values))
            for cache in caches:
                cache._layers[index] = (keys[:0], values[:0])
        return cls(layers)

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these."""
        for index, (keys, values) in enumerate(self):
            self._layers[index] = (keys[rows], values[rows])

    def select(self, rows: Tensor) -> "KeyValueCache":
        """A copy that holds these rows (int64 indices) in this order."""
        return KeyValueCache([(keys[rows], values[rows]) for keys, values in self])


def slots_for(positions: int) -> int:
    """Slots that hold so many positions."""
    return -(-positions // CAPACITY_STEP) * CAPACITY_STEP


def _resized(slots: Tensor, capacity: int) -> Tensor:
    resized = slots.new_zeros(*slots.shape[:2], capacity, slots.shape[3])
    kept = min(capacity, slots.shape[2])
    resized[:, :, :kept] = slots[:, :, :kept]
    return resized
