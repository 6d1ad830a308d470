"""The tokens that a pass adds to a batch, in one line whatever their numbers: nothing is computed for padding, and only
attention sees them row by row."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class NewTokens:
    """T tokens that follow B rows, those of the first row first, at most N a row.

    counts: how many each row has. rows, places: (T,) int64, each token's row and its place among the row's new ones.
    depths: (B or 1, N) int64, each place's position counted from its row's length; tokens on different branches share
    positions. visible: (B or 1, N, N) bool, which of its row's new tokens each sees: itself, and any before it.
    earlier: (B, N, slots) bool, which of the slots before its row's length each sees; None for all.
    """

    counts: tuple[int, ...]
    rows: Tensor
    places: Tensor
    depths: Tensor
    visible: Tensor
    earlier: Tensor | None = None

    @classmethod
    def alike(cls, num_rows: int, depths: Tensor, visible: Tensor) -> "NewTokens":
        """The same N tokens for every row: depths (N,), visible (N, N)."""
        rows, places = _grid(num_rows, len(depths), depths.device)
        return cls((len(depths),) * num_rows, rows.flatten(), places.flatten(), depths[None], visible[None])

    @classmethod
    def lines(cls, counts: Sequence[int], device: torch.device) -> "NewTokens":
        """`counts[b]` tokens for row b, each of which sees those before it."""
        most = max(counts)
        rows, places = _grid(len(counts), most, device)
        is_one = places < torch.tensor(counts, device=device)[:, None]
        causal = torch.ones(1, most, most, dtype=torch.bool, device=device).tril()
        return cls(tuple(counts), rows[is_one], places[is_one], places[:1], causal)

    @property
    def num_rows(self) -> int:
        """B."""
        return len(self.counts)

    @property
    def most(self) -> int:
        """N."""
        return self.visible.shape[-1]

    def by_row(self, states: Tensor) -> Tensor:
        """(T, ...) -> (B, N, ...), zero where a row has fewer."""
        shape = (self.num_rows, self.most, *states.shape[1:])
        if len(states) == self.num_rows * self.most:
            return states.view(shape)
        padded = states.new_zeros(shape)
        padded[self.rows, self.places] = states
        return padded

    def in_line(self, states: Tensor) -> Tensor:
        """(B or 1, N, ...) -> (T, ...)."""
        if len(self.rows) == states.shape[0] * states.shape[1]:
            return states.flatten(0, 1)
        return states.expand(self.num_rows, *states.shape[1:])[self.rows, self.places]

    def num_seen(self, lengths: Tensor) -> float:
        """Positions that the tokens see, all together, after rows of `lengths` (B,)."""
        new = self.in_line(self.visible.sum(-1))
        before = lengths[self.rows] if self.earlier is None else self.in_line(self.earlier.sum(-1))
        return float((new + before).sum())


def _grid(num_rows: int, num_places: int, device: torch.device) -> tuple[Tensor, Tensor]:
    rows, places = torch.arange(num_rows, device=device), torch.arange(num_places, device=device)
    return rows[:, None].expand(-1, num_places), places[None].expand(num_rows, -1)
