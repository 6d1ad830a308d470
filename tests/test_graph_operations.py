from pathlib import Path

import numpy as np
import pytest
import torch
from onnxruntime import SessionOptions

from svbatch.graph_operations import graph_operations
from svbatch.model import load_encoder
from svbatch.timing import part, watching


def exported(module: torch.nn.Module, example: torch.Tensor, path: Path) -> Path:
    axes = {0: torch.export.Dim("rows"), 1: torch.export.Dim("length")}
    torch.onnx.export(module, (example,), path, input_names=["x"], dynamic_shapes=(axes,), dynamo=True, verbose=False)
    return path


@pytest.mark.filterwarnings("ignore")
def test_operations_are_those_of_products_and_convolutions(tmp_path):
    class Layers(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = torch.nn.Conv1d(3, 5, kernel_size=4, stride=2)
            self.linear = torch.nn.Linear(5, 7)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            inside = self.linear(self.conv(x.transpose(1, 2)).transpose(1, 2))
            return inside @ inside.transpose(1, 2)

    path = exported(Layers(), torch.zeros(2, 20, 3), tmp_path / "graph.onnx")
    for rows, length in ((2, 20), (5, 33)):
        out = (length - 4) // 2 + 1
        expected = 2 * rows * out * (5 * 3 * 4 + 5 * 7 + out * 7)
        assert graph_operations(path, {"x": np.zeros((rows, length, 3), np.float32)}, SessionOptions()) == expected


def test_the_encoder_takes_what_its_weights_and_its_attention_say(tiny_bundle):
    """A Whisper encoder of two layers, 64 wide, 128 inside: 80 channels, and 50 frames a second out of a spectrum."""
    frames, width, inside = 50, 64, 128
    layers = 2 * (frames * (4 * width**2 + 2 * width * inside) + 2 * frames**2 * width)
    convolutions = 2 * frames * width * 80 * 3 + frames * width * width * 3
    spectrum = (2 * frames + 1) * 402 * 400 + 2 * frames * 80 * 201
    session = load_encoder(tiny_bundle, "cpu")
    with watching() as spent, part("encoder"):
        session.run({"waveform": np.zeros((1, 16_000), np.float32), "lengths": np.array([16_000])})
    assert spent["encoder"].operations == {"float32": 2 * (layers + convolutions + spectrum)}
