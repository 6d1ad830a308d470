"""A frozen Whisper from the file in which CTranslate2 (faster-whisper) publishes it.

The file, all numbers little-endian (OpenNMT/CTranslate2, python/ctranslate2/specs/model_spec.py):

    text  = uint16 length, then so many bytes, the last one zero
    head  = uint32 binary version (5 or 6), text kind of model, uint32 its revision
    then  = uint32 count; per variable: text name, uint8 rank, uint32 per axis, uint8 dtype, uint32 bytes, it
    last  = uint32 count; per alias: text alias, text name of the variable it stands for

Covered: every size of Whisper, weights in float32 or float16. Not covered: files quantised to integers.
"""

import math
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from svbatch.errors import BundleError

BINARY_VERSIONS = (5, 6)
MODEL_KIND = "WhisperSpec"
DTYPES = {number: np.dtype(name) for number, name in enumerate(("<f4", "i1", "<i2", "<i4", "<f2"))}
HEAD_WIDTH = 64  # the same in every published Whisper

# A layer's modules: CTranslate2's name -> transformers' names; several share one weight, in this order.
SELF_ATTENTION = {
    "self_attention/linear_0": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attention/linear_1": ("self_attn.out_proj",),
    "self_attention/layer_norm": ("self_attn_layer_norm",),
}
CROSS_ATTENTION = {
    "attention/linear_0": ("encoder_attn.q_proj",),
    "attention/linear_1": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "attention/linear_2": ("encoder_attn.out_proj",),
    "attention/layer_norm": ("encoder_attn_layer_norm",),
}
FEED_FORWARD = {
    "ffn/linear_0": ("fc1",),
    "ffn/linear_1": ("fc2",),
    "ffn/layer_norm": ("final_layer_norm",),
}
LAYERS = {
    "encoder": SELF_ATTENTION | FEED_FORWARD,
    "decoder": SELF_ATTENTION | CROSS_ATTENTION | FEED_FORWARD,
}


class _Damage(Exception):
    """What is wrong inside a file whose name the caller knows."""


def load_whisper(path: Path) -> WhisperForConditionalGeneration:
    """The model in `path`: float32, in eval mode, without gradients; BundleError if it is not whole."""
    weights = read_ctranslate2(path)
    with torch.device("meta"):
        model: WhisperForConditionalGeneration = WhisperForConditionalGeneration(whisper_config(weights))
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise _unusable(path, " ".join(str(error).split())) from error
    model.tie_weights()
    model.requires_grad_(False)
    model.train(False)
    return model


