"""Decoder-only LLMs: prefix, instruction and answer are one sequence, so every question goes on from one cache."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svbatch.errors import BundleError
from svbatch.language.attention import GROUPED_ATTENTION, additive_mask
from svbatch.language.cache import KeyValueCache, slots_for
from svbatch.language.llm import Asked, LanguageModel, bytes_between_layers
from svbatch.language.new_tokens import NewTokens
from svbatch.language.packed_decoder import pack_decoder
from svbatch.timing import count

SCALED = ("final_logit_softcapping", "attn_logit_softcapping", "logits_scaling", "logit_scale", "attention_sinks")
"""What a config says of attention or an output layer that are more than the cache and the scores assume."""

POSITIONS_AT_ONCE = 2048
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
        self._head_width: int = layers[0].self_attn.head_dim
        self._key_value_heads: int = config.num_key_value_heads
        self.bytes_per_slot = 2 * len(layers) * self._key_value_heads * self._head_width * self.dtype.itemsize
        self.bytes_per_position = bytes_between_layers(config.hidden_size, config.intermediate_size, self.dtype)
        self._attention_operations = 4.0 * len(layers) * config.num_attention_heads * self._head_width
        pack_decoder(self._decoder)

    @torch.inference_mode()
    def read(self, inputs: Sequence[Tensor], *, room: int = 0) -> ReadPrefix:
        """A few rows at a time, POSITIONS_AT_ONCE."""
        lengths = [len(row) for row in inputs]
        self._check_context(max(lengths))
        size = (len(inputs), self._key_value_heads, slots_for(max(lengths) + room), self._head_width)
        nothing = torch.zeros(size, dtype=self.dtype, device=self.device)
        cache = KeyValueCache((nothing.clone(), nothing.clone()) for _ in self._decoder.layers)
        for rows in _cut(lengths):
            embeddings = torch.cat([row.to(self.device, self.dtype) for row in inputs[rows]])
            new = NewTokens.lines(lengths[rows], self.device)
            nobody = torch.zeros(new.num_rows, dtype=torch.int64, device=self.device)
            self._pass(cache.part(rows), nobody, embeddings, new, is_first=True)
        return ReadPrefix(cache, torch.tensor(lengths, device=self.device))

    @torch.inference_mode()
    def read_on(self, prefix: ReadPrefix, ids: Sequence[Sequence[int]]) -> ReadPrefix:
        tokens = torch.tensor([token for row in ids for token in row])
        counts = [len(row) for row in ids]
        self.extend(prefix.cache, prefix.lengths, self.embed(tokens), NewTokens.lines(counts, self.device))
        return ReadPrefix(prefix.cache, prefix.lengths + torch.tensor(counts, device=self.device))

    def ask(self, prefix: ReadPrefix, instruction_ids: Sequence[int]) -> Asked:
        return Asked(prefix.cache, prefix.lengths, list(instruction_ids))

    def extend(self, cache: KeyValueCache, lengths: Tensor, embeddings: Tensor, new: NewTokens) -> Tensor:
        self._check_context(int((lengths[:, None] + new.depths).max()) + 1)
        return self._pass(cache, lengths, embeddings, new, is_first=False)

    def _pass(
        self, cache: KeyValueCache, lengths: Tensor, embeddings: Tensor, new: NewTokens, *, is_first: bool
    ) -> Tensor:
        """As `extend`. `is_first`: all rows are empty, and each token sees those before it."""
        operations = len(embeddings) * self._layer_operations + self._attention_operations * new.num_seen(lengths)
        count(operations, self.precision)
        cache.aim(lengths, new)
        hidden: Tensor = self._decoder(
            inputs_embeds=embeddings[None],
            position_ids=new.in_line(lengths[:, None] + new.depths)[None],
            attention_mask=None if is_first else additive_mask(lengths, new, cache.num_seen, self.dtype),
            cache=cache,
            use_cache=True,
            new=new,
            before=cache.before,
        ).last_hidden_state
        return hidden[0]


def _cut(lengths: Sequence[int]) -> Iterator[slice]:
    """Rows in order, as many at a time as have POSITIONS_AT_ONCE, at least one."""
    start = total = 0
    for row, length in enumerate(lengths):
        if total and total + length > POSITIONS_AT_ONCE:
            yield slice(start, row)
            start, total = row, 0
        total += length
    yield slice(start, len(lengths))
