"""Speech encoders as torch modules from waveform to frames, ready to become a graph.

All take waveform (B, S) float32 at 16 kHz, S up to 30 s, and lengths (B,) int64 samples, and give frames
(B, ceil(S / n), D) float32, n the samples of a frame (320: 50 Hz), zeros past a row's length. What follows a row's
length changes none of its frames: every sum over time is masked. Covered: Whisper, the wav2vec 2.0 family (wav2vec 2.0,
HuBERT, WavLM), and the Conformers of svbatch.speech.conformer; which one it is shows in a model's parts, not its name.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized, remove_parametrizations
from transformers import PreTrainedModel, WhisperFeatureExtractor

from svbatch.errors import BundleError
from svbatch.speech.chosen_layers import LAST_LAYER, ChosenLayers
from svbatch.speech.conformer import StackedEncoder, SubsampledEncoder

SAMPLE_RATE_HZ = 16_000
WINDOW_SAMPLES = 480_000
FRAME_SAMPLES = 320  # 50 frames a second
MAX_FRAMES = WINDOW_SAMPLES // FRAME_SAMPLES
HOP_SAMPLES = 160  # one log-mel column, 10 ms
FFT_SAMPLES = 400
HIDDEN = 30_000.0  # fits float16, and exp(-30000) is 0
VARIANCE_FLOOR = 1e-7  # transformers' Wav2Vec2FeatureExtractor adds it too


PARTS = {
    "whisper": ("conv1", "conv2", "embed_positions", "layers"),
    "convolutional": ("feature_extractor", "feature_projection", "encoder"),
    "stacked": ("feature_projection", "encoder"),
    "subsampled": ("subsampling", "encode_positions", "layers"),
}
"""What tells the kinds of encoders apart: the parts that each has, looked for in this order."""


def kind_of(module: nn.Module) -> str | None:
    """The first of PARTS whose parts the module has; None if it is no encoder."""
    held = dict(module.named_children())
    return next((kind for kind, parts in PARTS.items() if all(part in held for part in parts)), None)


def encoder_of(model: PreTrainedModel) -> PreTrainedModel:
    """The part of `model` that makes frames: itself, or what lies in a model with a decoder or a head.

    Raises BundleError if there is none.
    """
    for module in model.modules():
        if isinstance(module, PreTrainedModel) and kind_of(module) and not _is_decoder(module):
            return module
    raise BundleError(
        f"{type(model).__name__} is no speech encoder that is known here: Whisper, wav2vec 2.0, HuBERT, WavLM, "
        "w2v-BERT or Parakeet; name one of these"
    )


def _is_decoder(module: nn.Module) -> bool:
    return hasattr(module, "embed_tokens")


def frame_samples(config: Any) -> int:
    """Samples of sound at 16 kHz in one frame of an encoder of this config."""
    if hasattr(config, "conv_stride"):
        return int(np.prod(config.conv_stride))
    if hasattr(config, "subsampling_factor"):
        return HOP_SAMPLES * int(config.subsampling_factor)
    if hasattr(config, "feature_projection_input_dim"):
        return HOP_SAMPLES * (int(config.feature_projection_input_dim) // 80)
    return FRAME_SAMPLES


def waveform_encoder(
    encoder: PreTrainedModel, *, half: bool, normalise: bool, chosen: ChosenLayers = LAST_LAYER
) -> nn.Module:
    """The module around `encoder` (see `encoder_of`), which is changed in place.

    `half` computes in float16 all but the log-mel or the first convolution. `normalise` brings each row to
    mean 0 and variance 1 first, as the wav2vec 2.0 family wants it where its feature extractor says so; the others
    scale their log-mel. `chosen` says what makes a frame. Raises BundleError for another kind of model, or a layer
    that it has not.
    """
    model: Any = encoder  # transformers types its modules in part
    kind = kind_of(encoder_of(encoder))
    model.eval().requires_grad_(False)
    chosen.require(model.config.num_hidden_layers)
    if kind == "whisper":
        return WhisperWaveformEncoder(model.half() if half else model, chosen).eval()
    if kind == "convolutional":
        return ConvolutionalWaveformEncoder(model, chosen, half=half, normalise=normalise).eval()
    if half:
        raise BundleError(f"{type(encoder).__name__} is computed in float32 here; leave out --half")
    conformer = StackedEncoder if kind == "stacked" else SubsampledEncoder
    return conformer(model, chosen).eval()


class WhisperWaveformEncoder(nn.Module):
    """Whisper's log-mel and encoder as one module: (B, S) float32 and (B,) int64 samples -> (B, T, D).

    T = ceil(S / 320). With `lengths` equal to S, and S to 30 s, it is Whisper's own encoder but for the
    reflection at the very end of the window, which is silence here.
    """

    encoder: Any  # a WhisperEncoder
    fourier: Tensor
    mel: Tensor

    def __init__(self, encoder: Any, chosen: ChosenLayers = LAST_LAYER) -> None:
        super().__init__()
        self.encoder = encoder
        self.chosen = chosen
        extractor = WhisperFeatureExtractor(feature_size=encoder.num_mel_bins)  # type: ignore[no-untyped-call]
        angles = 2 * np.pi * np.outer(np.arange(FFT_SAMPLES // 2 + 1), np.arange(FFT_SAMPLES)) / FFT_SAMPLES
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SAMPLES) / FFT_SAMPLES)
        basis = np.concatenate([np.cos(angles), -np.sin(angles)]) * hann
        self.register_buffer("fourier", torch.tensor(basis, dtype=torch.float32)[:, None, :])
        self.register_buffer("mel", torch.tensor(extractor.mel_filters.T, dtype=torch.float32))

    def log_mel(self, waveform: Tensor, columns: Tensor) -> Tensor:
        """(B, S), (B,) valid columns -> (B, M, ceil(S / 160)) as Whisper scales it; zero past a row's end."""
        half = FFT_SAMPLES // 2
        tail = torch.zeros_like(waveform[:, :1]).expand(-1, half + HOP_SAMPLES - 1)
        sound = torch.cat([waveform, tail], dim=1)
        padded = torch.cat([sound[:, 1 : half + 1].flip(1), sound], dim=1)[:, None, :]
        spectrum = nn.functional.conv1d(padded, self.fourier, stride=HOP_SAMPLES)[:, :, :-1]
        real, imaginary = spectrum.chunk(2, dim=1)
        log_mel = (self.mel @ (real**2 + imaginary**2)).clamp(min=1e-10).log10()
        mask = torch.arange(log_mel.shape[2])[None, None, :] < columns[:, None, None]
        loudest = torch.where(mask, log_mel, -10.0).amax(dim=(1, 2), keepdim=True)
        return (torch.maximum(log_mel, loudest - 8.0) + 4.0) / 4.0 * mask

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        encoder = self.encoder
        dtype = encoder.conv1.weight.dtype
        columns = (lengths + HOP_SAMPLES - 1) // HOP_SAMPLES
        mel = self.log_mel(waveform, columns).to(dtype)
        column_mask = (torch.arange(mel.shape[2])[None, None, :] < columns[:, None, None]).to(dtype)
        hidden = nn.functional.gelu(encoder.conv1(mel)) * column_mask
        hidden = nn.functional.gelu(encoder.conv2(hidden)).transpose(1, 2)
        hidden = hidden + encoder.embed_positions.weight[: hidden.shape[1]]
        frame_mask = torch.arange(hidden.shape[1])[None, :] < ((columns + 1) // 2)[:, None]
        attend = (frame_mask[:, None, None, :].to(dtype) - 1.0) * HIDDEN  # adding is cheaper than a choice
        layers = []
        for layer in encoder.layers:
            hidden = layer(hidden, attend)
            layers.append(hidden)
        layers[-1] = encoder.layer_norm(hidden)
        frames = self.chosen.frames(layers) * frame_mask[:, :, None].to(dtype)
        return frames.float()


class ConvolutionalWaveformEncoder(nn.Module):
    """wav2vec 2.0, HuBERT or WavLM with its scaling of the waveform: (B, S) and (B,) int64 samples -> (B, T, D).

    T = ceil(S / 320). A row of n samples has the floor((n - 80) / 320) frames of the last layer that the
    model itself gives it alone, since one frame sees 400 samples; zeros follow.
    """

    encoder: Any
    buckets: Tensor

    def __init__(self, model: Any, chosen: ChosenLayers, *, half: bool, normalise: bool) -> None:
        super().__init__()
        self.chosen = chosen
        _require_fifty_frames_a_second(model)
        convolution = model.encoder.pos_conv_embed.conv
        if is_parametrized(convolution):  # weight norm: one plain weight computes the same
            remove_parametrizations(convolution, "weight")
        self.encoder = model.half() if half else model
        if half:  # sound without scaling is near float16's smallest numbers, and sums over time are long
            self.encoder.feature_extractor.conv_layers[0].float()
        self.dtype = torch.float16 if half else torch.float32
        self.normalise = normalise
        self.is_gated = hasattr(model.encoder.layers[0].attention, "gru_rel_pos_linear")  # WavLM's
        if self.is_gated:
            distances = torch.arange(1 - MAX_FRAMES, MAX_FRAMES)
            buckets = self.encoder.encoder.layers[0].attention._relative_positions_bucket(distances)
            self.register_buffer("buckets", buckets)

    def forward(self, waveform: Tensor, lengths: Tensor) -> Tensor:
        model, encoder = self.encoder, self.encoder.encoder
        scaled = _scaled(waveform, lengths) if self.normalise else waveform
        features, num_frames = self._features(scaled, lengths)
        projected = model.feature_projection(features.transpose(1, 2))
        hidden = projected[0] if isinstance(projected, tuple) else projected
        mask = torch.arange(hidden.shape[1])[None, :] < num_frames[:, None]
        hidden = hidden * mask[:, :, None].to(self.dtype)
        hidden = hidden + _positions(encoder.pos_conv_embed, hidden, mask)
        attend = (mask[:, None, None, :].to(self.dtype) - 1.0) * HIDDEN
        stable = model.config.do_stable_layer_norm
        hidden = hidden if stable else encoder.layer_norm(hidden)
        layers = self._layers(hidden, attend)
        layers[-1] = encoder.layer_norm(layers[-1]) if stable else layers[-1]
        frames = self.chosen.frames(layers) * mask[:, :, None].to(self.dtype)
        return frames.float()

    def _features(self, waveform: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, T) and the (B,) int64 frames of each row. The convolutions have no padding, so a frame is a
        row's own if all that it sees is; only the group norm of base models looks further."""
        receptive = _receptive_samples(self.encoder.config.conv_kernel, self.encoder.config.conv_stride)
        hidden = nn.functional.pad(waveform, (0, receptive - 1))[:, None, :]
        num_columns = lengths
        for index, layer in enumerate(self.encoder.feature_extractor.conv_layers):
            kernel, stride = layer.conv.kernel_size[0], layer.conv.stride[0]
            num_columns = ((num_columns - kernel) // stride + 1).clamp(min=0)
            norm = getattr(layer, "layer_norm", None)
            if isinstance(norm, nn.GroupNorm):
                hidden = layer.activation(_group_norm(norm, layer.conv(hidden), num_columns))
            else:
                hidden = layer(hidden)
            hidden = hidden.to(self.dtype) if index == 0 else hidden
        return hidden, num_columns

    def _layers(self, hidden: Tensor, attend: Tensor) -> list[Tensor]:
        """What each layer makes of (B, T, D)."""
        outputs = []
        layers = self.encoder.encoder.layers
        if not self.is_gated:
            for layer in layers:
                hidden = layer(hidden, attend)
                outputs.append(hidden)
            return outputs
        time = torch.arange(hidden.shape[1])
        buckets = self.buckets[time[None, :] - time[:, None] + MAX_FRAMES - 1]
        bias = layers[0].attention.rel_attn_embed(buckets).permute(2, 0, 1)
        stable = self.encoder.config.do_stable_layer_norm
        for layer in layers:
            if stable:
                hidden = hidden + _wavlm_attention(layer.attention, layer.layer_norm(hidden), bias, attend)
                hidden = hidden + layer.feed_forward(layer.final_layer_norm(hidden))
            else:
                hidden = layer.layer_norm(hidden + _wavlm_attention(layer.attention, hidden, bias, attend))
                hidden = layer.final_layer_norm(hidden + layer.feed_forward(hidden))
            outputs.append(hidden)
        return outputs


def _require_fifty_frames_a_second(model: Any) -> None:
    kind, strides = type(model).__name__, list(model.config.conv_stride)
    if int(np.prod(strides)) != FRAME_SAMPLES:
        raise BundleError(
            f"{kind} with conv_stride {strides} has a frame every {np.prod(strides)} samples, wanted one "
            f"every {FRAME_SAMPLES}; export a model of 50 frames a second"
        )
    if getattr(model, "adapter", None) is not None:
        raise BundleError(f"{kind} with add_adapter gives fewer than 50 frames a second; export one without")


def _receptive_samples(kernels: Sequence[int], strides: Sequence[int]) -> int:
    """Samples that one frame sees: 400 in all published models."""
    samples = 1
    for kernel, stride in zip(reversed(kernels), reversed(strides), strict=True):
        samples = (samples - 1) * stride + kernel
    return samples


def _scaled(waveform: Tensor, lengths: Tensor) -> Tensor:
    """Each row of (B, S) at mean 0 and variance 1 over its length, zero after it."""
    mask = torch.arange(waveform.shape[1])[None, :] < lengths[:, None]
    return _standardised(waveform, mask, lengths[:, None].clamp(min=1), VARIANCE_FLOOR)


def _group_norm(norm: nn.GroupNorm, hidden: Tensor, num_columns: Tensor) -> Tensor:
    """`norm`, whose groups are single channels, over the first `num_columns` of each row of (B, C, T)."""
    mask = torch.arange(hidden.shape[2])[None, None, :] < num_columns[:, None, None]
    standard = _standardised(hidden, mask, num_columns[:, None, None].clamp(min=1), norm.eps)
    return standard * norm.weight[:, None] + norm.bias[:, None]


def _standardised(values: Tensor, mask: Tensor, counts: Tensor, floor: float) -> Tensor:
    """`values` at mean 0 and variance 1 along the last axis, where `mask` is True; zero elsewhere."""
    mean = torch.where(mask, values, 0.0).sum(dim=-1, keepdim=True) / counts
    centred = torch.where(mask, values - mean, 0.0)
    variance = (centred**2).sum(dim=-1, keepdim=True) / counts
    return centred / torch.sqrt(variance + floor)


def _positions(embed: Any, hidden: Tensor, mask: Tensor) -> Tensor:
    """The positional convolution over (B, T, D) that is zero where `mask` is False."""
    columns = hidden.transpose(1, 2)
    batch_norm = getattr(embed, "batch_norm", None)
    if batch_norm is not None:  # would make something of the zeros
        columns = batch_norm(columns) * mask[:, None, :].to(columns.dtype)
    positions: Tensor = embed.activation(embed.padding(embed.conv(columns)))
    return positions.transpose(1, 2)


def _wavlm_attention(attention: Any, hidden: Tensor, bias: Tensor, attend: Tensor) -> Tensor:
    """WavLM's attention, position bias gated by the frame (arXiv 2110.13900, 3.1): (B, T, D) -> (B, T, D).

    `bias` (H, T, T) by distance, H heads; `attend` (B, 1, 1, T) is added to the scores. transformers' own
    puts minus infinity on hidden frames, which gives NaN for a row that has no frame.
    """

    def heads(values: Tensor) -> Tensor:
        return torch.unflatten(values, 2, (attention.num_heads, attention.head_dim)).transpose(1, 2)

    gates = torch.unflatten(attention.gru_rel_pos_linear(heads(hidden)), 3, (2, 4)).sum(-1).sigmoid()
    gate_a, gate_b = gates.chunk(2, dim=-1)
    gate = gate_a * (gate_b * attention.gru_rel_pos_const - 1.0) + 2.0
    queries, keys = heads(attention.q_proj(hidden)) * attention.scaling, heads(attention.k_proj(hidden))
    scores = queries @ keys.transpose(2, 3) + gate * bias + attend
    mixed = scores.softmax(dim=-1) @ heads(attention.v_proj(hidden))
    out: Tensor = attention.out_proj(mixed.transpose(1, 2).flatten(2))
    return out
