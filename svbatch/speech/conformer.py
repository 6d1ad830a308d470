"""Conformer encoders over log-mel features as torch modules from waveform to frames, ready to become a graph.

The protocol is that of svbatch.speech.waveform: (B, S) float32 at 16 kHz and (B,) int64 samples -> (B, T, D),
zeros past a row's length, every sum over time masked. Covered, in float32: w2v-BERT's, which stacks columns of
Kaldi's log-mel (50 frames a second by two, 25 by four), and Parakeet's FastConformer, which subsamples by convolutions
(12.5 by eight).
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers.audio_utils import mel_filter_bank, window_function

from svbatch.speech.chosen_layers import ChosenLayers

HOP_SAMPLES = 160
FFT_SAMPLES = 512
WINDOW_SAMPLES = 400
PREEMPHASIS = 0.97
HIDDEN = 30_000.0


class LogMel(nn.Module):
    """Columns of log-mel: (B, S) -> (B, M, C), from frames of `kernel`'s length a hop apart; the kernel is linear and
    holds window, transform and whatever else is linear in a frame."""

    kernel: Tensor
    mel: Tensor

    def __init__(self, matrix: NDArray[Any], mel: NDArray[Any], *, floor: float, offset: float) -> None:
        super().__init__()
        parts = np.concatenate([matrix.real, matrix.imag])[:, None, :]
        self.register_buffer("kernel", torch.tensor(parts, dtype=torch.float32))
        self.register_buffer("mel", torch.tensor(mel.T, dtype=torch.float32))
        self.floor, self.offset = floor, offset

    def forward(self, waveform: Tensor) -> Tensor:
        spectrum = nn.functional.conv1d(waveform[:, None, :], self.kernel, stride=HOP_SAMPLES)
        real, imaginary = spectrum.chunk(2, dim=1)
        power = self.mel @ (real**2 + imaginary**2)
        return (power + self.offset).clamp(min=self.floor).log()


def _transform(num_samples: int) -> NDArray[np.complex128]:
    """The discrete Fourier transform of a frame, zeros after it: (257, num_samples)."""
    turns = np.outer(np.arange(FFT_SAMPLES // 2 + 1), np.arange(num_samples)) / FFT_SAMPLES
    return np.asarray(np.exp(-2j * np.pi * turns))


def _kaldi_log_mel(num_bins: int) -> LogMel:
    """As transformers' SeamlessM4TFeatureExtractor: 16-bit scale, no offset, pre-emphasis in a frame, Povey window."""
    centred = np.eye(WINDOW_SAMPLES) - 1 / WINDOW_SAMPLES
    emphasised = np.eye(WINDOW_SAMPLES) - PREEMPHASIS * np.eye(WINDOW_SAMPLES, k=-1)
    emphasised[0, 0] -= PREEMPHASIS
    window = window_function(WINDOW_SAMPLES, "povey", periodic=False)
    matrix = _transform(WINDOW_SAMPLES) @ (window[:, None] * emphasised @ centred) * 2**15
    mel = mel_filter_bank(257, num_bins, 20, 8000, 16_000, mel_scale="kaldi", triangularize_in_mel_space=True)
    return LogMel(matrix, mel, floor=1.192092955078125e-07, offset=0.0)


def _slaney_log_mel(num_bins: int) -> LogMel:
    """As transformers' ParakeetFeatureExtractor, pre-emphasis left to the caller."""
    window = np.zeros(FFT_SAMPLES)
    edge = (FFT_SAMPLES - WINDOW_SAMPLES) // 2
    window[edge : edge + WINDOW_SAMPLES] = np.hanning(WINDOW_SAMPLES)
    mel = mel_filter_bank(257, num_bins, 0.0, 8000.0, 16_000, norm="slaney", mel_scale="slaney")
    return LogMel(_transform(FFT_SAMPLES) * window, mel, floor=0.0, offset=2.0**-24)


