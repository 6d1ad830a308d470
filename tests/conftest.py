"""One tiny real model, made from a seed: the same formats, exports and code as a shipped bundle, in seconds.

Its Whisper, LLM and projector are random, so its answers mean nothing; that they are the same alone and in a batch,
typed, timed and committed is what tests can ask of it.
"""

import json
import os
import struct
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from copy import deepcopy
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # several processes of two threads each would wait for one another
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import gguf
import numpy as np
import onnx
import pytest
import soundfile
import torch
from numpy.typing import NDArray
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import WhisperConfig, WhisperForConditionalGeneration

from svbatch.bundle import Bundle, Calibration, describe_file, find_bundle, write_bundle
from svbatch.fetch import fetch
from svbatch.model import Model, load_model
from svbatch.speech.export import EXTERNAL_DATA, export_encoder
from svbatch.speech.whisper import LAYERS
from svbatch.training.data import Example
from svbatch.training.publish import publish
from svbatch.training.recipe import AdapterShape, ProjectorShape, Recipe, load_recipe
from svbatch.training.stages import Trained, build

WIDTH = 64
CONTEXT = 2048
DATA_VARIABLE = "SVBATCH_TEST_DATA"
LETTERS = "abcdefghijklmnopqrstuvwxyz"
CONTROL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
WHISPER_TOKENS = ["<|endoftext|>", "<|startoftranscript|>", "<|nospeech|>", "<|notimestamps|>"]
RECIPE = Path(__file__).parents[1] / "jobs" / "train" / "mini.yaml"


@pytest.fixture(scope="session")
def mini() -> Model:
    """The shipped bundle in float32; its frozen weights are fetched into the user's cache. For slow tests."""
    bundle = find_bundle("mini")
    fetch(bundle)
    return load_model(bundle, "cpu", "float32")


