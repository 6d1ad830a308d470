"""The reader is judged by a writer of the same format, slow and obvious, that knows nothing of it."""

import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import WhisperConfig, WhisperForConditionalGeneration

from svbatch.errors import BundleError
from svbatch.speech.whisper import load_whisper, read_ctranslate2, whisper_config

DTYPE_NUMBERS = {"float32": 0, "int8": 1, "int16": 2, "int32": 3, "float16": 4}


@pytest.fixture(scope="module")
def whisper() -> WhisperForConditionalGeneration:
    """Random weights, all of them exact in float16; no part is as wide or as deep as another."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=90, num_mel_bins=20, d_model=128, encoder_layers=2, decoder_layers=3, pad_token_id=None,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=192, decoder_ffn_dim=160,
        max_source_positions=30, max_target_positions=24,
    )  # fmt: skip
    model = WhisperForConditionalGeneration(config).eval().requires_grad_(False)
    for parameter in model.parameters():
        parameter.copy_(torch.randn_like(parameter).mul(0.1).half())
    return model


@pytest.fixture
def model_bin(whisper, tmp_path) -> Path:
    path = tmp_path / "model.bin"
    path.write_bytes(ctranslate2_bytes(ctranslate2_variables(whisper)))
    return path


def ctranslate2_variables(model: WhisperForConditionalGeneration) -> dict[str, np.ndarray]:
    weights = model.state_dict()
    variables = {"encoder/num_heads": np.array(2, np.int16), "decoder/num_heads": np.array(2, np.int16)}

    def fused(source: str, *targets: str) -> None:
        zeros = torch.zeros(model.config.d_model)
        matrices = [weights[f"{target}.weight"] for target in targets]
        biases = [weights.get(f"{target}.bias", zeros) for target in targets]
        variables[f"{source}/weight"] = torch.cat(matrices).half().numpy()
        variables[f"{source}/bias"] = torch.cat(biases).half().numpy()

    def norm(source: str, target: str) -> None:
        variables[f"{source}/gamma"] = weights[f"{target}.weight"].half().numpy()
        variables[f"{source}/beta"] = weights[f"{target}.bias"].half().numpy()

    for side, num_layers in (
        ("encoder", model.config.encoder_layers),
        ("decoder", model.config.decoder_layers),
    ):
        for i in range(num_layers):
            ours, theirs = f"{side}/layer_{i}", f"model.{side}.layers.{i}"
            own = f"{theirs}.self_attn"
            fused(f"{ours}/self_attention/linear_0", f"{own}.q_proj", f"{own}.k_proj", f"{own}.v_proj")
            fused(f"{ours}/self_attention/linear_1", f"{own}.out_proj")
            norm(f"{ours}/self_attention/layer_norm", f"{theirs}.self_attn_layer_norm")
            if side == "decoder":
                cross = f"{theirs}.encoder_attn"
                fused(f"{ours}/attention/linear_0", f"{cross}.q_proj")
                fused(f"{ours}/attention/linear_1", f"{cross}.k_proj", f"{cross}.v_proj")
                fused(f"{ours}/attention/linear_2", f"{cross}.out_proj")
                norm(f"{ours}/attention/layer_norm", f"{theirs}.encoder_attn_layer_norm")
            fused(f"{ours}/ffn/linear_0", f"{theirs}.fc1")
            fused(f"{ours}/ffn/linear_1", f"{theirs}.fc2")
            norm(f"{ours}/ffn/layer_norm", f"{theirs}.final_layer_norm")
        norm(f"{side}/layer_norm", f"model.{side}.layer_norm")
        positions = weights[f"model.{side}.embed_positions.weight"]
        variables[f"{side}/position_encodings/encodings"] = positions.half().numpy()
    fused("encoder/conv1", "model.encoder.conv1")
    fused("encoder/conv2", "model.encoder.conv2")
    variables["decoder/projection/weight"] = weights["proj_out.weight"].half().numpy()
    return variables


def ctranslate2_bytes(variables: dict[str, np.ndarray], *, version: int = 6, kind: str = "WhisperSpec") -> bytes:
    def text(string: str) -> bytes:
        return struct.pack("<H", len(string) + 1) + string.encode() + b"\0"

    written = struct.pack("<I", version) + text(kind) + struct.pack("<II", 3, len(variables))
    for name, array in variables.items():
        written += text(name) + struct.pack(f"<B{array.ndim}I", array.ndim, *array.shape)
        written += struct.pack("<BI", DTYPE_NUMBERS[array.dtype.name], array.nbytes) + array.tobytes()
    return written + struct.pack("<I", 1) + text("decoder/embeddings/weight") + text("decoder/projection/weight")


def test_a_written_whisper_is_read_back_exactly(whisper, model_bin):
    weights, expected = read_ctranslate2(model_bin), whisper.state_dict()
    assert weights.keys() == expected.keys()
    assert all(weights[name].dtype == torch.float32 for name in weights)
    assert [name for name in weights if not torch.equal(weights[name], expected[name])] == []


def test_float32_weights_are_read_as_they_are(whisper, tmp_path):
    variables = ctranslate2_variables(whisper)
    wide = {n: a.astype(np.float32) + np.float32(1e-6) for n, a in variables.items() if a.dtype == np.float16}
    (tmp_path / "model.bin").write_bytes(ctranslate2_bytes(variables | wide))
    weights = read_ctranslate2(tmp_path / "model.bin")
    assert np.array_equal(weights["model.encoder.conv1.bias"].numpy(), wide["encoder/conv1/bias"])


def test_the_config_has_every_size_of_the_weights(whisper, model_bin):
    config = whisper_config(read_ctranslate2(model_bin))
    sizes = [
        "vocab_size", "num_mel_bins", "d_model", "encoder_layers", "decoder_layers", "encoder_ffn_dim",
        "decoder_ffn_dim", "encoder_attention_heads", "decoder_attention_heads", "max_source_positions",
        "max_target_positions",
    ]  # fmt: skip
    assert {s: getattr(config, s) for s in sizes} == {s: getattr(whisper.config, s) for s in sizes}


def logits(model: WhisperForConditionalGeneration) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    mel = torch.randn(2, model.config.num_mel_bins, 60, generator=generator)
    ids = torch.arange(10).view(2, 5)
    with torch.inference_mode():
        return model(input_features=mel, decoder_input_ids=ids).logits


def test_the_loaded_model_computes_what_the_written_one_did(whisper, model_bin):
    loaded = load_whisper(model_bin)
    assert torch.equal(logits(loaded), logits(whisper))
    assert not loaded.training
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    assert loaded.proj_out.weight is loaded.model.decoder.embed_tokens.weight


@pytest.mark.parametrize("share", [0.0, 0.001, 0.01, 0.3, 0.999])
def test_a_file_cut_short_is_refused_by_name(model_bin, share):
    content = model_bin.read_bytes()
    model_bin.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(BundleError, match=r"model\.bin: .*cut short: \d+ bytes are needed, \d+ are there"):
        load_whisper(model_bin)


def test_what_is_wrong_inside_a_file_is_said(whisper, tmp_path):
    good = ctranslate2_variables(whisper)
    lacking = {name: array for name, array in good.items() if name != "encoder/conv2/bias"}
    quantised = good | {"decoder/layer_0/ffn/linear_0/weight": np.zeros((160, 128), np.int8)}
    misshapen = good | {"encoder/layer_1/ffn/linear_0/weight": np.zeros((192, 127), np.float16)}
    for content, message in [
        (ctranslate2_bytes(good, version=4), "binary version 4"),
        (ctranslate2_bytes(good, kind="TransformerSpec"), "a model of kind 'TransformerSpec'"),
        (ctranslate2_bytes(good) + b"more", "4 bytes follow its end"),
        (ctranslate2_bytes(lacking), "'encoder/conv2/bias' is missing"),
        (ctranslate2_bytes(quantised), "'decoder/layer_0/ffn/linear_0/weight' is quantised to int8"),
        (ctranslate2_bytes(misshapen), "model.encoder.layers.1.fc1.weight"),
        (b"these are notes, not weights", "binary version"),
    ]:
        path = tmp_path / "model.bin"
        path.write_bytes(content)
        with pytest.raises(BundleError) as error:
            load_whisper(path)
        assert str(path) in str(error.value)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(BundleError, match=r"nowhere\.bin: cannot be read \(No such file or directory\)"):
        load_whisper(tmp_path / "nowhere.bin")


@pytest.mark.slow
def test_tiny_en_has_the_encoder_that_was_published():
    if "SVBATCH_TEST_WHISPER" not in os.environ:
        pytest.skip("SVBATCH_TEST_WHISPER names no folder with the model.bin of faster-whisper-tiny.en")
    model = load_whisper(Path(os.environ["SVBATCH_TEST_WHISPER"]) / "model.bin")
    assert sum(parameter.numel() for parameter in model.model.encoder.parameters()) == 8_208_384
    assert model.config.vocab_size == 51_864
