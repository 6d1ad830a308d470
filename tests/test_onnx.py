import numpy as np
import onnx
import pytest

from svbatch.errors import BundleError, DeviceError
from svbatch.onnx import OnnxSession, cuda_problem


@pytest.fixture
def graph(tmp_path):
    """y = x + x."""
    values = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, ["n"]) for name in "xy"]
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    body = onnx.helper.make_graph([node], "double", values[:1], values[1:])
    model = onnx.helper.make_model(body, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    path = tmp_path / "double.onnx"
    path.write_bytes(model.SerializeToString())
    return path


@pytest.fixture
def no_cuda() -> str:
    problem = cuda_problem()
    if problem is None:
        pytest.skip("CUDA works here")
    return problem


def test_outputs_come_by_name_for_arrays_of_any_layout(graph):
    session = OnnxSession(graph)
    every_other = np.arange(8, dtype=np.float32)[::2]
    assert session.input_names == ("x",)
    assert session.run({"x": every_other})["y"].tolist() == [0.0, 4.0, 8.0, 12.0]


def test_cuda_that_does_not_work_is_an_error_and_no_fall_back(graph, no_cuda):
    with pytest.raises(DeviceError, match=r"CUDA was asked for and does not work here: .*device: cpu") as raised:
        OnnxSession(graph, device="cuda")
    assert raised.value.exit_code == 2
    assert "\n" not in str(raised.value)


def test_the_reason_why_cuda_does_not_work_is_one_line(no_cuda):
    assert no_cuda.strip()
    assert "\n" not in no_cuda


def test_a_graph_that_is_none_is_refused_by_name(graph):
    graph.write_bytes(graph.read_bytes()[:-9])
    with pytest.raises(BundleError, match=r"double\.onnx: onnxruntime cannot load it \(.*; run `svbatch bundle check`"):
        OnnxSession(graph)


def test_a_graph_that_is_missing_is_refused_by_name(tmp_path):
    with pytest.raises(BundleError, match=r"double\.onnx: cannot be read \(No such file"):
        OnnxSession(tmp_path / "double.onnx")