def read_ctranslate2(path: Path) -> dict[str, Tensor]:
    """The state dict of transformers' WhisperForConditionalGeneration, float32, from CTranslate2's model.bin.

    `proj_out.weight` is the same tensor as the decoder's token embeddings. BundleError names a file that is
    missing, cut short, quantised or of another kind.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise BundleError(f"{path}: cannot be read ({error.strerror}); fetch the bundle again") from error
    try:
        return _state_dict(_parse_variables(content))
    except _Damage as damage:
        raise _unusable(path, str(damage)) from damage


def whisper_config(weights: Mapping[str, Tensor]) -> WhisperConfig:
    """The sizes that the shapes of a state dict tell; special ids are left out, the tokenizer has them."""
    num_ids, width = weights["model.decoder.embed_tokens.weight"].shape
    return WhisperConfig(
        vocab_size=num_ids,
        num_mel_bins=weights["model.encoder.conv1.weight"].shape[1],
        d_model=width,
        encoder_layers=_num_layers(weights, "encoder"),
        decoder_layers=_num_layers(weights, "decoder"),
        encoder_attention_heads=width // HEAD_WIDTH,
        decoder_attention_heads=width // HEAD_WIDTH,
        encoder_ffn_dim=weights["model.encoder.layers.0.fc1.weight"].shape[0],
        decoder_ffn_dim=weights["model.decoder.layers.0.fc1.weight"].shape[0],
        max_source_positions=weights["model.encoder.embed_positions.weight"].shape[0],
        max_target_positions=weights["model.decoder.embed_positions.weight"].shape[0],
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
        suppress_tokens=None,
        begin_suppress_tokens=None,
    )


def _num_layers(weights: Mapping[str, Tensor], side: str) -> int:
    return len({name.split(".")[3] for name in weights if name.startswith(f"model.{side}.layers.")})


def _unusable(path: Path, reason: str) -> BundleError:
    return BundleError(f"{path}: not a whole Whisper in CTranslate2's format: {reason}; fetch the bundle again")


def _parse_variables(content: bytes) -> dict[str, NDArray[np.generic]]:
    """Each variable's and alias's array, a view into `content`."""
    position = 0

    def take(num_bytes: int) -> memoryview:
        nonlocal position
        if position + num_bytes > len(content):
            raise _Damage(f"cut short: {position + num_bytes} bytes are needed, {len(content)} are there")
        position += num_bytes
        return memoryview(content)[position - num_bytes : position]

    def integer(code: str) -> int:
        return int(struct.unpack(f"<{code}", take(struct.calcsize(code)))[0])

    def text() -> str:
        return bytes(take(integer("H"))[:-1]).decode(errors="replace")

    version = integer("I")
    if version not in BINARY_VERSIONS:
        raise _Damage(f"binary version {version}, known are {BINARY_VERSIONS}")
    kind, _revision = text(), integer("I")
    if kind != MODEL_KIND:
        raise _Damage(f"a model of kind {kind!r}, not {MODEL_KIND!r}")
    variables: dict[str, NDArray[np.generic]] = {}
    for _ in range(integer("I")):
        name = text()
        shape = [integer("I") for _ in range(integer("B"))]
        dtype, num_bytes = DTYPES.get(integer("B")), integer("I")
        if dtype is None or dtype.itemsize * math.prod(shape) != num_bytes:
            raise _Damage(f"{name!r} has shape {shape} and dtype {dtype} in {num_bytes} bytes")
        variables[name] = np.frombuffer(take(num_bytes), dtype).reshape(shape)
    for _ in range(integer("I")):
        alias, name = text(), text()
        if name not in variables:
            raise _Damage(f"{alias!r} stands for {name!r}, which is missing")
        variables[alias] = variables[name]
    if position != len(content):
        raise _Damage(f"{len(content) - position} bytes follow its end")
    return variables


def _state_dict(variables: Mapping[str, NDArray[np.generic]]) -> dict[str, Tensor]:
    """The same weights under transformers' names, what CTranslate2 fused split again."""
    weights: dict[str, Tensor] = {}

    def tensor(name: str) -> Tensor:
        array = variables.get(name)
        if array is None:
            raise _Damage(f"{name!r} is missing")
        if array.dtype.kind != "f":
            raise _Damage(f"{name!r} is quantised to {array.dtype}; float32 or float16 is needed")
        return torch.from_numpy(array.astype(np.float32))

    def put(source: str, targets: Sequence[str]) -> None:
        is_norm = source.endswith("layer_norm")
        fused_weight = tensor(f"{source}/gamma" if is_norm else f"{source}/weight").tensor_split(len(targets))
        fused_bias = tensor(f"{source}/beta" if is_norm else f"{source}/bias").tensor_split(len(targets))
        for target, weight, bias in zip(targets, fused_weight, fused_bias, strict=True):
            weights[f"{target}.weight"] = weight
            if not target.endswith("k_proj"):  # Whisper's keys have no bias; CTranslate2 fills in zeros
                weights[f"{target}.bias"] = bias

    for side, modules in LAYERS.items():
        stems = {name.split("/")[1] for name in variables if name.startswith(f"{side}/layer_")}
        for layer in range(max(1, len(stems - {"layer_norm"}))):
            for source, targets in modules.items():
                names = [f"model.{side}.layers.{layer}.{target}" for target in targets]
                put(f"{side}/layer_{layer}/{source}", names)
        put(f"{side}/layer_norm", [f"model.{side}.layer_norm"])
        weights[f"model.{side}.embed_positions.weight"] = tensor(f"{side}/position_encodings/encodings")
    put("encoder/conv1", ["model.encoder.conv1"])
    put("encoder/conv2", ["model.encoder.conv2"])
    weights["model.decoder.embed_tokens.weight"] = tensor("decoder/embeddings/weight")
    weights["proj_out.weight"] = weights["model.decoder.embed_tokens.weight"]
    return weights
