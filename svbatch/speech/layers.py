"""What projectors are built of: attention over one row's valid vectors, rotary positions, masks."""

import torch
from torch import Tensor, nn


class TransformerLayer(nn.Module):
    """Pre-norm self-attention over one row's valid vectors, positions by rotation (RoFormer, arXiv 2104.09864)."""

    def __init__(self, width: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.attention_output = nn.Linear(width, width)
        self.feed_forward = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, hidden: Tensor, mask: Tensor) -> Tensor:
        """(B, T, W), (B, T) True where real -> (B, T, W)."""
        query, key, value = (
            part.unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(self.attention_norm(hidden)).chunk(3, dim=2)
        )
        query, key = rotate(query), rotate(key)
        attended = nn.functional.scaled_dot_product_attention(query, key, value, mask[:, None, None, :])
        hidden = hidden + self.dropout(self.attention_output(attended.transpose(1, 2).flatten(2)))
        fed: Tensor = self.dropout(self.feed_forward(hidden))
        return hidden + fed


def rotate(heads: Tensor) -> Tensor:
    """Rotary positions on (B, H, T, C), C even, base 10,000."""
    half = heads.shape[3] // 2
    frequencies = 10_000.0 ** (-torch.arange(half, device=heads.device) / half)
    angles = torch.arange(heads.shape[2], device=heads.device)[:, None] * frequencies
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    left, right = heads[..., :half], heads[..., half:]
    return torch.cat([left * cos - right * sin, left * sin + right * cos], dim=3)


def length_mask(lengths: Tensor, size: int) -> Tensor:
    """(B,) -> (B, size), True on the first `lengths` places of each row."""
    return torch.arange(size, device=lengths.device)[None, :] < lengths[:, None]