@pytest.fixture(scope="session")
def held_out_data() -> Path:
    """A folder of real recordings with dev.jsonl, none of them trained on. For slow tests."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        pytest.skip(f"{DATA_VARIABLE} is not set: it names a folder with dev.jsonl and its recordings")
    return Path(folder)


@pytest.fixture(scope="session")
def tiny_whisper() -> WhisperForConditionalGeneration:
    """English-only, two layers, width 64; transcripts of at most 24 tokens."""
    torch.manual_seed(0)
    config = WhisperConfig(
        vocab_size=whisper_tokenizer().get_vocab_size(),
        d_model=WIDTH,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=1,
        decoder_attention_heads=1,
        encoder_ffn_dim=2 * WIDTH,
        decoder_ffn_dim=2 * WIDTH,
        max_target_positions=48,
        init_std=0.2,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        decoder_start_token_id=0,
    )
    return WhisperForConditionalGeneration(config).eval().requires_grad_(False)


@pytest.fixture(scope="session")
def write_ctranslate2() -> Callable[[WhisperForConditionalGeneration, Path], None]:
    """Writes a Whisper as the file in which CTranslate2 publishes it (see svbatch.speech.whisper)."""
    return _write_ctranslate2


def _write_ctranslate2(model: WhisperForConditionalGeneration, target: Path) -> None:
    state = model.state_dict()
    variables: dict[str, torch.Tensor] = {"decoder/embeddings/weight": state["model.decoder.embed_tokens.weight"]}
    for side, modules in LAYERS.items():
        stem = f"model.{side}"
        variables[f"{side}/position_encodings/encodings"] = state[f"{stem}.embed_positions.weight"]
        variables[f"{side}/layer_norm/gamma"] = state[f"{stem}.layer_norm.weight"]
        variables[f"{side}/layer_norm/beta"] = state[f"{stem}.layer_norm.bias"]
        for layer in range(2):
            for name, parts in modules.items():
                weights = [state[f"{stem}.layers.{layer}.{part}.weight"] for part in parts]
                zeros = torch.zeros(len(weights[0]))  # Whisper's keys have no bias
                biases = [state.get(f"{stem}.layers.{layer}.{part}.bias", zeros) for part in parts]
                suffixes = ("gamma", "beta") if name.endswith("layer_norm") else ("weight", "bias")
                variables[f"{side}/layer_{layer}/{name}/{suffixes[0]}"] = torch.cat(weights)
                variables[f"{side}/layer_{layer}/{name}/{suffixes[1]}"] = torch.cat(biases)
    for conv in ("conv1", "conv2"):
        for kind in ("weight", "bias"):
            variables[f"encoder/{conv}/{kind}"] = state[f"model.encoder.{conv}.{kind}"]
    content = struct.pack("<I", 6) + _text("WhisperSpec") + struct.pack("<II", 3, len(variables))
    for name, tensor in variables.items():
        values = tensor.numpy().astype("<f4").tobytes()
        content += _text(name) + struct.pack(f"<B{tensor.ndim}I", tensor.ndim, *tensor.shape)
        content += struct.pack("<BI", 0, len(values)) + values
    target.write_bytes(content + struct.pack("<I", 0))


def _text(text: str) -> bytes:
    return struct.pack("<H", len(text) + 1) + text.encode() + b"\0"


def whisper_tokenizer() -> Tokenizer:
    """Letters, with and without a space before, and the special tokens of an English Whisper, in its order."""
    merges = [("Ġ", letter) for letter in [*LETTERS, "-", "'", "â"]]
    plain = [*LETTERS, "-", "'", "â", "Ļ", "Ġ", *("".join(merge) for merge in merges)]
    return _byte_level(plain, merges, WHISPER_TOKENS)


def llm_tokenizer() -> Tokenizer:
    """All bytes, some common pairs and the control tokens of SmolLM2, which come first."""
    merges = [("Ġ", letter) for letter in LETTERS] + [("t", "h"), ("th", "e"), ("i", "n"), ("e", "r"), ("a", "n")]
    plain = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    return _byte_level([*CONTROL_TOKENS, *plain], merges, CONTROL_TOKENS)


def _byte_level(tokens: Sequence[str], merges: list[tuple[str, str]], special: Sequence[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in special])
    return tokenizer


def _write_llama(target: Path) -> None:
    """A Llama of two layers and its tokenizer as GGUF, quantised to 8 bits."""
    tokenizer = json.loads(llm_tokenizer().to_str())["model"]
    random = np.random.default_rng(0)
    writer = gguf.GGUFWriter(target, "llama")
    writer.add_block_count(2)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(2 * WIDTH)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_rope_freq_base(10_000.0)
    writer.add_rope_dimension_count(WIDTH // 4)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokenizer["vocab"]))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(list(tokenizer["vocab"]))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(tokenizer["vocab"]))
    writer.add_token_merges([" ".join(merge) for merge in tokenizer["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)

    def add(name: str, *shape: int) -> None:
        if name.endswith("norm"):
            writer.add_tensor(f"{name}.weight", np.ones(shape, np.float32))
        else:
            values = random.normal(0.0, 0.2, shape).astype(np.float32)
            q8_0 = gguf.GGMLQuantizationType.Q8_0
            writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values, q8_0), raw_dtype=q8_0)

    add("token_embd", len(tokenizer["vocab"]), WIDTH)
    add("output_norm", WIDTH)
    for block in ("blk.0", "blk.1"):
        for name, *shape in (
            ("attn_norm", WIDTH),
            ("attn_q", WIDTH, WIDTH),
            ("attn_k", WIDTH // 2, WIDTH),
            ("attn_v", WIDTH // 2, WIDTH),
            ("attn_output", WIDTH, WIDTH),
            ("ffn_norm", WIDTH),
            ("ffn_gate", 2 * WIDTH, WIDTH),
            ("ffn_up", 2 * WIDTH, WIDTH),
            ("ffn_down", WIDTH, 2 * WIDTH),
        ):
            add(f"{block}.{name}", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@contextmanager
def _exporting() -> Iterator[None]:
    """torch's exporter and peft warn of their own insides, which is no fault of ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@pytest.fixture(scope="session")
