"""Speech encoders as ONNX graphs from waveform to frames, weights outside the graph.

Covered: transformers' Whisper encoders, log-mel inside, any length up to the window, a length per row so that
padding changes no frame of a neighbour; float32 and float16. A graph refers to the weights by the names of the
encoder's own state dict, so `assemble_weights` can lay them down on any machine without an exporter.
"""

import json
import struct
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from svbatch.errors import BundleError
from svbatch.speech.projector import Projector

SAMPLE_RATE_HZ = 16_000
HOP_SAMPLES = 160  # one log-mel column, 10 ms
FFT_SAMPLES = 400
WINDOW_SAMPLES = 480_000
EXTERNAL_DATA = "encoder.weights"
MIN_EXTERNAL_BYTES = 1024
HIDDEN = 30_000.0  # fits float16, and exp(-30000) is 0


class WhisperWaveformEncoder(nn.Module):
    """Whisper's log-mel and encoder as one module: (B, S) float32 at 16 kHz and (B,) int64 samples -> (B, T, D).

    T = ceil(S / 320), 50 Hz. With `lengths` equal to S, and S to 30 s, it is Whisper's own encoder but for the
    reflection at the very end of the window, which is silence here. Frames past a row's length are zero.
    """

    def __init__(self, encoder: WhisperEncoder) -> None:
        super().__init__()
        self.encoder = encoder
        extractor = WhisperFeatureExtractor(feature_size=encoder.num_mel_bins)
        angles = 2 * np.pi * np.outer(np.arange(FFT_SAMPLES // 2 + 1), np.arange(FFT_SAMPLES)) / FFT_SAMPLES
        hann = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(FFT_SAMPLES) / FFT_SAMPLES)
        basis = np.concatenate([np.cos(angles), -np.sin(angles)]) * hann
        self.register_buffer("fourier", torch.tensor(basis, dtype=torch.float32)[:, None, :])
        self.register_buffer("mel", torch.tensor(extractor.mel_filters.T, dtype=torch.float32))

    def log_mel(self, waveform: Tensor, columns: Tensor) -> Tensor:
        """(B, S), (B,) valid columns -> (B, M, ceil(S / 160)), as Whisper scales it; zero past a row's end."""
        half = FFT_SAMPLES // 2
        head = waveform[:, 1 : half + 1].flip(1)
        tail = torch.zeros_like(waveform[:, :1]).expand(-1, half)
        padded = torch.cat([head, waveform, tail], dim=1)[:, None, :]
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
        attend = (frame_mask[:, None, None, :].to(dtype) - 1.0) * HIDDEN  # added to scores: cheaper than a choice
        for layer in encoder.layers:
            hidden = layer(hidden, attend)
        frames: Tensor = encoder.layer_norm(hidden) * frame_mask[:, :, None].to(dtype)
        return frames.float()


def export_encoder(encoder: WhisperEncoder, target: Path, *, half: bool = False) -> None:
    """Write `encoder` as the ONNX graph `target`, whose weights stay outside under `EXTERNAL_DATA`.

    `half` computes all but the log-mel in float16. `target` takes waveform (B, S) float32 and lengths (B,) int64 in
    samples, and gives frames (B, ceil(S / 320), D) float32.
    """
    encoder.eval().requires_grad_(False)
    module = WhisperWaveformEncoder(encoder.half() if half else encoder).eval()
    seconds = torch.tensor([32_000, 24_000])
    batch, samples = torch.export.Dim("batch", min=1), torch.export.Dim("samples", max=WINDOW_SAMPLES)
    program = torch.onnx.export(
        module,
        (torch.randn(2, 32_000), seconds),
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=["waveform", "lengths"],
        output_names=["frames"],
        dynamic_shapes={"waveform": {0: batch, 1: samples}, "lengths": {0: batch}},
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    model = _without_traces(program.model_proto)
    _move_weights_outside(model, dict(encoder.named_parameters(prefix="encoder")))
    target.write_bytes(model.SerializeToString())


def _move_weights_outside(model: onnx.ModelProto, weights: Mapping[str, Tensor]) -> None:
    offset = 0
    for tensor in model.graph.initializer:
        if tensor.name in weights and len(tensor.raw_data) >= MIN_EXTERNAL_BYTES:
            length = len(tensor.raw_data)
            set_external_data(tensor, EXTERNAL_DATA, offset=offset, length=length)
            tensor.ClearField("raw_data")
            offset += length


def assemble_weights(graph: Path, weights: Mapping[str, Tensor], target: Path) -> None:
    """Lay down the external data of `graph` as the file `target`: the one fixed rule, so its hash is fixed too.

    `weights` are the encoder's state dict, named as in the graph (`encoder.layers.0…`). Each tensor lies at the
    offset the graph gives it, in the graph's dtype, little-endian. Raises BundleError for a tensor that is not there
    or has another shape.
    """
    model = onnx.load(str(graph), load_external_data=False)
    with target.open("wb") as file:
        for tensor in model.graph.initializer:
            if tensor.data_location != onnx.TensorProto.EXTERNAL:
                continue
            source = weights.get(tensor.name)
            if source is None or list(source.shape) != list(tensor.dims):
                raise BundleError(
                    f"{graph}: wants {tensor.name} of shape {list(tensor.dims)}, the weights hold "
                    f"{None if source is None else list(source.shape)}; fetch the bundle again"
                )
            where = {entry.key: entry.value for entry in tensor.external_data}
            file.seek(int(where["offset"]))
            file.write(source.numpy().astype(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)).tobytes())


def export_projector(projector: Projector, target: Path, weights_name: str) -> None:
    """Write `projector` as the ONNX graph `target` over the float16 weights in `weights_name` beside it.

    That file (safetensors, one tensor per parameter name) must exist. The graph takes frames (B, T, D) float32 and
    lengths (B,) int64, gives embeddings (B, ceil(T / 4), E) and blank logits (B, ceil(T / 4)), both float32.
    """
    batch, frames = torch.export.Dim("batch", min=1), torch.export.Dim("frames", max=100_000)
    width = projector.convs[0].in_channels
    program = torch.onnx.export(
        projector.eval(),
        (torch.randn(2, 300, int(width)), torch.tensor([300, 200])),
        dynamo=True,
        optimize=False,
        verbose=False,
        input_names=["frames", "lengths"],
        output_names=["embeddings", "blank"],
        dynamic_shapes={"frames": {0: batch, 1: frames}, "lengths": {0: batch}},
    )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    model = _without_traces(program.model_proto)
    _read_half_from(model, target.parent / weights_name)
    target.write_bytes(model.SerializeToString())


def _read_half_from(model: onnx.ModelProto, weights: Path) -> None:
    """Point every initializer that safetensors `weights` holds at its bytes there, cast to float32 in the graph."""
    with weights.open("rb") as file:
        (header_bytes,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(header_bytes))
    casts = []
    for tensor in model.graph.initializer:
        entry = header.get(tensor.name)
        if entry is None or tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        start, end = entry["data_offsets"]
        name, tensor.name = tensor.name, f"{tensor.name}.half"
        tensor.data_type = onnx.TensorProto.FLOAT16
        set_external_data(tensor, weights.name, offset=8 + header_bytes + start, length=end - start)
        tensor.ClearField("raw_data")
        casts.append(onnx.helper.make_node("Cast", [tensor.name], [name], to=onnx.TensorProto.FLOAT))
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without the exporter's stack traces, which hold paths of the machine that exported it."""
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]
    return model
