"""How many operations an ONNX graph takes: those of its matrix products and convolutions.

Exported graphs leave out most of their sizes, so one run is asked for them.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray


def graph_operations(path: Path, inputs: Mapping[str, NDArray[Any]], options: onnxruntime.SessionOptions) -> float:
    """Operations of one run with `inputs`, a multiplication with its addition being two; `options` load the graph."""
    model = onnx.load(path, load_external_data=False)
    products = [node for node in model.graph.node if node.op_type in ("MatMul", "Gemm", "Conv")]
    wanted = [name for node in products for name in (*node.input[:2], node.output[0])]
    sizes = dict(zip(wanted, _shapes(model, wanted, inputs, options), strict=True))
    return sum(_of_product(node, sizes) for node in products)


def _shapes(
    model: onnx.ModelProto,
    names: Sequence[str],
    inputs: Mapping[str, NDArray[Any]],
    options: onnxruntime.SessionOptions,
) -> Iterator[NDArray[np.int64]]:
    """The shape that each value of the graph has in one run."""
    for number, name in enumerate(names):
        model.graph.node.append(onnx.helper.make_node("Shape", [name], [f"shape {number}"]))
        model.graph.output.append(onnx.helper.make_tensor_value_info(f"shape {number}", onnx.TensorProto.INT64, [None]))
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    yield from session.run([f"shape {number}" for number in range(len(names))], dict(inputs))


def _of_product(node: onnx.NodeProto, sizes: Mapping[str, NDArray[np.int64]]) -> float:
    """Two for each number that is multiplied into a result."""
    left, right, result = (sizes[name].tolist() for name in (*node.input[:2], node.output[0]))
    if node.op_type == "Conv":
        inner = math.prod(right[1:])
    else:
        is_transposed = any(each.name == "transA" and each.i for each in node.attribute)
        inner = left[0] if is_transposed else left[-1]
    return 2.0 * float(math.prod(result) * inner)
