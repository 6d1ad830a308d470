"""Decoder-only LLMs: prefix, instruction and answer are one sequence, so every question goes on from one cache."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, PreTrainedModel

from svbatch.errors import BundleError
from svbatch.language.attention import GROUPED_ATTENTION, additive_mask
from svbatch.language.cache import KeyValueCache
from svbatch.language.llm import Asked, LanguageModel, bytes_between_layers
from svbatch.language.new_tokens import NewTokens
from svbatch.timing import count

SCALED = ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale", "attention_sinks")
"""What a config says of attention or an output layer that are more than the cache and the scores assume."""

POSITIONS_AT_ONCE = 4096
"""So many positions are read in one pass: more are no faster, because what lies between the layers outgrows the
processor's cache, and take more memory."""


@dataclass(frozen=True)
class ReadPrefix:
    """Keys and values of B segments' prefixes. `lengths`: (B,) int64, the positions of each row that count."""

    cache: KeyValueCache
    lengths: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.lengths)

    def select(self, rows: Tensor) -> "ReadPrefix":
        return ReadPrefix(self.cache.select(rows), self.lengths[rows])


def _unlike(model: PreTrainedModel) -> str:
    """What of the model is not covered here, in words; empty if all is."""
    llm: Any = model  # transformers types its models in part
    config = llm.config
    found = sorted(set(getattr(config, "layer_types", None) or ()) - {"full_attention"})
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        found.append("sliding_window")
    found += [name for name in SCALED if getattr(config, name, None) not in (None, 1.0, False)]
    if getattr(llm.get_output_embeddings(), "bias", None) is not None:
        found.append("a bias on its output layer")
    layers = getattr(llm.get_decoder(), "layers", None)
    if layers is None or not hasattr(layers[0], "self_attn") or not hasattr(layers[0].self_attn, "head_dim"):
        found.append("layers of another kind")
    return ", ".join(found)


class DecoderOnly(LanguageModel):
    """A decoder-only LLM over a `KeyValueCache`."""

    shares_questions = True

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises BundleError unless every layer has full attention and the output layer is plain, as in Llama, Qwen or
        SmolLM."""
        config = model.config
        if odd := _unlike(model):
            raise BundleError(
                f"the LLM is a {config.model_type} model with {odd}; name one with full attention and a plain output "
                "layer, such as Llama, Qwen2, Qwen3 or SmolLM"
            )
        super().__init__(model, width=config.hidden_size, max_positions=config.max_position_embeddings)
        self.model.set_attn_implementation(GROUPED_ATTENTION)
        self._decoder = self.model.get_decoder()
        layers = self._decoder.layers
        self._layer_operations = 2.0 * sum(p.numel() for p in layers.parameters() if p.dim() == 2)
        head_dim = layers[0].self_attn.head_dim
        self.bytes_per_slot = 2 * len(layers) * config.num_key_value_heads * head_dim * self.dtype.itemsize
        self.bytes_per_position = bytes_between_layers(config.hidden_size, config.intermediate_size, self.dtype)
        heads_width = config.num_attention_heads * head_dim
        self._attention_operations = 4.0 * config.num_hidden_layers * heads_width

    @torch.inference_mode()
    def read(self, inputs: Sequence[Tensor], *, room: int = 0) -> ReadPrefix:
        """A few rows at a time, POSITIONS_AT_ONCE."""
        lengths = [len(row) for row in inputs]
        rows = max(1, POSITIONS_AT_ONCE // max(lengths))
        caches = [self._read(inputs[start : start + rows]) for start in range(0, len(inputs), rows)]
        cache = KeyValueCache.stacked(caches, max(lengths) + room)
        return ReadPrefix(cache, torch.tensor(lengths, device=self.device))

    def _read(self, inputs: Sequence[Tensor]) -> KeyValueCache:
        """Inputs are padded on the right to the longest: no position sees a later one, so padding changes nothing."""
        padded = pad_sequence([rows.to(self.device, self.dtype) for rows in inputs], batch_first=True)
        rows, length = padded.shape[:2]
        self._check_context(length)
        operations = self._layer_operations + self._attention_operations * (length + 1) / 2
        count(rows * length * operations, self.precision)
        cache: Any = DynamicCache()
        self._decoder(inputs_embeds=padded, cache=cache, use_cache=True)
        return KeyValueCache((layer.keys, layer.values) for layer in cache.layers)

    @torch.inference_mode()
    def read_on(self, prefix: ReadPrefix, ids: Sequence[Sequence[int]]) -> ReadPrefix:
        tokens = torch.tensor([token for row in ids for token in row])
        counts = [len(row) for row in ids]
        self.extend(prefix.cache, prefix.lengths, self.embed(tokens), NewTokens.lines(counts, self.device))
        return ReadPrefix(prefix.cache, prefix.lengths + torch.tensor(counts, device=self.device))

    def ask(self, prefix: ReadPrefix, instruction_ids: Sequence[int]) -> Asked:
        return Asked(prefix.cache, prefix.lengths, list(instruction_ids))

    def extend(self, cache: KeyValueCache, lengths: Tensor, embeddings: Tensor, new: NewTokens) -> Tensor:
        positions = new.in_line(lengths[:, None] + new.depths)
        self._check_context(int(positions.max()) + 1)
        seen = new.num_seen(lengths)
        count(len(embeddings) * self._layer_operations + self._attention_operations * seen, self.precision)
        cache.aim(lengths, new)
        hidden: Tensor = self._decoder(
            inputs_embeds=embeddings[None],
            position_ids=positions[None],
            attention_mask=additive_mask(lengths, new, cache.capacity, self.dtype),
            cache=cache,
            use_cache=True,
            new=new,
        ).last_hidden_state
        return hidden[0]
