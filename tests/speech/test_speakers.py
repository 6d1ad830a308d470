import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svbatch.onnx import OnnxSession
from svbatch.speech.export import _graph
from svbatch.speech.speakers import SpeakerCount, clues, window_statistics


@pytest.fixture(scope="module")
def counter() -> SpeakerCount:
    torch.manual_seed(0)
    counter = SpeakerCount(frame_width=5, num_labels=2)
    for weight in counter.buffers():
        weight.normal_()
    return counter


@settings(max_examples=20, deadline=None)
@given(lengths=st.lists(st.integers(1, 700), min_size=1, max_size=4), seed=st.integers(0, 9))
def test_what_stands_past_a_rows_end_or_beside_it_changes_nothing(counter, lengths, seed):
    rows = [torch.randn(length, 5, generator=torch.Generator().manual_seed(seed + length)) for length in lengths]
    batch = torch.full((len(rows), max(lengths), 5), 1e3)
    for place, row in zip(batch, rows, strict=True):
        place[: len(row)] = row
    together = counter(batch, torch.tensor(lengths))
    for own, row in zip(together, rows, strict=True):
        torch.testing.assert_close(own, counter(row[None], torch.tensor([len(row)]))[0], atol=1e-4, rtol=0)


def test_the_graph_counts_as_the_module_does(counter, tmp_path, exporting):
    batch, time = torch.export.Dim("batch", min=1), torch.export.Dim("frames", max=100_000)
    inputs = (torch.randn(2, 300, 5), torch.tensor([300, 200]))
    with exporting():
        graph = _graph(counter, inputs, {"frames": {0: batch, 1: time}, "lengths": {0: batch}}, ["logits"])
    (tmp_path / "graph.onnx").write_bytes(graph.SerializeToString())
    session = OnnxSession(tmp_path / "graph.onnx")
    for size in (20, 149, 150, 700):
        frames, lengths = torch.randn(3, size, 5), torch.tensor([size, size // 2, 1])
        given = session.run({"frames": frames.numpy(), "lengths": lengths.numpy()})["logits"]
        torch.testing.assert_close(torch.from_numpy(given), counter(frames, lengths), atol=1e-4, rtol=0)


@pytest.mark.parametrize(("size", "expected"), [(30, 1), (100, 2), (149, 2), (150, 3), (400, 8)])
def test_a_window_every_second_holds_at_least_one_or_all_that_there_is(size, expected):
    _, real = window_statistics(torch.randn(1, size, 5), torch.tensor([size]))
    assert int(real.sum()) == expected


def test_a_windows_mean_and_deviation_are_those_of_its_scaled_frames():
    frames = torch.randn(1, 150, 5)
    scaled = torch.nn.functional.layer_norm(frames, (5,))[0]
    windows, real = window_statistics(frames, torch.tensor([150]))
    second = scaled[50:150]
    torch.testing.assert_close(
        windows[0, 1], torch.cat([second.mean(0), second.std(0, correction=0)]), atol=1e-4, rtol=0
    )
    last = scaled[100:150]
    torch.testing.assert_close(windows[0, 2], torch.cat([last.mean(0), last.std(0, correction=0)]), atol=1e-4, rtol=0)
    assert real[0, :3].all()


def test_the_best_cut_the_average_and_the_farthest_pair():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    points = torch.stack([torch.stack([a, a, b, b]), torch.stack([a, b, a, b]), torch.stack([a, a, a, a])])
    told = clues(points, torch.ones(3, 4, dtype=torch.bool))
    torch.testing.assert_close(told[0], torch.tensor([0.0, 1 / 3, 0.0]))
    assert told[1, 0] > 0.4
    torch.testing.assert_close(told[1, 1:], torch.tensor([1 / 3, 0.0]))
    torch.testing.assert_close(told[2], torch.ones(3))
    alone = clues(points[:1], torch.tensor([[True, False, False, False]]))
    torch.testing.assert_close(alone, torch.ones(1, 3))
