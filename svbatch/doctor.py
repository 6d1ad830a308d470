"""What works on this machine, what does not and why: each finding is tried here, none is looked up in a table."""

import contextlib
import io
import platform
import re
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch

from svbatch.bundle import Bundle, read_bundle, shipped_bundles
from svbatch.cache import cache_dir
from svbatch.errors import BundleError, SvbatchError
from svbatch.model import choose_precision, has_native_bfloat16
from svbatch.onnx import Device, OnnxSession, cuda_problem, first_line, num_threads

PACKAGES = ("svbatch", "torch", "onnxruntime-gpu", "transformers", "peft", "deltalake", "polars")


@dataclass(frozen=True)
class Finding:
    """`works` is None where nothing could fail: a plain fact."""

    subject: str
    works: bool | None
    detail: str


def diagnose(cache: Path | None) -> list[Finding]:
    """Versions, providers, precision, cache and bundles; `cache` is what --cache said, None if nothing."""
    onnx_cuda, torch_cuda = _onnx_on_cuda(), _torch_on_cuda()
    device: Device = "cuda" if onnx_cuda.works and torch_cuda.works else "cpu"
    chosen = f"a job with `device: auto` and `precision: auto` runs on {device} in "
    return [
        *_versions(),
        _onnx_on_cpu(),
        onnx_cuda,
        torch_cuda,
        _bfloat16(),
        Finding("choice", None, chosen + choose_precision("auto", device)),
        _cache(cache),
        *(_bundle(name, cache) for name in shipped_bundles()),
    ]


def bytes_to_fetch(bundle: Bundle) -> int:
    """Bytes of the bundle's fetched files that are not in the cache."""
    missing = 0
    for name, entry in bundle.manifest.fetched.items():
        try:
            bundle.path(name)
        except BundleError:
            missing += entry.size_bytes
    return missing


def megabytes(size_bytes: int) -> str:
    """A size as a person reads it."""
    return f"{size_bytes / 1e6:.1f} MB"


def _versions() -> Iterator[Finding]:
    yield Finding("python", None, f"{platform.python_version()} on {platform.platform()}")
    for package in PACKAGES:
        found = _version(package)
        yield Finding(package, None if found else False, found or "is not installed")
    if _version("onnxruntime"):
        yield Finding(
            "onnxruntime",
            False,
            "is installed beside onnxruntime-gpu and shares its files: `pip uninstall onnxruntime "
            "onnxruntime-gpu`, then `pip install onnxruntime-gpu`",
        )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _onnx_on_cpu() -> Finding:
    value = onnx.helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, [2])
    node = onnx.helper.make_node("Add", ["x", "x"], ["y"])
    graph = onnx.helper.make_graph([node], "probe", [value], [onnx.ValueInfoProto(name="y", type=value.type)])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=10)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "probe.onnx")
        path.write_bytes(model.SerializeToString())
        try:
            doubled = OnnxSession(path).run({"x": np.array([1.0, 2.0], np.float32)})["y"]
        except SvbatchError as error:
            return Finding("ONNX on cpu", False, str(error))
    right = bool((doubled == [2.0, 4.0]).all())
    return Finding("ONNX on cpu", right, f"{num_threads()} threads" if right else f"1 + 1 is {doubled[0]}")


def _onnx_on_cuda() -> Finding:
    said = io.StringIO()
    onnxruntime.set_default_logger_severity(4)  # it tells on stderr, in colour, what is told here in words
    with contextlib.redirect_stdout(said):  # where onnxruntime.preload_dlls names the libraries it lacks
        problem = cuda_problem()
    onnxruntime.set_default_logger_severity(2)  # its own default
    if problem is None:
        return Finding("ONNX on cuda", True, "a graph ran there")
    missing = ", ".join(dict.fromkeys(re.findall(r"Failed to load (\S+?):", said.getvalue())))
    why = f"{problem}; cannot be loaded: {missing}" if missing else problem
    wants = f"onnxruntime-gpu {onnxruntime.__version__} wants CUDA 13 and cuDNN 9"
    return Finding("ONNX on cuda", False, f"{why}; {wants}")


def _torch_on_cuda() -> Finding:
    if torch.version.cuda is None:
        return Finding("torch on cuda", False, f"torch {torch.__version__} is a build for the CPU alone")
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:  # how torch says that it finds no driver or no GPU
        return Finding("torch on cuda", False, f"built for CUDA {torch.version.cuda}: {first_line(error)}")
    names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
    return Finding("torch on cuda", True, f"CUDA {torch.version.cuda}: {names}")


def _bfloat16() -> Finding:
    if has_native_bfloat16():
        return Finding("bfloat16 on cpu", True, "the processor multiplies it itself (AVX512-BF16 or AMX)")
    return Finding("bfloat16 on cpu", False, "the processor does not multiply it itself: float32 is faster here")


def _cache(cache: Path | None) -> Finding:
    try:
        folder = cache_dir(cache)
    except BundleError as error:
        return Finding("cache", False, str(error))
    if not folder.is_dir():
        return Finding("cache", None, f"{folder}, not made yet")
    parts = sorted(path for path in folder.iterdir() if path.is_dir())
    sizes = ", ".join(f"{part.name} {megabytes(_folder_bytes(part))}" for part in parts)
    return Finding("cache", None, f"{folder}: {sizes or 'empty'}")


def _bundle(name: str, cache: Path | None) -> Finding:
    try:
        bundle = read_bundle(name, cache=cache)
        problems = bundle.check_folder()
        own = sum(entry.size_bytes for entry in bundle.manifest.files.values())
        absent = bytes_to_fetch(bundle)
    except BundleError as error:
        return Finding(f"bundle {name}", False, str(error))
    if problems:
        return Finding(f"bundle {name}", False, "; ".join(problems))
    rest = f"{megabytes(absent)} to fetch (`svbatch bundle fetch {name}`)" if absent else "all fetched"
    return Finding(f"bundle {name}", None if absent else True, f"{bundle.folder}, {megabytes(own)}; {rest}")


def _folder_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
