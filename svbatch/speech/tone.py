"""How something is said, read as words: every attribute of a voice as a mixture of the LLM's own words for it.

The read-out gives the LLM what was said in its own token embeddings; this gives it who says it and how. Of each
attribute (emotion, gender …) the head has a logit for each label, and its embedding is Σ p(label) e(label), where
e(label) is the mean of the LLM's embeddings of the label's tokens: one more position of the prefix for each attribute.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svbatch.speech.layers import TransformerLayer, length_mask

WIDTH = 96
HEADS = 4
STRIDES = (2, 2)
DROPOUT = 0.2


class ToneHead(nn.Module):
    """num_labels: of each attribute. `words` (Σ num_labels, E): the labels' embeddings, attribute after attribute."""

    words: Tensor

    def __init__(self, *, frame_width: int, num_labels: Sequence[int], llm_width: int) -> None:
        super().__init__()
        self.num_labels = list(num_labels)
        self.norm = nn.LayerNorm(frame_width)
        self.convs = nn.ModuleList(
            nn.Conv1d(size, WIDTH, kernel_size=3, stride=stride, padding=1)
            for size, stride in zip((frame_width, *(WIDTH for _ in STRIDES[1:])), STRIDES, strict=True)
        )
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(TransformerLayer(WIDTH, HEADS, DROPOUT) for _ in range(2))
        self.output = nn.Linear(2 * WIDTH, sum(num_labels))
        self.register_buffer("words", torch.zeros(sum(num_labels), llm_width))

    def logits(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) valid frames -> (B, Σ num_labels): from mean and deviation over time."""
        hidden: Tensor = self.norm(frames)
        for conv, stride in zip(self.convs, STRIDES, strict=True):
            hidden = hidden * length_mask(lengths, hidden.shape[1]).unsqueeze(2).to(hidden.dtype)
            hidden = nn.functional.gelu(conv(hidden.transpose(1, 2)).transpose(1, 2))
            lengths = (lengths + stride - 1) // stride
        mask = length_mask(lengths, hidden.shape[1])
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        real, size = mask.unsqueeze(2).to(hidden.dtype), lengths.unsqueeze(1).to(hidden.dtype)
        mean = (hidden * real).sum(dim=1) / size
        variance = ((hidden - mean.unsqueeze(1)).square() * real).sum(dim=1) / size
        logits: Tensor = self.output(torch.cat([mean, (variance + 1e-5).sqrt()], dim=1))
        return logits

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) valid frames -> an embedding of each attribute, (B, A, E)."""
        parts = torch.split(self.logits(frames, lengths).float(), self.num_labels, dim=1)
        words = torch.split(self.words.float(), self.num_labels)
        return torch.stack([part.softmax(dim=1) @ own for part, own in zip(parts, words, strict=True)], dim=1)


def word_embedding(ids: Sequence[int], embeddings: Tensor) -> Tensor:
    """(E,) float32: the mean of the LLM's `embeddings` (V, E) of a label's tokens."""
    return embeddings[list(ids)].float().mean(dim=0)
