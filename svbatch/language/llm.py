"""The LLM: its weights from a GGUF file into a folder, from the folder into memory, and its forward pass."""

import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any, cast

import torch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GgufConfig, PreTrainedModel
from transformers.utils import logging

from svbatch.errors import BundleError, TaskError
from svbatch.language.cache import GROUPED_ATTENTION, KeyValueCache, additive_mask
from svbatch.timing import count

MODEL_TYPES = ("llama", "qwen2", "qwen3")
"""Decoders with full attention and a plain linear output layer, as the cache and the scores assume."""

MAX_LOGITS = 16_000_000
"""The output layer makes so many logits at a time: 64 MB in float32."""

ADAPTER_WEIGHTS = "adapter.safetensors"
ADAPTER_CONFIG = "adapter.json"


class LanguageModel:
    """A decoder-only LLM over a `KeyValueCache`; its output layer is run only where asked."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Takes the model over: eval mode, no gradients, attention over our cache.

        Raises BundleError if its architecture is not one of MODEL_TYPES.
        """
        config = model.config
        layer_types = set(getattr(config, "layer_types", None) or ())
        if config.model_type not in MODEL_TYPES or layer_types - {"full_attention"}:
            raise BundleError(
                f"the LLM is a {config.model_type} model, or has sliding windows; "
                f"name one of these with full attention: {', '.join(MODEL_TYPES)}"
            )
        self.model = cast(Any, model)
        self.model.eval().requires_grad_(False)
        self.model.set_attn_implementation(GROUPED_ATTENTION)
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self.width: int = config.hidden_size
        self.vocab_size: int = config.vocab_size
        self.max_positions: int = config.max_position_embeddings
        self._heads_per_group: int = config.num_attention_heads // config.num_key_value_heads
        self._decoder = self.model.get_decoder()
        self._embedding = self.model.get_input_embeddings()
        self._output = self.model.get_output_embeddings()
        layers = self._decoder.layers
        self._layer_operations = 2.0 * sum(p.numel() for p in layers.parameters() if p.dim() == 2)
        heads_width = config.num_attention_heads * layers[0].self_attn.head_dim
        self._attention_operations = 4.0 * config.num_hidden_layers * heads_width

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids of any shape -> their embeddings, (..., E) in the model's dtype."""
        embeddings: Tensor = self._embedding(ids.to(self.device))
        return embeddings

    def read(self, embeddings: Tensor) -> KeyValueCache:
        """The cache after reading (B, L, E) from position 0 on.

        Rows may be padded on the right: no position sees a later one, so padding changes nothing before it.
        Raises TaskError past the LLM's context.
        """
        self._check_context(embeddings.shape[1])
        rows, length = embeddings.shape[:2]
        count(rows * length * (self._layer_operations + self._attention_operations * (length + 1) / 2))
        cache: Any = DynamicCache()
        self._decoder(inputs_embeds=embeddings, cache=cache, use_cache=True)
        return KeyValueCache((layer.keys, layer.values) for layer in cache.layers)

    def extend(
        self, cache: KeyValueCache, lengths: Tensor, embeddings: Tensor, *, depths: Tensor, visible: Tensor
    ) -> Tensor:
        """Hidden states (B, N, E) of N tokens that follow each row's first `lengths[b]` positions.

        lengths: (B,) int64. embeddings: (B, N, E). depths: (N,) int64, a token's position counted from the
        row's length (tokens on different branches share positions). visible: (N, N) bool, which of the new
        tokens each of them sees, itself included. Their keys go to the cache. Raises TaskError past the LLM's
        context.
        """
        num_tokens = embeddings.shape[1]
        self._check_context(int(lengths.max()) + int(depths.max()) + 1)
        seen = float(lengths.sum()) + len(lengths) * float(visible.sum()) / num_tokens
        count(num_tokens * (len(lengths) * self._layer_operations + self._attention_operations * seen))
        cache.aim(lengths, num_tokens)
        mask = additive_mask(lengths, visible, self.dtype).repeat(1, 1, self._heads_per_group, 1)
        hidden: Tensor = self._decoder(
            inputs_embeds=embeddings,
            position_ids=lengths[:, None] + depths,
            attention_mask=mask,
            cache=cache,
            use_cache=True,
        ).last_hidden_state
        return hidden

    def normaliser(self, hidden: Tensor) -> Tensor:
        """log(sum(exp(logits))) over the vocabulary, (..., E) -> (...) float32."""
        flat = [logits.logsumexp(-1) for logits in self._logits(hidden.flatten(0, -2))]
        return torch.cat(flat).view(hidden.shape[:-1])

    def choose(self, hidden: Tensor, allowed: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The likeliest next token and its log-probability, (P, E) -> (P,) int64, (P,) float32.

        `allowed` (P, vocabulary) bool: the tokens to choose from; the probability is that among all.
        """
        best = []
        first = 0
        for logits in self._logits(hidden):
            normalisers = logits.logsumexp(-1)
            if allowed is not None:
                logits = logits.masked_fill(~allowed[first : first + len(logits)].to(logits.device), -torch.inf)
                first += len(logits)
            best.append((*logits.max(-1), normalisers))
        values, tokens, normalisers = (torch.cat(parts) for parts in zip(*best, strict=True))
        return tokens, values - normalisers

    def candidates(self, hidden: Tensor, *, count: int, always: int) -> tuple[Tensor, Tensor]:
        """The `count` likeliest next tokens and `always`, with log-probabilities, (P, E) -> (P, count + 1) each, int64
        and float32, the likeliest first; `always` comes last and may stand twice."""
        found = []
        for logits in self._logits(hidden):
            values, tokens = logits.topk(count)
            fixed = torch.full_like(tokens[:, :1], always)
            values = torch.cat([values, logits[:, always, None]], dim=1) - logits.logsumexp(-1, keepdim=True)
            found.append((torch.cat([tokens, fixed], dim=1), values))
        all_tokens, all_values = zip(*found, strict=True)
        return torch.cat(all_tokens), torch.cat(all_values)

    def token_logits(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits of one token per position, (..., E), (...) ids -> (...) float32.

        Multiplied out in float32 whatever the weights are: bfloat16 would round labels into ties.
        """
        weights: Tensor = self._output.weight[ids]
        return (hidden.float() * weights.float()).sum(-1)

    def _logits(self, hidden: Tensor) -> Iterator[Tensor]:
        """The output layer over P positions, (P, E) -> (P, vocabulary) float32 in parts of MAX_LOGITS."""
        count(2.0 * len(hidden) * self.width * self.vocab_size)
        for some in torch.split(hidden, max(1, MAX_LOGITS // self.vocab_size)):
            yield self._output(some).float()

    def _check_context(self, num_positions: int) -> None:
        if num_positions > self.max_positions:
            raise TaskError(
                f"a prompt with its answer takes {num_positions} positions and the LLM holds "
                f"{self.max_positions}; shorten the instruction or its labels"
            )


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


def _rename_unless_there(partial_dir: Path, target_dir: Path) -> None:
    partial_dir.chmod(0o755)
    try:
        os.rename(partial_dir, target_dir)
    except OSError:
        if not target_dir.exists():
            raise  # else another process was faster, and wrote the same


def load_base_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The transformers model of a folder as `expand_gguf` writes it, on the CPU; training begins with it."""
    with _no_progress_bars():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)


def load_language_model(folder: Path, dtype: torch.dtype, *, adapter_dir: Path | None = None) -> LanguageModel:
    """The LLM of a folder as `expand_gguf` writes it, a LoRA adapter merged into its weights if one is given.

    adapter_dir: a folder as `write_adapter` writes it. Raises BundleError if the adapter is another LLM's, or
    the LLM is not one of MODEL_TYPES.
    """
    model = load_base_model(folder, dtype)
    return LanguageModel(model if adapter_dir is None else _merged(model, adapter_dir))


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


def _merged(model: PreTrainedModel, adapter_dir: Path) -> PreTrainedModel:
    """The model with the folder's adapter added to its weights."""
    config = LoraConfig(**json.loads((adapter_dir / ADAPTER_CONFIG).read_text(encoding="utf-8")))
    with_adapter: Any = add_adapter(model, config)
    weights = {name: weight.float() for name, weight in load_file(adapter_dir / ADAPTER_WEIGHTS).items()}
    expected = get_peft_model_state_dict(with_adapter).keys()
    if strangers := sorted(weights.keys() ^ expected):
        raise BundleError(
            f"{adapter_dir / ADAPTER_WEIGHTS}: {len(strangers)} tensors are missing or fit nothing in "
            f"the LLM (first: {strangers[0]}); take the adapter that was trained with this LLM"
        )
    set_peft_model_state_dict(with_adapter, weights)
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
