"""Exported wav2vec 2.0, WavLM and HuBERT graphs against the models themselves, tiny, random, group and layer norm."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    BertConfig,
    BertModel,
    HubertConfig,
    HubertModel,
    PreTrainedModel,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2Model,
    WavLMConfig,
    WavLMModel,
)

from svbatch.errors import BundleError
from svbatch.onnx import OnnxSession
from svbatch.speech.export import EXTERNAL_DATA, MIN_EXTERNAL_BYTES, export_encoder, write_encoder
from svbatch.speech.pretrained import load_encoder_to_export

TINY = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "conv_dim": (16,) * 7,
    "num_conv_pos_embeddings": 16,
    "num_conv_pos_embedding_groups": 2,
}
BASE = {"feat_extract_norm": "group", "do_stable_layer_norm": False}
LARGE = {"feat_extract_norm": "layer", "do_stable_layer_norm": True, "conv_bias": True}
MODELS = {
    "wavlm-base": (WavLMModel, WavLMConfig(**TINY, **BASE), False),
    "wavlm-large": (WavLMModel, WavLMConfig(**TINY, **LARGE), True),
    "wav2vec2-large": (Wav2Vec2Model, Wav2Vec2Config(**TINY, **LARGE), True),
    "hubert-base": (HubertModel, HubertConfig(**TINY, **BASE), True),
    "hubert-large": (HubertModel, HubertConfig(**TINY, **LARGE, conv_pos_batch_norm=True), True),
}
HALVED = ("wavlm-base", "hubert-large")  # one of each kind and of each norm: an export takes seconds


@dataclass(frozen=True)
class Exported:
    """`folder` holds a model in transformers' format, and its graph."""

    folder: Path

    def frames(self, waveform: NDArray[np.float32], lengths: list[int]) -> NDArray[np.float32]:
        session = OnnxSession(self.folder / "encoder.onnx", weights_dir=self.folder)
        return session.run({"waveform": waveform, "lengths": np.array(lengths)})["frames"]

    def expected(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """What transformers makes of one waveform alone: its feature extractor, then its model."""
        extractor = Wav2Vec2FeatureExtractor.from_pretrained(self.folder)
        values = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_values
        model = MODELS[self.folder.name][0].from_pretrained(self.folder).eval()
        with torch.inference_mode():
            return model(values).last_hidden_state[0].numpy()

    def weight_bytes(self) -> int:
        """Bytes of the model's weights in float32."""
        model = MODELS[self.folder.name][0].from_pretrained(self.folder)
        return sum(4 * weight.numel() for weight in model.parameters())


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> Exported:
    return exported_into(tmp_path_factory.mktemp("float32") / request.param, half=False)


@pytest.fixture(scope="module", params=HALVED)
def halved(request, tmp_path_factory) -> Exported:
    return exported_into(tmp_path_factory.mktemp("half") / request.param, half=True)


def exported_into(folder: Path, *, half: bool) -> Exported:
    kind, config, normalise = MODELS[folder.name]
    torch.manual_seed(0)
    model = kind(config).eval()
    shaken(model)
    model.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=normalise).save_pretrained(folder)
    encoder, wants_scaling = load_encoder_to_export(str(folder))
    assert wants_scaling == normalise
    write_encoder(encoder, folder, half=half, normalise=wants_scaling)
    return Exported(folder)


