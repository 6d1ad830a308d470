from copy import deepcopy

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import WhisperFeatureExtractor

import svbatch
from svbatch.errors import BundleError
from svbatch.model import load_encoder
from svbatch.onnx import OnnxSession
from svbatch.speech.encoder import FRAME_SAMPLES, WINDOW_SAMPLES, encode, num_frames
from svbatch.speech.export import EXTERNAL_DATA, assemble_weights, export_encoder


@pytest.fixture(scope="module")
def session(tiny_base) -> OnnxSession:
    return load_encoder(tiny_base, "cpu")


@pytest.fixture(scope="module")
def state(tiny_whisper) -> dict[str, torch.Tensor]:
    return {f"encoder.{name}": weight for name, weight in tiny_whisper.model.encoder.state_dict().items()}


@pytest.fixture(scope="module")
def reference(tiny_whisper, bursts) -> tuple[np.ndarray, np.ndarray]:
    """A sound and its frames (1500, D) by transformers' own log-mel and encoder."""
    waveform = bursts(3.0, 0.5, 2.0, seed=5)
    features = WhisperFeatureExtractor(feature_size=80)(waveform, sampling_rate=16_000, return_tensors="pt")
    return waveform, tiny_whisper.model.encoder(features.input_features).last_hidden_state[0].numpy()


def frames_of(session: OnnxSession, waveform: np.ndarray) -> np.ndarray:
    return session.run({"waveform": waveform[None], "lengths": np.array([len(waveform)])})["frames"][0]


def test_the_graph_agrees_with_transformers(session, reference):
    waveform, frames = reference
    np.testing.assert_allclose(encode(session, [waveform])[0], frames, atol=1e-3)


def test_half_precision_agrees_with_transformers_to_a_hundredth(tiny_whisper, state, reference, tmp_path, exporting):
    graph = tmp_path / "half.onnx"
    with exporting():
        export_encoder(deepcopy(tiny_whisper.model.encoder), graph, half=True)
    assemble_weights(graph, state, tmp_path / EXTERNAL_DATA)
    waveform, frames = reference
    given = encode(OnnxSession(graph, weights_dir=tmp_path), [waveform])[0]
    np.testing.assert_allclose(given, frames, atol=1e-2)


def test_padding_changes_no_frame_of_a_neighbour(session, bursts):
    sounds = [bursts(0.7, seed=1), bursts(2.0, 0.3, 1.0, seed=2), bursts(0.05, seed=3)]
    batch = np.zeros((3, max(map(len, sounds))), np.float32)
    for row, sound in zip(batch, sounds, strict=True):
        row[: len(sound)] = sound
    together = session.run({"waveform": batch, "lengths": np.array([len(sound) for sound in sounds])})["frames"]
    for row, sound in zip(together, sounds, strict=True):
        alone = frames_of(session, sound)
        np.testing.assert_allclose(row[: len(alone)], alone, atol=1e-4)
        assert not row[len(alone) :].any()


@settings(max_examples=15, deadline=None)
@given(num_samples=st.integers(1, 20_000))
def test_every_320_samples_give_one_frame_and_a_rest_gives_one_more(session, num_samples):
    frames = frames_of(session, np.ones(num_samples, np.float32))
    assert frames.shape == (num_frames(num_samples), 64)
    assert num_frames(num_samples) == -(-num_samples // FRAME_SAMPLES)


@settings(max_examples=15, deadline=None)
@given(num_columns=st.integers(2, 125))
def test_every_two_columns_of_the_spectrum_give_one_frame(session, num_columns):
    frames = frames_of(session, np.ones(160 * num_columns, np.float32))
    assert frames.shape == (num_frames(160 * num_columns), 64)


def test_a_window_of_exactly_30_s_has_1500_frames(session):
    assert frames_of(session, np.zeros(WINDOW_SAMPLES, np.float32)).shape == (1500, 64)


def test_a_sound_is_the_same_alone_and_among_others(session, bursts):
    sounds = [bursts(1.0, seed=seed) for seed in range(3)]
    alone = np.concatenate([encode(session, [sound]) for sound in sounds])
    np.testing.assert_allclose(encode(session, sounds), alone, atol=1e-4)


def test_the_graph_holds_no_path_of_the_machine_that_made_it(tiny_base):
    content = tiny_base.path("encoder.onnx").read_bytes()
    assert str(svbatch.__path__[0]).encode() not in content
    assert b"site-packages" not in content
    assert b".py" not in content


def test_weights_are_laid_down_the_same_each_time_and_fill_the_file(tiny_base, state, tmp_path):
    graph = tiny_base.path("encoder.onnx")
    for name in ("first", "second"):
        assemble_weights(graph, state, tmp_path / name)
    outside = [
        tensor
        for tensor in onnx.load(graph, load_external_data=False).graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    ]
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()
    assert (tmp_path / "first").stat().st_size == sum(4 * int(np.prod(tensor.dims)) for tensor in outside)
    assert len(outside) > 10


def test_weights_of_another_encoder_are_refused_by_name(tiny_base, state, tmp_path):
    graph = tiny_base.path("encoder.onnx")
    wider = state | {"encoder.conv1.weight": torch.zeros(80, 80, 3)}
    with pytest.raises(
        BundleError, match=r"encoder\.conv1\.weight of shape \[64, 80, 3\], the weights hold \[80, 80, 3\]"
    ):
        assemble_weights(graph, wider, tmp_path / "weights")
    del wider["encoder.conv1.weight"]
    with pytest.raises(BundleError, match=r"encoder\.conv1\.weight of shape .*, the weights hold None"):
        assemble_weights(graph, wider, tmp_path / "weights")