def exporting() -> Callable[[], AbstractContextManager[None]]:
    return _exporting


@pytest.fixture(scope="session")
def tiny_base(tiny_whisper, tmp_path_factory) -> Bundle:
    """A bundle of frozen parts: nothing trained yet, the weights of others fetched into a cache of its own."""
    origin, folder = tmp_path_factory.mktemp("origin"), tmp_path_factory.mktemp("base")
    _write_ctranslate2(tiny_whisper, origin / "whisper.bin")
    whisper_tokenizer().save(str(origin / "whisper-tokenizer.json"))
    _write_llama(origin / "llm.gguf")
    with _exporting():
        export_encoder(deepcopy(tiny_whisper.model.encoder), folder / "encoder.onnx")
    llm_tokenizer().save(str(folder / "tokenizer.json"))
    fetched = {
        path.name: {**describe_file(path, "CC0-1.0").model_dump(), "from": [f"file:{path}"]}
        for path in origin.iterdir()
    }
    fields = {
        "name": "tiny",
        "version": "1",
        "description": "random weights for tests",
        "encoder": {
            "graph": "encoder.onnx",
            "width": WIDTH,
            "frames_per_second": 50,
            "window_seconds": 30,
            "external_data": EXTERNAL_DATA,
        },
        "recogniser": {"weights": "whisper.bin", "tokenizer": "whisper-tokenizer.json"},
        "projector": None,
        "readout": {},
        "llm": {"weights": "llm.gguf", "tokenizer": "tokenizer.json"},
        "adapter": None,
        "calibration": {},
        "fetched": fetched,
        "recipe": {},
        "data": [],
        "figures": {},
        "not_for": "anything but tests",
    }
    write_bundle(folder, fields, dict.fromkeys(("encoder.onnx", "tokenizer.json"), "CC0-1.0"))
    bundle = find_bundle(str(folder), cache=tmp_path_factory.mktemp("cache"))
    fetch(bundle)
    return bundle


@pytest.fixture(scope="session")
def tiny_recipe() -> Recipe:
    return load_recipe(RECIPE).model_copy(
        update={
            "name": "tiny",
            "projector": ProjectorShape(width=32, num_layers=1, num_heads=2, dropout=0.0, tone=["emotion", "gender"]),
            "readout_tokens": 60,
            "adapter": AdapterShape(rank=2, alpha=4, targets=["q_proj", "down_proj"]),
        }
    )


@pytest.fixture(scope="session")
def tiny_parts(tiny_base, tiny_recipe) -> Trained:
    """Random projector, read-out and LoRA adapter over the tiny base's LLM."""
    with _exporting():
        parts = build(tiny_recipe, tiny_base, [Example(Path("said.wav"), text="the rain in the train", lang="en")])
    generator = torch.Generator().manual_seed(1)
    for name, weight in parts.llm.named_parameters():
        if "lora_B" in name:
            weight.data = torch.randn(weight.shape, generator=generator) * 0.1
    return parts


@pytest.fixture(scope="session")
def tiny_bundle(tiny_base, tiny_parts, tiny_recipe, tmp_path_factory) -> Bundle:
    """The whole of it, published as training publishes it."""
    folder = tmp_path_factory.mktemp("bundle")
    facts = {"description": "random weights for tests", "data": [], "figures": {}, "not_for": "anything but tests"}
    with _exporting():
        calibration = {"speech_activity": Calibration(temperature=2.0)}
        publish(tiny_parts, tiny_recipe, tiny_base, folder, calibration=calibration, facts=facts)
    return find_bundle(str(folder), cache=tiny_base.cache)


