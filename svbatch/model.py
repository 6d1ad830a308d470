"""A bundle's parts in memory: the frozen ones out of the cache, what was trained out of the bundle's folder."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file
from tokenizers import Tokenizer

from svbatch.bundle import Bundle, Calibration
from svbatch.cache import derived
from svbatch.errors import BundleError
from svbatch.language.llm import LanguageModel
from svbatch.language.weights import expand_gguf, lay_out_safetensors, load_language_model
from svbatch.onnx import Device, OnnxSession, cuda_problem
from svbatch.speech.encoder import FRAME_SAMPLES, SAMPLE_RATE_HZ
from svbatch.speech.export import assemble_weights
from svbatch.speech.readout import Readout
from svbatch.speech.recogniser import Recogniser
from svbatch.speech.whisper import load_whisper
from svbatch.tasks.task import bare_task

Precision = Literal["float32", "bfloat16"]
RULE = 1  # of how weights are laid down in the cache; another rule, another folder


@dataclass(frozen=True)
class Model:
    """What annotate needs of a bundle. `voice_activity`, `recogniser` and `readout` are None where the bundle has none.
    `frame_samples`: samples of sound in one frame of the encoder. `voiced`: labels that are read from the voice, by
    task, in their order in `Hearing.voice`. `habits`: what svbatch.habit has asked already."""

    encoder: OnnxSession
    voice_activity: OnnxSession | None
    projector: OnnxSession
    readout: Readout | None
    recogniser: Recogniser | None
    llm: LanguageModel
    tokenizer: Tokenizer
    calibration: dict[str, Calibration]
    frame_samples: int = FRAME_SAMPLES
    voiced: Mapping[str, Sequence[str]] = field(default_factory=dict)
    habits: dict[tuple[str, tuple[str, ...], bool], NDArray[np.float32]] = field(default_factory=dict)


def load_model(bundle: Bundle, device: Device, precision: Precision) -> Model:
    """All parts of a trained bundle, whose fetched files are in the cache. Raises BundleError, DeviceError."""
    manifest = bundle.manifest
    if manifest.projector is None or manifest.adapter is None:
        raise BundleError(f"bundle {bundle.ref} has no projector or adapter; train them with `svbatch train`")
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    graph = bundle.path(manifest.projector.graph)
    trained = load_file(bundle.path(manifest.projector.weights))
    llm = load_language_model(
        llm_folder(bundle, dtype), dtype, adapter_dir=bundle.path(manifest.adapter.weights).parent
    )
    readout = None
    if "token_ids" in trained:
        token_ids = trained["token_ids"].long()
        readout = Readout(token_ids, llm.embed(token_ids).float(), trained["log_scale"].float())
    return Model(
        encoder=load_encoder(bundle, device),
        voice_activity=load_voice_activity(bundle),
        projector=OnnxSession(graph, device=device, weights_dir=graph.parent),
        readout=readout,
        recogniser=load_recogniser(bundle, dtype, device) if manifest.recogniser else None,
        llm=llm,
        tokenizer=load_tokenizer(bundle),
        calibration=dict(manifest.calibration),
        frame_samples=frame_samples(bundle),
        voiced={name: bare_task(name, Path()).label_names for name in manifest.projector.config.get("tone", ())},
    )


def frame_samples(bundle: Bundle) -> int:
    """Samples of sound in one frame of the bundle's encoder."""
    return round(SAMPLE_RATE_HZ / bundle.manifest.encoder.frames_per_second)


def load_tokenizer(bundle: Bundle) -> Tokenizer:
    """The LLM's tokenizer."""
    return Tokenizer.from_file(str(bundle.path(bundle.manifest.llm.tokenizer)))


def load_encoder(bundle: Bundle, device: Device) -> OnnxSession:
    """The encoder's session; its weights are assembled into the cache the first time."""
    part = bundle.manifest.encoder
    graph = bundle.path(part.graph)
    if part.external_data is None:
        return OnnxSession(graph, device=device)
    if part.external_data in bundle.manifest.files:
        return OnnxSession(graph, device=device, weights_dir=bundle.path(part.external_data).parent)
    weights = _whisper_weights(bundle)
    name = part.external_data

    def make(folder: Path) -> None:
        encoder = load_whisper(weights).model.encoder
        state = {f"encoder.{key}": value for key, value in encoder.state_dict().items()}
        assemble_weights(graph, state, folder / name)

    key = f"encoder-{bundle.manifest.files[part.graph].sha256[:16]}-{RULE}"
    return OnnxSession(graph, device=device, weights_dir=derived(bundle.cache, key, make))


def load_voice_activity(bundle: Bundle) -> OnnxSession | None:
    """The detector's session, if the bundle has one. On the CPU: it is small, and where it ran changes no segment."""
    part = bundle.manifest.voice_activity
    return OnnxSession(bundle.path(part.graph)) if part else None


def load_recogniser(bundle: Bundle, dtype: torch.dtype, device: Device) -> Recogniser:
    """The encoder's own frozen decoder."""
    if bundle.manifest.recogniser is None:
        raise BundleError(f"bundle {bundle.ref} has no recogniser; ask `asr: {{via: llm}}`")
    decoder = load_whisper(_whisper_weights(bundle)).model.decoder.to(device)
    return Recogniser(decoder, bundle.path(bundle.manifest.recogniser.tokenizer), dtype=dtype)


def llm_folder(bundle: Bundle, dtype: torch.dtype) -> Path:
    """The LLM's weights, expanded into the cache the first time, one folder per precision."""
    part, precision = bundle.manifest.llm, str(dtype).removeprefix("torch.")
    if part.config is not None:
        config, shards = bundle.path(part.config), [bundle.path(name) for name in part.shards]
        hashes = "".join(bundle.manifest.fetched[name].sha256 for name in part.shards)
        hashes += bundle.manifest.files[part.config].sha256
        key = f"llm-{sha256(hashes.encode()).hexdigest()[:16]}-{precision}-{RULE}"
        folder = derived(bundle.cache, key, lambda folder: lay_out_safetensors(config, shards, folder / "llm", dtype))
        return folder / "llm"
    name = part.weights
    gguf = bundle.path(name)
    key = f"llm-{bundle.manifest.fetched[name].sha256[:16]}-{precision}-{RULE}"
    return derived(bundle.cache, key, lambda folder: expand_gguf(gguf, folder / "llm", dtype)) / "llm"


def choose_device(wanted: Literal["auto", "cpu", "cuda"]) -> Device:
    """The device asked for; "auto" is CUDA where both onnxruntime and torch can use it."""
    if wanted == "auto":
        return "cuda" if torch.cuda.is_available() and cuda_problem() is None else "cpu"
    return wanted


def choose_precision(wanted: Literal["auto", "float32", "bfloat16"], device: Device) -> Precision:
    """The precision asked for; "auto" is bfloat16 where it is multiplied natively (CUDA, AVX512-BF16, AMX)."""
    if wanted == "auto":
        return "bfloat16" if device == "cuda" or has_native_bfloat16() else "float32"
    return wanted


def has_native_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 itself."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return bool({"avx512_bf16", "amx_bf16"} & set(flags.split()))


def _whisper_weights(bundle: Bundle) -> Path:
    if bundle.manifest.recogniser is None:
        raise BundleError(f"bundle {bundle.ref}: its encoder's weights come with a recogniser, and it names none")
    return bundle.path(bundle.manifest.recogniser.weights)
