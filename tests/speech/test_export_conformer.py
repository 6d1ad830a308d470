"""Exported Conformer encoders against transformers' own feature extractors and models, tiny and random."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import (
    ParakeetCTCConfig,
    ParakeetEncoder,
    ParakeetEncoderConfig,
    ParakeetFeatureExtractor,
    ParakeetForCTC,
    PreTrainedModel,
    SeamlessM4TFeatureExtractor,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2Config,
    Wav2Vec2ForCTC,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from svbatch.errors import BundleError
from svbatch.onnx import OnnxSession
from svbatch.speech.chosen_layers import ChosenLayers
from svbatch.speech.export import write_encoder
from svbatch.speech.pretrained import load_encoder_to_export
from svbatch.speech.waveform import encoder_of, frame_samples, waveform_encoder

TINY = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48}


def w2v_bert(stacked: int) -> Wav2Vec2BertModel:
    return Wav2Vec2BertModel(Wav2Vec2BertConfig(**TINY, feature_projection_input_dim=80 * stacked))


MODELS = {
    "w2v-bert": (lambda: w2v_bert(2), SeamlessM4TFeatureExtractor(), 320),
    "w2v-bert-25-hz": (lambda: w2v_bert(4), SeamlessM4TFeatureExtractor(stride=4), 640),
    "parakeet": (
        lambda: ParakeetEncoder(ParakeetEncoderConfig(**TINY, subsampling_conv_channels=16)),
        ParakeetFeatureExtractor(),
        1280,
    ),
}


@dataclass(frozen=True)
class Exported:
    kind: str
    folder: Path
    model: PreTrainedModel

    def frames(self, waveform: NDArray[np.float32], lengths: list[int]) -> NDArray[np.float32]:
        session = OnnxSession(self.folder / "encoder.onnx", weights_dir=self.folder)
        return session.run({"waveform": waveform, "lengths": np.array(lengths)})["frames"]

    def expected(self, waveform: NDArray[np.float32]) -> NDArray[np.float32]:
        """What transformers makes of one waveform alone, frames of its padding left out."""
        features = MODELS[self.kind][1](waveform, sampling_rate=16_000, return_tensors="pt")
        with torch.inference_mode():
            frames = self.model(**features).last_hidden_state[0].numpy()
        num_columns = int(features["attention_mask"].sum())
        return frames[: num_columns if self.kind != "parakeet" else -(-num_columns // 8)]


@pytest.fixture(scope="module", params=MODELS)
def exported(request, tmp_path_factory) -> Exported:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp(request.param)
    model = MODELS[request.param][0]().eval()
    model.save_pretrained(folder)
    encoder, normalise = load_encoder_to_export(str(folder))
    assert not normalise
    assert frame_samples(encoder.config) == MODELS[request.param][2]
    write_encoder(encoder, folder, half=False, normalise=normalise)
    return Exported(request.param, folder, model)


def speech(num_samples: int, seed: int = 0) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    times = np.arange(num_samples) / 16_000
    tone = np.sin(2 * np.pi * random.uniform(100, 800) * times) * np.sin(2 * np.pi * 3 * times)
    return (0.05 * tone + 0.01 * random.standard_normal(num_samples)).astype(np.float32)


@pytest.mark.parametrize("num_samples", [6_479, 24_321])
def test_a_graph_gives_the_frames_of_the_model_alone(exported, num_samples):
    waveform = speech(num_samples)
    expected = exported.expected(waveform)
    frames = exported.frames(waveform[None], [num_samples])[0]
    assert frames.shape == (-(-num_samples // MODELS[exported.kind][2]), 32)
    np.testing.assert_allclose(frames[: len(expected)], expected, atol=1e-3)
    assert not frames[len(expected) :].any()


def test_a_full_window_has_the_frames_of_its_rate(exported):
    frames = exported.frames(speech(480_000)[None], [480_000])
    assert frames.shape == (1, 480_000 // MODELS[exported.kind][2], 32)


def test_padding_changes_no_frame_of_a_neighbour(exported):
    rows = [speech(9_000, seed=1), speech(24_321, seed=2), speech(100, seed=3)]
    batch = np.random.default_rng(9).standard_normal((3, 30_000)).astype(np.float32)
    for target, row in zip(batch, rows, strict=True):
        target[: len(row)] = row
    together = exported.frames(batch, [len(row) for row in rows])
    assert np.isfinite(together).all()
    for row, frames in zip(rows, together, strict=True):
        alone = exported.frames(row[None], [len(row)])[0]
        np.testing.assert_allclose(frames[: len(alone)], alone, atol=1e-4)
        assert not frames[len(alone) :].any()


def test_all_layers_stand_side_by_side_for_a_learned_mix(exported):
    waveform = torch.from_numpy(speech(9_000))[None]
    with torch.inference_mode():
        last, mixed = (
            waveform_encoder(exported.model, half=False, normalise=False, chosen=ChosenLayers(mixed=is_mixed))(
                waveform, torch.tensor([9_000])
            )
            for is_mixed in (False, True)
        )
    assert mixed.shape == (1, last.shape[1], 64)
    torch.testing.assert_close(mixed[:, :, 32:], last)


def test_a_layer_for_the_voice_stands_behind_the_last_one(exported):
    waveform, lengths = torch.from_numpy(speech(9_000))[None], torch.tensor([9_000])
    with torch.inference_mode():
        mixed, voiced = (
            waveform_encoder(exported.model, half=False, normalise=False, chosen=chosen)(waveform, lengths)
            for chosen in (ChosenLayers(mixed=True), ChosenLayers(voice=1))
        )
    torch.testing.assert_close(voiced, torch.cat([mixed[:, :, 32:], mixed[:, :, :32]], dim=2))


def test_a_layer_that_the_encoder_has_not_is_refused(exported):
    with pytest.raises(BundleError, match="layer 3 for the voice: the encoder has layers 1 to 2; name one"):
        waveform_encoder(exported.model, half=False, normalise=False, chosen=ChosenLayers(voice=3))


def test_float16_is_refused(exported):
    with pytest.raises(BundleError, match="is computed in float32 here"):
        waveform_encoder(exported.model, half=True, normalise=False)


def test_an_encoder_is_found_inside_a_model_with_a_head_or_a_decoder():
    conv = {"conv_dim": (16,) * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2}
    ctc = Wav2Vec2ForCTC(Wav2Vec2Config(**TINY, **conv, vocab_size=9))
    assert encoder_of(ctc) is ctc.wav2vec2
    whisper = WhisperForConditionalGeneration(
        WhisperConfig(vocab_size=9, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=1,
                      decoder_attention_heads=1, encoder_ffn_dim=16, decoder_ffn_dim=16, pad_token_id=0,
                      bos_token_id=0, eos_token_id=0, decoder_start_token_id=0)
    )  # fmt: skip
    assert encoder_of(whisper) is whisper.model.encoder
    inner = MODELS["parakeet"][0]().config
    parakeet = ParakeetForCTC(ParakeetCTCConfig(vocab_size=9, pad_token_id=8, encoder_config=inner.to_dict()))
    assert encoder_of(parakeet) is parakeet.encoder