@pytest.fixture(scope="session")
def tiny_model(tiny_bundle) -> Model:
    """The tiny bundle in memory, on the CPU in float32."""
    return load_model(tiny_bundle, "cpu", "float32")


@pytest.fixture(scope="session")
def detector_graph(tmp_path_factory) -> Callable[..., Path]:
    """detector_graph(bias=-50): a graph with the inputs and outputs of silero-vad's, and random weights; `bias` is
    added to its log-odds of speech."""

    def make(bias: float = 0.0) -> Path:
        path = tmp_path_factory.mktemp("detector") / "detector.onnx"
        _write_detector(path, bias)
        return path

    return make


def _write_detector(path: Path, bias: float) -> None:
    random = np.random.default_rng(0)
    shapes = {"mix": (576, 16), "w": (1, 512, 16), "r": (1, 512, 128), "out": (128, 1)}
    weights = {name: random.normal(0, 0.3, shape).astype(np.float32) for name, shape in shapes.items()}
    weights |= {"out": 10 * weights["out"], "bias": np.array([bias], np.float32)}
    weights |= {"one": np.array([1]), "flat": np.array([-1]), "rows": np.array([-1, 128])}
    steps = [
        ("MatMul", ["input", "mix"], ["mixed"], {}),
        ("Tanh", ["mixed"], ["bounded"], {}),
        ("Unsqueeze", ["bounded", "one"], ["sequence"], {}),
        ("LSTM", ["sequence", "w", "r", "", "", "h", "c"], ["states", "hn", "cn"], {"hidden_size": 128}),
        ("Reshape", ["states", "rows"], ["remembered"], {}),
        ("MatMul", ["remembered", "out"], ["scores"], {}),
        ("Add", ["scores", "bias"], ["log_odds"], {}),
        ("Reshape", ["log_odds", "flat"], ["listed"], {}),
        ("Sigmoid", ["listed"], ["speech_probs"], {}),
    ]

    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, shape)

    graph = onnx.helper.make_graph(
        [onnx.helper.make_node(kind, inputs, outputs, **settings) for kind, inputs, outputs, settings in steps],
        "detector",
        [value("input", "N", 576), value("h", 1, 1, 128), value("c", 1, 1, 128)],
        [value("speech_probs", "N"), value("hn", 1, 1, 128), value("cn", 1, 1, 128)],
        [onnx.numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 16)], ir_version=8), path)


@pytest.fixture(scope="session")
def bursts() -> Callable[..., NDArray[np.float32]]:
    """bursts(1.5, 1.0, seed=3): by turns sound and silence, 1.5 s and 1.0 s, at 16 kHz; sound comes first."""

    def make(*seconds: float, seed: int = 0) -> NDArray[np.float32]:
        random = np.random.default_rng(seed)
        pieces = []
        for number, length in enumerate(seconds):
            times = np.arange(round(length * 16_000)) / 16_000
            level = 0.0 if number % 2 else 0.3
            tone = np.sin(2 * np.pi * random.uniform(150, 900) * times) * (0.6 + 0.4 * np.sin(2 * np.pi * 4 * times))
            pieces.append(level * tone)
        return np.concatenate(pieces).astype(np.float32)

    return make


@pytest.fixture(scope="session")
def corpus_dir(bursts, tmp_path_factory) -> Path:
    """Four recordings that can be read, one of them silent, one with two segments at 8 kHz in stereo."""
    folder = tmp_path_factory.mktemp("recordings")
    soundfile.write(folder / "long.wav", bursts(12.0, 0.5, 6.0, seed=1), 16_000)
    soundfile.write(folder / "short.flac", bursts(1.5, seed=2), 16_000)
    soundfile.write(folder / "silent.wav", np.zeros(48_000, np.float32), 16_000)
    twice = bursts(2.0, 4.0, 2.0, seed=3)[::2]
    soundfile.write(folder / "twice.wav", np.stack([twice, twice], axis=1), 8_000)
    return folder
