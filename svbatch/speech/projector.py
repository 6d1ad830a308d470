"""The projector: frames at 50 Hz to speech embeddings at 12.5 Hz and LLM width, and the blank of the read-out.

SpeechVerse 2.1 has two blocks of Conv1d(k=3, s=2) and LayerNorm; ours adds a GELU, optional transformer layers
and a linear layer to the LLM's width. Padding never reaches a real frame: every convolution sees zeros past a row's
length, every attention is masked.
"""

from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn


class ProjectorConfig(BaseModel):
    """Shape of a projector; `num_layers` 0 is the paper's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder_width: int
    width: int
    llm_width: int
    num_layers: int = 0
    num_heads: int = 8
    dropout: float = 0.0


class Projector(nn.Module):
    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        widths = [config.encoder_width, config.width, config.width]
        self.convs = nn.ModuleList(nn.Conv1d(a, b, kernel_size=3, stride=2, padding=1) for a, b in pairwise(widths))
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in self.convs)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(config.width, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.llm_width)
        self.blank = nn.Linear(config.width, 1)
        self.log_scale = nn.Parameter(torch.zeros(()))

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) at 50 Hz and (B,) valid frames -> embeddings (B, ceil(T / 4), E) at 12.5 Hz, blank logits
        (B, ceil(T / 4)). Rows past `ceil(lengths / 4)` hold no meaning."""
        hidden = frames
        for conv, norm in zip(self.convs, self.norms, strict=True):
            hidden = hidden * length_mask(lengths, hidden.shape[1]).unsqueeze(2).to(hidden.dtype)
            hidden = nn.functional.gelu(norm(conv(hidden.transpose(1, 2)).transpose(1, 2)))
            lengths = (lengths + 1) // 2
        mask = length_mask(lengths, hidden.shape[1])
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        hidden = self.norm(hidden)
        embeddings: Tensor = self.output(hidden)
        return embeddings, self.blank(hidden).squeeze(2)


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


def num_embeddings(num_frames: int) -> int:
    """Speech embeddings that `num_frames` frames give."""
    return -(-num_frames // 4)
