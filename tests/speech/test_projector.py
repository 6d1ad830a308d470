import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from svbatch.onnx import OnnxSession
from svbatch.speech.projector import ConvolutionalProjector, LayerMix, Projector, ProjectorConfig, num_embeddings


@pytest.fixture(scope="module")
def projector() -> Projector:
    torch.manual_seed(0)
    config = ProjectorConfig(encoder_width=12, width=16, llm_width=24, num_layers=2, num_heads=2)
    return Projector(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def session(tiny_bundle) -> OnnxSession:
    return OnnxSession(tiny_bundle.path("projector.onnx"), weights_dir=tiny_bundle.folder)


@pytest.fixture(scope="module")
def published(tiny_bundle) -> Projector:
    """The tiny bundle's projector in torch, from the same file of float16 weights."""
    manifest = tiny_bundle.manifest
    config = {**manifest.projector.config, "encoder_width": manifest.encoder.width, "llm_width": 64, "tone": (4, 2)}
    module = Projector(ProjectorConfig(**config)).eval().requires_grad_(False)
    weights = {
        k: v.float() for k, v in load_file(tiny_bundle.path("projector.safetensors")).items() if k != "token_ids"
    }
    module.load_state_dict(weights)
    return module


@settings(max_examples=40, deadline=None)
@given(num_frames=st.integers(1, 1500))
def test_four_frames_give_one_embedding_and_a_rest_gives_one_more(projector, num_frames):
    embeddings, blank, tone, labels = projector(torch.zeros(1, num_frames, 12), torch.tensor([num_frames]))
    assert embeddings.shape == (1, num_embeddings(num_frames), 24)
    assert blank.shape == (1, num_embeddings(num_frames))
    assert tone.shape == (1, 0, 24)
    assert labels.shape == (1, 0)


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 60), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_padding_changes_no_embedding_of_a_neighbour(projector, lengths, seed):
    rows = [torch.randn(length, 12, generator=torch.Generator().manual_seed(seed + length)) for length in lengths]
    batch = torch.full((len(rows), max(lengths), 12), 1e3)  # what lies past a row's end must not matter
    for place, row in zip(batch, rows, strict=True):
        place[: len(row)] = row
    together, blanks, *_ = projector(batch, torch.tensor(lengths))
    for i, row in enumerate(rows):
        alone, blank, *_ = projector(row[None], torch.tensor([len(row)]))
        real = num_embeddings(len(row))
        torch.testing.assert_close(together[i, :real], alone[0], atol=1e-4, rtol=0)
        torch.testing.assert_close(blanks[i, :real], blank[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("lengths", [[1], [4, 5, 37], [1500, 3]])
def test_the_graph_agrees_with_torch(published, session, lengths):
    frames = np.random.default_rng(1).standard_normal((len(lengths), max(lengths), 64)).astype(np.float32)
    given = session.run({"frames": frames, "lengths": np.array(lengths)})
    embeddings, blank, tone, labels = published(torch.from_numpy(frames), torch.tensor(lengths))
    assert given["embeddings"].shape == embeddings.shape
    np.testing.assert_allclose(given["tone"], tone.numpy(), atol=1e-3)
    np.testing.assert_allclose(given["labels"], labels.numpy(), atol=1e-3)
    for row, length in enumerate(lengths):
        real = num_embeddings(length)
        np.testing.assert_allclose(given["embeddings"][row, :real], embeddings[row, :real].numpy(), atol=1e-3)
        np.testing.assert_allclose(given["blank"][row, :real], blank[row, :real].numpy(), atol=1e-3)


def test_the_graph_reads_the_bundles_weights_and_repeats_none_of_them(tiny_bundle):
    graph, weights = tiny_bundle.path("projector.onnx"), tiny_bundle.path("projector.safetensors")
    assert b"projector.safetensors" in graph.read_bytes()
    assert load_file(weights)["output.weight"].dtype == torch.float16
    assert load_file(weights)["output.weight"].numpy().tobytes() not in graph.read_bytes()


def test_a_layer_mix_is_the_mean_of_the_layers_each_times_its_weight():
    mix = LayerMix(3)
    mix.weights.data = torch.tensor([1.0, 0.0, 2.0])
    layers = torch.randn(3, 2, 5, 4)
    expected = (layers[0] + 2 * layers[2]) / 3
    torch.testing.assert_close(mix(torch.cat([*layers], dim=2)), expected)


@pytest.mark.parametrize(("strides", "mixed_layers"), [((2, 2), 1), ((2, 1), 3), ((1, 1), 1)])
def test_the_papers_projector_pads_without_a_trace_and_keeps_its_rate(strides, mixed_layers):
    torch.manual_seed(0)
    projector = ConvolutionalProjector(
        encoder_width=6, llm_width=8, strides=strides, mixed_layers=mixed_layers, voice_width=3
    )
    rows = [torch.randn(length, 6 * mixed_layers + 3) for length in (9, 23)]
    padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=7.0)
    with torch.inference_mode():
        together = projector(padded, torch.tensor([9, 23]))
        for row, embeddings in zip(rows, together, strict=True):
            alone = projector(row[None], torch.tensor([len(row)]))[0]
            assert len(alone) == num_embeddings(len(row), projector.downsampling)
            torch.testing.assert_close(embeddings[: len(alone)], alone)
            other_voice = torch.cat([row[:, :-3], torch.randn(len(row), 3)], dim=1)
            torch.testing.assert_close(projector(other_voice[None], torch.tensor([len(row)]))[0], alone)
