"""Attention of the LLM's query heads over the keys and values that groups of them share, and the mask of new tokens.

On a CPU, torch's fused kernel runs at a tenth of the speed of the matrix products that attention is made of, in
bfloat16. Here it is those products, over blocks of queries whose scores stay in the processor's cache, of few enough
rows that little of a block is what pads the shorter ones.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface

from svbatch.language.new_tokens import NewTokens

BLOCK_POSITIONS = 128
BLOCK_QUERIES = 512  # of a head: 4 rows of BLOCK_POSITIONS
BLOCK_SCORES = 3_000_000  # of one block: 6 MB in bfloat16
SLOTS_STEP = 32  # a softmax over a multiple of so many is quicker
GROUPED_ATTENTION = "svbatch_grouped"


def additive_mask(lengths: Tensor, new: NewTokens, num_slots: int, dtype: torch.dtype) -> Tensor:
    """0 where each new token, at slots `lengths[b]` and on, may look, -inf elsewhere: (B, 1, N, K).

    What it sees of the slots before `lengths[b]` and of the new ones, `new` says; it sees itself, so no softmax is over
    nothing. K: `num_slots`.
    """
    among_new = torch.arange(num_slots, device=lengths.device) - lengths[:, None]
    is_new = (among_new >= 0) & (among_new < new.most)
    place = among_new.clamp(0, new.most - 1)[:, None]
    rows = (new.num_rows, new.most, num_slots)
    seen = new.visible.expand(new.num_rows, -1, -1).gather(2, place.expand(rows)) & is_new[:, None]
    before = (among_new < 0)[:, None]
    if new.earlier is not None:
        before = before & pad(new.earlier, (0, num_slots - new.earlier.shape[-1]))
    mask = torch.zeros(rows, dtype=dtype, device=lengths.device)
    return mask.masked_fill_(~(seen | before), -torch.inf)[:, None]


def grouped_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float,
    new: NewTokens,
    before: Sequence[int],
    **_: Any,
) -> tuple[Tensor, None]:
    """`attention_of_new` as transformers' decoders call it, with None for the weights."""
    return attention_of_new(query, key, value, attention_mask, new, before, scaling=scaling), None


def attention_of_new(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    new: NewTokens,
    before: Sequence[int],
    *,
    scaling: float,
) -> Tensor:
    """`attention` of tokens in a line, query (1, heads, T, width): what each is given, (1, T, heads, width)."""
    by_row = new.by_row(query[0].transpose(0, 1)).transpose(1, 2)
    return new.in_line(attention(by_row, key, value, mask, new.counts, before, scaling=scaling))[None]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    counts: Sequence[int],
    before: Sequence[int],
    *,
    scaling: float,
) -> Tensor:
    """What each position of each head is given, (B, N, heads, width); of a row only its first `counts[b]` are defined.

    query: (B, heads, N, width). key, value: (B, key-value heads, K, width). mask: additive, (B, 1 or key-value heads,
    N, K), or None for plain causal attention over K = N. before: the mask lets position n of a row see none but its
    first `before[b]` + n + 1 slots.
    """
    if query.device.type == "cpu":
        return _in_blocks(query * scaling, key, value, mask, counts, before)
    mixed = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )
    return mixed.transpose(1, 2).contiguous()


def _in_blocks(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, counts: Sequence[int], before: Sequence[int]
) -> Tensor:
    """The same of scaled queries, a block of rows and positions at a time."""
    num_rows, heads, positions, width = query.shape
    groups, slots = key.shape[1:3]
    grouped = query.view(num_rows, groups, heads // groups, positions, width)
    mixed = query.new_empty(num_rows, positions, groups, heads // groups, width)
    length = -(-positions // -(-positions // BLOCK_POSITIONS))
    at_once = max(1, min(BLOCK_SCORES // (heads * length * slots), BLOCK_QUERIES // length))
    for row in range(0, num_rows, at_once):
        rows = slice(row, row + at_once)
        end, first = max(counts[rows]), max(before[rows])
        for start in range(0, end, length):
            block = slice(start, min(start + length, end))
            seen = block.stop if mask is None else min(-(-(first + block.stop) // SLOTS_STEP) * SLOTS_STEP, slots)
            asked = grouped[rows, :, :, block]
            scores = asked.flatten(2, 3) @ key[rows, :, :seen].transpose(2, 3)
            of_heads = scores.view(*asked.shape[:4], seen)
            if mask is None:
                of_heads[..., block] += _no_later(block.stop - block.start, scores)
            else:
                of_heads += mask[rows, :, None, block, :seen]
            found = scores.softmax(-1) @ value[rows, :, :seen]
            mixed[rows, block] = found.view(asked.shape).permute(0, 3, 1, 2, 4)
    return mixed.view(num_rows, positions, heads, width)


def _no_later(positions: int, like: Tensor) -> Tensor:
    """(N, N): -inf where a position would see a later one."""
    return torch.full((positions, positions), -torch.inf, dtype=like.dtype, device=like.device).triu(1)


AttentionInterface.register(GROUPED_ATTENTION, grouped_attention)