def shaken(model: PreTrainedModel) -> None:
    """Gives norms, biases and gates other values than the zeros and ones they begin with."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 1 or "gru_rel_pos" in name or "rel_attn_embed" in name:
                weight += 0.2 * torch.randn_like(weight)
    for name, buffer in model.named_buffers():
        if "running_mean" in name:
            buffer += 0.5


def speech(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    """A tone that comes and goes, over noise and an offset, as quiet as a far speaker."""
    random = np.random.default_rng(seed)
    times = np.arange(num_samples) / 16_000
    tone = np.sin(2 * np.pi * random.uniform(100, 800) * times) * np.sin(2 * np.pi * 3 * times)
    return (0.05 * tone + 0.01 * random.standard_normal(num_samples) + 0.002).astype(np.float32)


def padded(rows: list[NDArray[np.float32]], num_samples: int) -> NDArray[np.float32]:
    """Rows in one batch, with loud noise after each: a length, not silence, ends a row."""
    batch = np.random.default_rng(9).standard_normal((len(rows), num_samples)).astype(np.float32)
    for target, row in zip(batch, rows, strict=True):
        target[: len(row)] = row
    return batch


@pytest.mark.parametrize("num_samples", [400, 6_479, 480_000])
def test_a_graph_gives_the_frames_of_the_model_alone(exported, num_samples):
    waveform = speech(num_samples)
    expected = exported.expected(waveform)
    frames = exported.frames(waveform[None], [num_samples])[0]
    assert frames.shape == (-(-num_samples // 320), 32)
    np.testing.assert_allclose(frames[: len(expected)], expected, atol=1e-3)
    assert not frames[len(expected) :].any()


def test_half_is_within_a_hundredth(halved):
    waveform = speech(40_000)
    expected = halved.expected(waveform)
    frames = halved.frames(waveform[None], [len(waveform)])[0, : len(expected)]
    np.testing.assert_allclose(frames, expected, atol=1e-2, rtol=1e-2)


def test_padding_changes_no_frame_of_a_neighbour(exported):
    rows = [speech(9_000, seed=1), speech(24_321, seed=2), speech(480, seed=3)]
    together = exported.frames(padded(rows, 30_000), [len(row) for row in rows])
    assert together.shape == (3, 94, 32)
    for row, frames in zip(rows, together, strict=True):
        alone = exported.frames(row[None], [len(row)])[0]
        np.testing.assert_allclose(frames[: len(alone)], alone, atol=1e-4)
        assert not frames[len(alone) :].any()


def test_a_row_too_short_for_a_frame_is_zeros(exported):
    rows = [speech(399), speech(1), speech(8_000)]
    frames = exported.frames(padded(rows, 8_000), [399, 1, 8_000])
    assert np.isfinite(frames).all()
    assert not frames[:2].any()
    assert frames[2].any()
    assert not exported.frames(rows[1][None], [1]).any()


def test_a_graph_holds_no_path_of_this_machine(exported):
    content = (exported.folder / "encoder.onnx").read_bytes()
    for trace in (b".py", b"site-packages", f"{Path.home()}/".encode(), str(exported.folder).encode()):
        assert trace not in content


def test_weights_lie_beside_the_graph(exported):
    graph = onnx.load(exported.folder / "encoder.onnx", load_external_data=False).graph
    held = [t.name for t in graph.initializer if len(t.raw_data) >= MIN_EXTERNAL_BYTES]
    assert held in ([], ["buckets"])
    assert (exported.folder / EXTERNAL_DATA).stat().st_size > 0.9 * exported.weight_bytes()


def test_half_weights_take_half_the_room(halved):
    share = (halved.folder / EXTERNAL_DATA).stat().st_size / halved.weight_bytes()
    assert 0.4 < share < 0.6


def test_a_model_of_another_rate_is_refused(tmp_path):
    strides = (5, 2, 2, 2, 2, 2, 1)
    model = WavLMModel(WavLMConfig(**TINY, **BASE, conv_stride=strides))
    with pytest.raises(BundleError, match="a frame every 160 samples, wanted one every 320"):
        export_encoder(model, tmp_path / "encoder.onnx")


def test_a_model_of_another_kind_is_refused_by_its_name(tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = BertModel(BertConfig(vocab_size=30, **sizes))
    with pytest.raises(BundleError, match="BertModel is no speech encoder that is known here: Whisper, wav2vec"):
        export_encoder(model, tmp_path / "encoder.onnx")
    model.save_pretrained(tmp_path)
    with pytest.raises(BundleError, match="BertModel is no speech encoder that is known here"):
        load_encoder_to_export(str(tmp_path))


def test_a_folder_without_a_model_says_what_is_wanted(tmp_path):
    with pytest.raises(BundleError, match=r"no folder with a config\.json; give a model's folder"):
        load_encoder_to_export(str(tmp_path))


def test_a_model_that_lacks_weights_is_refused(tmp_path):
    model = HubertModel(HubertConfig(**TINY, **BASE))
    state = {name: weight for name, weight in model.state_dict().items() if "q_proj.weight" not in name}
    model.save_pretrained(tmp_path, state_dict=state)
    Wav2Vec2FeatureExtractor().save_pretrained(tmp_path)
    with pytest.raises(BundleError, match="lacks 2 weights"):
        load_encoder_to_export(str(tmp_path))


def test_a_model_that_does_not_say_how_it_scales_is_refused(tmp_path):
    HubertModel(HubertConfig(**TINY, **BASE)).save_pretrained(tmp_path)
    with pytest.raises(BundleError, match="transformers cannot load it"):
        load_encoder_to_export(str(tmp_path))
