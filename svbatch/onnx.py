"""One ONNX session class for every graph, on the CPU and on CUDA alike.

Covered: the provider asked for is the provider that runs, or an error says why; weights kept outside a graph;
inputs and outputs bound in place. Not covered: which provider is best (the caller says).
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray

from svbatch.errors import BundleError, DeviceError
from svbatch.graph_operations import graph_operations
from svbatch.timing import count, counting, is_watched

Device = Literal["cpu", "cuda"]
PROVIDERS: Mapping[Device, str] = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxSession:
    """A graph ready to run on one device.

    `weights_dir` holds the external data that the graph names; None if the graph carries its own.
    Raises BundleError if the graph cannot be read, DeviceError if `device` does not work here:
    onnxruntime alone would fall back to the CPU without a word in its result.
    """

    def __init__(self, graph: Path, *, device: Device = "cpu", weights_dir: Path | None = None) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = num_threads()
        options.log_severity_level = 3
        if weights_dir is not None:
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(weights_dir))
        if device == "cuda":
            onnxruntime.preload_dlls()
        provider = PROVIDERS[device]
        try:
            self._session = onnxruntime.InferenceSession(graph.read_bytes(), sess_options=options, providers=[provider])
        except OSError as error:
            raise BundleError(f"{graph}: cannot be read ({error.strerror}); fetch the bundle again") from error
        except Exception as error:  # onnxruntime's own exception classes share no public base
            if device == "cuda":
                raise DeviceError(_no_cuda(first_line(error))) from error
            raise BundleError(
                f"{graph}: onnxruntime cannot load it ({first_line(error)}); run `svbatch bundle check`"
            ) from error
        if self._session.get_providers()[0] != provider:
            raise DeviceError(_no_cuda(f"onnxruntime offers {', '.join(self._session.get_providers())}"))
        self._device = device
        self._graph, self._options = graph, options
        self._operations: dict[tuple[tuple[int, ...], ...], float] = {}
        self.input_names = tuple(value.name for value in self._session.get_inputs())
        self.output_names = tuple(value.name for value in self._session.get_outputs())

    def run(self, inputs: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        """Every output by name, on the host, for `inputs` by name (C-contiguous arrays of the graph's dtypes)."""
        if is_watched():
            with counting():
                operations = self._operations_for(inputs)
            count(operations, "float32")
        binding = self._session.io_binding()
        for name, array in inputs.items():
            binding.bind_cpu_input(name, np.ascontiguousarray(array))
        for name in self.output_names:
            binding.bind_output(name, self._device)
        self._session.run_with_iobinding(binding)
        return dict(zip(self.output_names, binding.copy_outputs_to_cpu(), strict=True))

    def _operations_for(self, inputs: Mapping[str, NDArray[Any]]) -> float:
        key = tuple(array.shape for array in inputs.values())
        if key not in self._operations:
            self._operations[key] = graph_operations(self._graph, inputs, self._options)
        return self._operations[key]


def cuda_problem() -> str | None:
    """Why graphs cannot run on CUDA here, in one line; None if they can. Tried with a graph of one node."""
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [1])
    node = onnx.helper.make_node("Identity", ["x"], ["y"])
    graph = onnx.helper.make_graph([node], "probe", [value], [onnx.ValueInfoProto(name="y", type=value.type)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    onnxruntime.preload_dlls()
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=[PROVIDERS["cuda"]])
    except Exception as error:  # onnxruntime's own exception classes share no public base
        return first_line(error)
    offered = session.get_providers()
    return None if offered[0] == PROVIDERS["cuda"] else f"onnxruntime offers only {', '.join(offered)}"


def num_threads() -> int:
    """Processors this process may use; onnxruntime would count those of the whole machine."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def first_line(error: Exception) -> str:
    """The first line of an exception's message, for a one-line error."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def _no_cuda(why: str) -> str:
    return (
        f"CUDA was asked for and does not work here: {why}; onnxruntime-gpu {onnxruntime.__version__} wants CUDA 13 "
        "and cuDNN 9 (`svbatch doctor` says more); or set `device: cpu`"
    )
