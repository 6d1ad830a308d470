"""The LLM's weights: from a GGUF file into a folder, from there into memory, with an adapter merged or to train."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
)
from transformers.utils import logging

from svbatch.errors import BundleError
from svbatch.language.decoder_only import DecoderOnly
from svbatch.language.encoder_decoder import EncoderDecoder
from svbatch.language.llm import LanguageModel

ADAPTER_WEIGHTS = "adapter.safetensors"
ADAPTER_CONFIG = "adapter.json"


def expand_gguf(gguf: Path, target_dir: Path, dtype: torch.dtype) -> None:
    """Writes a GGUF file's weights, config and tokenizer as the folder `target_dir`, unless it is there.

    The folder appears whole or not at all: it is written beside its place and renamed. Weights are of
    `dtype`, and a tied output layer is stored once.
    """
    if target_dir.exists():
        return
    target_dir.parent.mkdir(parents=True, exist_ok=True)
    partial_dir = Path(tempfile.mkdtemp(dir=target_dir.parent, prefix=f".{target_dir.name}."))
    try:
        with _no_progress_bars(), redirect_stderr(StringIO()):  # its conversion draws a bar in any case
            model = AutoModelForCausalLM.from_pretrained(
                gguf.parent, gguf_file=gguf.name, dtype=dtype, quantization_config=GgufConfig(dequantize=True)
            )
            tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        weights = {name: weight.contiguous() for name, weight in model.state_dict().items()}
        if model.config.tie_word_embeddings:
            del weights["lm_head.weight"]
        save_file(weights, partial_dir / "model.safetensors", metadata={"format": "pt"})
        model.config.save_pretrained(partial_dir)
        tokenizer.save_pretrained(partial_dir)
        _rename_unless_there(partial_dir, target_dir)
    finally:
        shutil.rmtree(partial_dir, ignore_errors=True)


def lay_out_safetensors(config: Path, shards: Sequence[Path], target_dir: Path, dtype: torch.dtype) -> None:
    """Writes a model in transformers' format as the new folder `target_dir`, numbers in `dtype`, a file at a time."""
    target_dir.mkdir()
    shutil.copyfile(config, target_dir / "config.json")
    places: dict[str, str] = {}
    num_bytes = 0
    for number, shard in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        weights = {key: w.to(dtype) if w.is_floating_point() else w for key, w in load_file(shard).items()}
        save_file(weights, target_dir / name, metadata={"format": "pt"})
        places |= dict.fromkeys(weights, name)
        num_bytes += sum(weight.nbytes for weight in weights.values())
    index = {"metadata": {"total_size": num_bytes}, "weight_map": places}
    (target_dir / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def _rename_unless_there(partial_dir: Path, target_dir: Path) -> None:
    partial_dir.chmod(0o755)
    try:
        os.rename(partial_dir, target_dir)
    except OSError:
        if not target_dir.exists():
            raise  # else another process was faster, and wrote the same


def load_base_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a folder as `expand_gguf` writes it, on the CPU; training begins with it."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    with _no_progress_bars():
        return kind.from_pretrained(folder, dtype=dtype, local_files_only=True)


def load_language_model(folder: Path, dtype: torch.dtype, *, adapter_dir: Path | None = None) -> LanguageModel:
    """The LLM of a folder as `expand_gguf` writes it, a LoRA adapter merged into its weights if one is given.

    adapter_dir: a folder as `write_adapter` writes it. Raises BundleError if the adapter is another LLM's, or
    the LLM is of a kind that is not known here.
    """
    model = load_base_model(folder, dtype)
    whole = model if adapter_dir is None else _merged(model, adapter_dir)
    return EncoderDecoder(whole) if model.config.is_encoder_decoder else DecoderOnly(whole)


def add_adapter(model: PreTrainedModel, config: LoraConfig) -> PeftModel:
    """The model with LoRA layers as `config` has them, to be trained or filled."""
    with warnings.catch_warnings():
        # peft 0.21 reads an attribute that transformers 5.23 calls deprecated.
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`", category=FutureWarning)
        with_adapter: PeftModel = get_peft_model(model, config)
    return with_adapter


def write_adapter(model: PeftModel, folder: Path) -> None:
    """Writes a trained LoRA adapter as float16 weights and peft's LoraConfig, for `load_language_model`."""
    weights = {name: weight.half().contiguous() for name, weight in get_peft_model_state_dict(model).items()}
    save_file(weights, folder / ADAPTER_WEIGHTS)
    config = model.peft_config["default"].to_dict() | {"base_model_name_or_path": None}  # a path of this machine
    plain = {name: sorted(value) if isinstance(value, set) else value for name, value in config.items()}
    (folder / ADAPTER_CONFIG).write_text(json.dumps(plain, indent=2, default=str) + "\n", encoding="utf-8")


def fill_adapter(model: PeftModel, folder: Path) -> None:
    """Gives the model's LoRA layers what `write_adapter` wrote. Raises BundleError where it does not fit."""
    weights = {name: weight.float() for name, weight in load_file(folder / ADAPTER_WEIGHTS).items()}
    expected = {name: weight.shape for name, weight in get_peft_model_state_dict(model).items()}
    found = {name: weight.shape for name, weight in weights.items()}
    if strangers := sorted({name for name, _ in expected.items() ^ found.items()}):
        raise BundleError(
            f"{folder / ADAPTER_WEIGHTS}: {len(strangers)} tensors are missing or fit nothing in "
            f"the LLM (first: {strangers[0]}); take the adapter that was trained with this LLM"
        )
    set_peft_model_state_dict(model, weights)


def _merged(model: PreTrainedModel, adapter_dir: Path) -> PreTrainedModel:
    """The model with the folder's adapter added to its weights."""
    config = LoraConfig(**json.loads((adapter_dir / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    with_adapter: Any = add_adapter(model, config)
    fill_adapter(with_adapter, adapter_dir)
    merged: PreTrainedModel = with_adapter.merge_and_unload()
    return merged


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    """Transformers draws its own bars for a second's work; svbatch has one for the run."""
    progress: Any = logging
    were_on = progress.is_progress_bar_enabled()
    progress.disable_progress_bar()
    try:
        yield
    finally:
        if were_on:
            progress.enable_progress_bar()
