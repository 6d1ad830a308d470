"""How something is said, read as words: every attribute of a voice as a mixture of the LLM's own words for it.

The read-out gives the LLM what was said in its own token embeddings; this gives it who says it and how. Of each
attribute (emotion, gender …) the head has a logit for each label, and its embedding is Σ p(label) e(label), where
e(label) is the mean of the LLM's embeddings of the label's tokens: one more position of the prefix for each attribute.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from svbatch.speech.layers import TransformerLayer, length_mask
from svbatch.speech.speakers import SpeakerCount

WIDTH = 96
HEADS = 4
STRIDES = (2, 2)
SHORT = 16  # hidden vectors that are averaged before their deviation is taken: 1.28 s, some words of one speaker
DROPOUT = 0.2


class ToneHead(nn.Module):
    """num_labels: of each attribute. counted: the place of the attribute that says whether several people speak, which
    voices that are compared tell. `words` (Σ num_labels, E): the labels' embeddings, attribute after attribute."""

    words: Tensor

    def __init__(
        self, *, frame_width: int, num_labels: Sequence[int], llm_width: int, counted: int | None = None
    ) -> None:
        super().__init__()
        self.num_labels = list(num_labels)
        self.counted = counted
        self.norm = nn.LayerNorm(frame_width)
        self.convs = nn.ModuleList(
            nn.Conv1d(size, WIDTH, kernel_size=3, stride=stride, padding=1)
            for size, stride in zip((frame_width, *(WIDTH for _ in STRIDES[1:])), STRIDES, strict=True)
        )
        self.dropout = nn.Dropout(DROPOUT)
        self.layers = nn.ModuleList(TransformerLayer(WIDTH, HEADS, DROPOUT) for _ in range(2))
        self.output = nn.Linear(3 * WIDTH, sum(num_labels))
        self.speakers = None
        if counted is not None:
            self.speakers = SpeakerCount(frame_width=frame_width, num_labels=num_labels[counted])
        self.register_buffer("words", torch.zeros(sum(num_labels), llm_width))

    def logits(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) valid frames -> (B, Σ num_labels): from mean and deviation over time, of single
        vectors and of short means, which move where the speaker changes."""
        hidden: Tensor = self.norm(frames)
        valid = lengths
        for conv, stride in zip(self.convs, STRIDES, strict=True):
            hidden = hidden * length_mask(lengths, hidden.shape[1]).unsqueeze(2).to(hidden.dtype)
            hidden = nn.functional.gelu(conv(hidden.transpose(1, 2)).transpose(1, 2))
            lengths = (lengths + stride - 1) // stride
        mask = length_mask(lengths, hidden.shape[1])
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        pooled = [_mean(hidden, mask), _deviation(hidden, mask)]
        pieces, some = _short_means(hidden, mask)
        logits: Tensor = self.output(torch.cat([*pooled, _deviation(pieces, some)], dim=1))
        if self.speakers is None or self.counted is None:
            return logits
        parts = list(torch.split(logits, self.num_labels, dim=1))
        parts[self.counted] = self.speakers(frames, valid).to(logits)
        return torch.cat(parts, dim=1)

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, T, D) and (B,) valid frames -> an embedding of each attribute, (B, A, E), and the log-probability of each
        label, (B, Σ num_labels)."""
        parts = torch.split(self.logits(frames, lengths).float(), self.num_labels, dim=1)
        log_probs = [part.log_softmax(dim=1) for part in parts]
        words = torch.split(self.words.float(), self.num_labels)
        told = torch.stack([part.exp() @ own for part, own in zip(log_probs, words, strict=True)], dim=1)
        return told, torch.cat(log_probs, dim=1)


def _mean(hidden: Tensor, mask: Tensor) -> Tensor:
    """(B, T, W), (B, T) True where real -> (B, W)."""
    real = mask.unsqueeze(2).to(hidden.dtype)
    return (hidden * real).sum(dim=1) / real.sum(dim=1)


def _deviation(hidden: Tensor, mask: Tensor) -> Tensor:
    squares = (hidden - _mean(hidden, mask).unsqueeze(1)).square()
    return (_mean(squares, mask) + 1e-5).sqrt()


def _short_means(hidden: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Means of SHORT neighbours every SHORT / 2, of the real ones among them; which hold any. As many of a row alone as
    of one that is padded."""
    real = mask.unsqueeze(1).to(hidden.dtype)
    sums, sizes = (
        nn.functional.avg_pool1d(nn.functional.pad(each, (SHORT // 2, SHORT - 1)), SHORT, stride=SHORT // 2)
        for each in (hidden.transpose(1, 2) * real, real)
    )
    return (sums / sizes.clamp(min=1e-3)).transpose(1, 2), sizes.squeeze(1) > 0


def word_embedding(ids: Sequence[int], embeddings: Tensor) -> Tensor:
    """(E,) float32: the mean of the LLM's `embeddings` (V, E) of a label's tokens."""
    return embeddings[list(ids)].float().mean(dim=0)