def _normalised(columns: Tensor, mask: Tensor, *, scale: Callable[[Tensor], Tensor]) -> Tensor:
    """(B, M, C) at mean 0 where `mask` (B, 1, C) is True, divided by `scale` of its variance; zero elsewhere."""
    counts = mask.sum(dim=2, keepdim=True)
    mean = torch.where(mask, columns, 0.0).sum(dim=2, keepdim=True) / counts.clamp(min=1)
    centred = torch.where(mask, columns - mean, 0.0)
    variance = (centred**2).sum(dim=2, keepdim=True) / (counts - 1).clamp(min=1)
    return centred / scale(variance)


def _until(lengths: Tensor, size: int) -> Tensor:
    """(B,) -> (B, size), True on the first `lengths` places of each row."""
    return torch.arange(size)[None, :] < lengths[:, None]


class StackedEncoder(nn.Module):
    """w2v-BERT's Conformer with its log-mel. A row has as many frames as whole stacks of columns lie in its sound."""

    def __init__(self, model: Any, chosen: ChosenLayers) -> None:
        super().__init__()
        self.encoder, self.chosen = model, chosen
        model.set_attn_implementation("eager")
        self.stacked = model.config.feature_projection_input_dim // 80
        self.log_mel = _kaldi_log_mel(80)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        model, stacked = self.encoder, self.stacked
        size = (waveform.shape[1] + HOP_SAMPLES * stacked - 1) // (HOP_SAMPLES * stacked)
        sound = nn.functional.pad(waveform, (0, WINDOW_SAMPLES + HOP_SAMPLES * stacked))
        columns = self.log_mel(sound)[:, :, : size * stacked]
        num_columns = ((lengths - WINDOW_SAMPLES) // HOP_SAMPLES + 1).clamp(min=0)
        mask = _until(num_columns, size * stacked)[:, None, :]
        features = _normalised(columns, mask, scale=lambda variance: torch.sqrt(variance + 1e-7)).transpose(1, 2)
        real = _until(num_columns // stacked, size)
        hidden = model.feature_projection(features.reshape(features.shape[0], size, 80 * stacked))[0]
        hidden = hidden * real[:, :, None]
        attend = (real[:, None, None, :].float() - 1.0) * HIDDEN
        places = model.encoder.embed_positions
        positions = None if places is None else places(hidden)
        layers = []
        for layer in model.encoder.layers:
            hidden = layer(
                hidden, attention_mask=attend, relative_position_embeddings=positions, conv_attention_mask=real
            )
            layers.append(hidden)
        return self.chosen.frames(layers) * real[:, :, None]


class SubsampledEncoder(nn.Module):
    """Parakeet's FastConformer with its log-mel."""

    def __init__(self, model: Any, chosen: ChosenLayers) -> None:
        super().__init__()
        self.encoder, self.chosen = model, chosen
        model.set_attn_implementation("eager")
        self.log_mel = _slaney_log_mel(model.config.num_mel_bins)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        model = self.encoder
        size = (waveform.shape[1] + HOP_SAMPLES - 1) // HOP_SAMPLES
        emphasised = waveform - PREEMPHASIS * nn.functional.pad(waveform, (1, 0))[:, :-1]
        sound = torch.where(_until(lengths, waveform.shape[1]), emphasised, 0.0)
        half = FFT_SAMPLES // 2
        columns = self.log_mel(nn.functional.pad(sound, (half, half + HOP_SAMPLES)))[:, :, :size]
        mask = _until(lengths // HOP_SAMPLES, size)
        features = _normalised(columns, mask[:, None, :], scale=lambda variance: torch.sqrt(variance) + 1e-5)
        hidden = model.subsampling(features.transpose(1, 2), mask) * model.input_scale
        positions = model.encode_positions(hidden)
        num_frames = lengths // HOP_SAMPLES
        for _ in range(model.subsampling.num_layers):
            num_frames = (num_frames + 1) // 2
        real = _until(num_frames, hidden.shape[1])
        attend = (real[:, None, :] & real[:, :, None])[:, None]
        layers = []
        for layer in model.layers:
            hidden = layer(hidden, attention_mask=attend, position_embeddings=positions)
            layers.append(hidden)
        return self.chosen.frames(layers) * real[:, :, None]
