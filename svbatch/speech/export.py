"""Speech encoders as ONNX graphs from waveform to frames, weights outside the graph.

Covered: the encoders of svbatch.speech.waveform, any length up to the window, a length per row so that padding
changes no frame of a neighbour; float32, and float16 but for the Conformers. A graph refers to the weights by the
names of the encoder's own state dict, so `assemble_weights` can lay them down on any machine without an exporter.
"""

import json
import logging
import struct
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx.external_data_helper import set_external_data
from torch import Tensor, nn
from transformers import PreTrainedModel

from svbatch.errors import BundleError
from svbatch.speech.chosen_layers import LAST_LAYER, ChosenLayers
from svbatch.speech.projector import ConvolutionalProjector, Projector
from svbatch.speech.waveform import WINDOW_SAMPLES, waveform_encoder

EXTERNAL_DATA = "encoder.weights"
MIN_EXTERNAL_BYTES = 1024


def write_encoder(
    encoder: PreTrainedModel, folder: Path, *, half: bool, normalise: bool, chosen: ChosenLayers = LAST_LAYER
) -> Path:
    """Writes folder/encoder.onnx with its weights, `EXTERNAL_DATA`, beside it, and returns the graph's path.

    `encoder` is changed as `export_encoder` says. Raises BundleError for another kind of model or if `folder`
    cannot be written.
    """
    graph = folder / "encoder.onnx"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        export_encoder(encoder, graph, half=half, normalise=normalise, chosen=chosen)
        assemble_weights(graph, _state(encoder), folder / EXTERNAL_DATA)
    except OSError as error:
        why = error.strerror or error
        raise BundleError(f"{folder}: cannot be written: {why}; choose another --output") from error
    return graph


def export_encoder(
    encoder: PreTrainedModel,
    target: Path,
    *,
    half: bool = False,
    normalise: bool = False,
    chosen: ChosenLayers = LAST_LAYER,
) -> None:
    """Write `encoder` as the ONNX graph `target`, whose weights stay outside under `EXTERNAL_DATA`.

    `encoder`, `half`, `normalise` and `chosen` are those of `waveform_encoder`. `target` takes waveform (B, S) float32
    and lengths (B,) int64 in samples, and gives frames (B, ceil(S / samples of a frame), D) float32. Raises BundleError
    for another kind of model.
    """
    module = waveform_encoder(encoder, half=half, normalise=normalise, chosen=chosen)
    seconds = torch.tensor([32_000, 24_000])
    batch, samples = torch.export.Dim("batch", min=1), torch.export.Dim("samples", max=WINDOW_SAMPLES)
    shapes = {"waveform": {0: batch, 1: samples}, "lengths": {0: batch}}
    model = _graph(module, (torch.randn(2, 32_000), seconds), shapes, ["frames"])
    _move_weights_outside(model, _state(encoder))
    target.write_bytes(model.SerializeToString())


def _state(encoder: PreTrainedModel) -> dict[str, Tensor]:
    """The encoder's weights, named as in its graph."""
    return {f"encoder.{name}": weight for name, weight in encoder.state_dict().items()}


def _move_weights_outside(model: onnx.ModelProto, weights: Mapping[str, Tensor]) -> None:
    offset = 0
    for tensor in model.graph.initializer:
        if tensor.name in weights and len(tensor.raw_data) >= MIN_EXTERNAL_BYTES:
            length = len(tensor.raw_data)
            set_external_data(tensor, EXTERNAL_DATA, offset=offset, length=length)
            tensor.ClearField("raw_data")
            offset += length


def assemble_weights(graph: Path, weights: Mapping[str, Tensor], target: Path) -> None:
    """Lay down the external data of `graph` as the file `target`: one fixed rule, so its hash is fixed too.

    `weights` are the encoder's state dict, named as in the graph (`encoder.layers.0…`). Each tensor lies at
    the offset the graph gives it, in the graph's dtype, little-endian. Raises BundleError for a tensor that
    is not there or has another shape.
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


def export_projector(projector: Projector | ConvolutionalProjector, target: Path, weights_name: str) -> None:
    """Write `projector` as the ONNX graph `target` over the float16 weights in `weights_name` beside it.

    That file (safetensors, one tensor per parameter name) must exist. The graph takes frames (B, T, D)
    float32 and lengths (B,) int64, and gives embeddings (B, ceil(T / downsampling), E), and where the projector has a
    read-out blank logits of the same length, the tone (B, A, E) and its labels' log-probabilities (B, N), all float32.
    """
    batch, frames = torch.export.Dim("batch", min=1), torch.export.Dim("frames", max=100_000)
    shapes = {"frames": {0: batch, 1: frames}, "lengths": {0: batch}}
    inputs = (torch.randn(2, 300, projector.frame_width), torch.tensor([300, 200]))
    outputs = ["embeddings", "blank", "tone", "labels"] if isinstance(projector, Projector) else ["embeddings"]
    model = _graph(projector.eval(), inputs, shapes, outputs)
    _read_half_from(model, target.parent / weights_name)
    target.write_bytes(model.SerializeToString())


def _read_half_from(model: onnx.ModelProto, weights: Path) -> None:
    """Point every initializer that safetensors `weights` holds at its bytes there, cast to float32."""
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


def _graph(
    module: nn.Module, inputs: tuple[Tensor, ...], shapes: dict[str, dict[int, Any]], outputs: list[str]
) -> onnx.ModelProto:
    """The graph of `module`, weights inside; `shapes` names the inputs and their free dimensions."""
    with _quiet_exporter():
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            optimize=False,
            verbose=False,
            input_names=list(shapes),
            output_names=outputs,
            dynamic_shapes=shapes,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export gave no program")
    return _without_traces(program.model_proto)


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch's exporter warns of its own insides and of packages that we do not use."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _without_traces(model: onnx.ModelProto) -> onnx.ModelProto:
    """`model` without the exporter's stack traces, which hold paths of the machine that exported it."""
    for node in (*model.graph.node, *(node for function in model.functions for node in function.node)):
        del node.metadata_props[:]
    return model
