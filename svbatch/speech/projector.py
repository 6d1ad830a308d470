"""Projectors: an encoder's frames to speech embeddings at 12.5 Hz and LLM width.

SpeechVerse 2.1 has two blocks of Conv1d(k=3) and LayerNorm, `ConvolutionalProjector`. Ours, `Projector`, adds a GELU,
optional transformer layers, a linear layer to the LLM's width and the blank of the read-out, and may have a head for
the tone of voice. Both may begin with a learned mix of the encoder's layers. Padding never reaches a real frame: every
convolution sees zeros past a row's length, every attention is masked.
"""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from svbatch.speech.layers import TransformerLayer, length_mask
from svbatch.speech.tone import ToneHead


class ProjectorConfig(BaseModel):
    """Shape of a projector. encoder_width: of one layer. strides: of the convolutions; all together they make
    12.5 Hz. mixed_layers: how many layers of the encoder stand side by side in a frame; 1 is the last alone.
    voice_width: of what follows them for the voice (svbatch.speech.chosen_layers). tone: how many labels each attribute
    of the voice has that is read (svbatch.speech.tone); counted: the place among them of how many speak."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    encoder_width: int
    width: int
    llm_width: int
    num_layers: int = 0
    num_heads: int = 8
    dropout: float = 0.0
    strides: tuple[int, ...] = (2, 2)
    mixed_layers: int = 1
    voice_width: int = 0
    tone: tuple[int, ...] = ()
    counted: int | None = None


class LayerMix(nn.Module):
    """The mean of the encoder's layers, each times a free learned scalar: (1 / L) Σ w_l h_l, SpeechVerse 2.1.

    (B, T, L · D), the layers side by side, -> (B, T, D).
    """

    def __init__(self, num_layers: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.ones(num_layers))

    def forward(self, frames: Tensor) -> Tensor:
        layers = torch.unflatten(frames, 2, (len(self.weights), -1))
        mixed: Tensor = (layers * self.weights[:, None]).mean(dim=2)
        return mixed


class ConvolutionalProjector(nn.Module):
    """The paper's: blocks of Conv1d(k=3) and LayerNorm, the LLM's width throughout. Padding 1 and biases are ours, the
    paper does not say; its parameter counts do not tell them from their absence."""

    def __init__(
        self,
        *,
        encoder_width: int,
        llm_width: int,
        strides: Sequence[int],
        mixed_layers: int = 1,
        voice_width: int = 0,
    ) -> None:
        super().__init__()
        widths = [encoder_width, *(llm_width for _ in strides)]
        self.strides = tuple(strides)
        self.said_width = encoder_width * mixed_layers
        self.frame_width = self.said_width + voice_width  # of which the last columns are not read
        self.mix = LayerMix(mixed_layers) if mixed_layers > 1 else nn.Identity()
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel_size=3, stride=stride, padding=1)
            for (a, b), stride in zip(pairwise(widths), strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(llm_width) for _ in strides)

    @property
    def downsampling(self) -> int:
        """Frames that make one speech embedding."""
        return math.prod(self.strides)

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, frame_width) and (B,) valid frames -> embeddings (B, ceil(T / downsampling), E)."""
        hidden: Tensor = self.mix(frames[:, :, : self.said_width])
        for conv, norm, stride in zip(self.convs, self.norms, self.strides, strict=True):
            hidden = hidden * length_mask(lengths, hidden.shape[1]).unsqueeze(2).to(hidden.dtype)
            hidden = norm(conv(hidden.transpose(1, 2)).transpose(1, 2))
            lengths = (lengths + stride - 1) // stride
        return hidden


class Projector(nn.Module):
    """Ours, for a bundle with a read-out."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        widths = [config.encoder_width, *(config.width for _ in config.strides)]
        self.strides = config.strides
        self.said_width = config.encoder_width * config.mixed_layers
        self.frame_width = self.said_width + config.voice_width
        self.mix = LayerMix(config.mixed_layers) if config.mixed_layers > 1 else nn.Identity()
        self.convs = nn.ModuleList(
            nn.Conv1d(a, b, kernel_size=3, stride=stride, padding=1)
            for (a, b), stride in zip(pairwise(widths), config.strides, strict=True)
        )
        self.norms = nn.ModuleList(nn.LayerNorm(config.width) for _ in self.convs)
        self.dropout = nn.Dropout(config.dropout)
        self.layers = nn.ModuleList(
            TransformerLayer(config.width, config.num_heads, config.dropout) for _ in range(config.num_layers)
        )
        self.norm = nn.LayerNorm(config.width)
        self.output = nn.Linear(config.width, config.llm_width)
        self.blank = nn.Linear(config.width, 1)
        self.log_scale = nn.Parameter(torch.zeros(()))
        self.tone = None
        if config.tone:
            width = config.voice_width or config.encoder_width
            self.tone = ToneHead(
                frame_width=width, num_labels=config.tone, llm_width=config.llm_width, counted=config.counted
            )

    @property
    def downsampling(self) -> int:
        """Frames that make one speech embedding."""
        return math.prod(self.strides)

    def voice(self, frames: Tensor) -> Tensor:
        """(B, T, frame_width) -> what the head for the tone is given: the columns for the voice, or the mix."""
        has_own = self.frame_width > self.said_width
        voice: Tensor = frames[:, :, self.said_width :] if has_own else self.mix(frames)
        return voice

    def forward(self, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(B, T, frame_width), (B,) valid frames -> embeddings (B, ceil(T / downsampling), E) at 12.5 Hz, blank logits
        of the same length, and the tone (B, A, E) with the log-probabilities of its labels (B, N), both of size 0
        without a head for it. Rows past `ceil(lengths / downsampling)` hold no meaning."""
        mixed: Tensor = self.mix(frames[:, :, : self.said_width])
        if self.tone is not None:
            tone, labels = self.tone(self.voice(frames), lengths)
        else:
            tone = mixed.new_zeros(mixed.shape[0], 0, self.output.out_features)
            labels = mixed.new_zeros(mixed.shape[0], 0)
        hidden = mixed
        for conv, norm, stride in zip(self.convs, self.norms, self.strides, strict=True):
            hidden = hidden * length_mask(lengths, hidden.shape[1]).unsqueeze(2).to(hidden.dtype)
            hidden = nn.functional.gelu(norm(conv(hidden.transpose(1, 2)).transpose(1, 2)))
            lengths = (lengths + stride - 1) // stride
        mask = length_mask(lengths, hidden.shape[1])
        hidden = self.dropout(hidden)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        hidden = self.norm(hidden)
        embeddings: Tensor = self.output(hidden)
        return embeddings, self.blank(hidden).squeeze(2), tone, labels


def num_embeddings(num_frames: int, downsampling: int = 4) -> int:
    """Speech embeddings that `num_frames` frames give."""
    return -(-num_frames // downsampling)
