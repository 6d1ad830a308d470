"""Encoder-decoder LLMs of the T5 family: what was heard and the instruction are encoded together, answers are decoded.

Every position of the encoder sees every other one, so what is shared by the questions about a segment is its sound and
its transcript as embeddings, and no more: each instruction is encoded with all of them anew. What follows is shared:
labels are scored in one pass over a tree, drafts are checked, as with decoder-only LLMs.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from svbatch.errors import BundleError
from svbatch.language.attention import additive_mask, attention_of_new
from svbatch.language.cache import KeyValueCache, moved_up
from svbatch.language.llm import Asked, LanguageModel, bytes_between_layers
from svbatch.language.new_tokens import NewTokens
from svbatch.timing import count

MAX_POSITIONS = 2048
"""Positions are relative and have no end of their own; attention over more would not fit into memory."""


@dataclass(frozen=True)
class Inputs:
    """What the encoder will read of B segments before each instruction, (L_i, E) each."""

    rows: list[Tensor]

    @property
    def batch_size(self) -> int:
        return len(self.rows)

    def select(self, rows: Tensor) -> "Inputs":
        return Inputs([self.rows[row] for row in rows.tolist()])


@dataclass
class DecoderCache:
    """What the decoder has seen of itself, and keys and values of what was encoded, per layer, with the additive mask
    (B, 1, 1, L) over its padding."""

    said: KeyValueCache
    encoded: list[tuple[Tensor, Tensor]]
    mask: Tensor

    def copied(self, num_slots: int) -> "DecoderCache":
        encoded = [(keys.clone(), values.clone()) for keys, values in self.encoded]
        return DecoderCache(self.said.copied(num_slots), encoded, self.mask.clone())

    def keep(self, rows: Tensor) -> None:
        self.said.keep(rows)
        self.mask = moved_up(self.mask, rows)
        for index, (keys, values) in enumerate(self.encoded):
            self.encoded[index] = (moved_up(keys, rows), moved_up(values, rows))


def _is_t5(model: PreTrainedModel) -> bool:
    blocks: Any = getattr(getattr(model, "decoder", None), "block", ())
    if not blocks or not all(hasattr(block.layer[-1], "DenseReluDense") for block in blocks):
        return False
    own, *others = (block.layer[0].SelfAttention for block in blocks)
    return hasattr(own, "relative_attention_bias") and not any(hasattr(o, "relative_attention_bias") for o in others)


class EncoderDecoder(LanguageModel):
    """An LLM of the T5 family."""

    shares_questions = False

    def __init__(self, model: PreTrainedModel) -> None:
        """Raises BundleError unless its layers are T5's, with positions relative as the first layer has them."""
        config = model.config
        if not _is_t5(model):
            raise BundleError(f"the LLM is a {config.model_type} model; name one of the T5 family, such as Flan-T5")
        super().__init__(model, width=config.d_model, max_positions=MAX_POSITIONS)
        self._start_id: int = config.decoder_start_token_id
        self._heads, self._head_width = config.num_heads, config.d_kv
        slot_bytes = 2 * len(self.model.decoder.block) * self._heads * self._head_width * self.dtype.itemsize
        self.bytes_per_slot = 2 * slot_bytes  # of the encoded prompt, and of what is said
        self.bytes_per_position = bytes_between_layers(config.d_model, config.d_ff, self.dtype)
        self._scale = config.d_model**-0.5 if config.scale_decoder_outputs else 1.0
        self._encoder, self._decoder = self.model.encoder, self.model.decoder
        self._encoder_operations, self._decoder_operations = (
            2.0 * sum(p.numel() for p in stack.block.parameters() if p.dim() == 2)
            for stack in (self._encoder, self._decoder)
        )

    @torch.inference_mode()
    def read(self, inputs: Sequence[Tensor], *, room: int = 0) -> Inputs:
        return Inputs([rows.to(self.device, self.dtype) for rows in inputs])

    @torch.inference_mode()
    def read_on(self, prefix: Inputs, ids: Sequence[Sequence[int]]) -> Inputs:
        return Inputs([torch.cat([row, self._embedded(more)]) for row, more in zip(prefix.rows, ids, strict=True)])

    @torch.inference_mode()
    def ask(self, prefix: Inputs, instruction_ids: Sequence[int]) -> Asked:
        instruction = self._embedded(instruction_ids)
        rows = [torch.cat([row, instruction]) for row in prefix.rows]
        lengths = torch.tensor([len(row) for row in rows], device=self.device)
        self._check_context(int(lengths.max()))
        padded = pad_sequence(rows, batch_first=True)
        real = torch.arange(padded.shape[1], device=self.device) < lengths[:, None]
        count(padded.shape[0] * padded.shape[1] * self._encoder_operations, self.precision)
        encoded = self._encoder(inputs_embeds=padded, attention_mask=real).last_hidden_state
        mask = torch.zeros(real.shape, dtype=self.dtype, device=self.device).masked_fill_(~real, -torch.inf)
        nothing = encoded.new_zeros(len(rows), self._heads, 0, self._head_width)
        layers = [block.layer[1].EncDecAttention for block in self._decoder.block]
        cache = DecoderCache(
            KeyValueCache([(nothing, nothing) for _ in layers]),
            [(self._heads_of(layer.k(encoded)), self._heads_of(layer.v(encoded))) for layer in layers],
            mask[:, None, None],
        )
        return Asked(cache, torch.zeros_like(lengths), [self._start_id])

    def extend(self, cache: DecoderCache, lengths: Tensor, embeddings: Tensor, new: NewTokens) -> Tensor:
        assert new.earlier is None, "each instruction is asked alone, so there is nothing to look past"
        self._check_context(int((lengths[:, None] + new.depths).max()) + 1)
        count(len(embeddings) * self._decoder_operations, self.precision)
        cache.said.aim(lengths, new)
        mask = additive_mask(lengths, new, cache.said.num_seen, self.dtype)
        mask = mask + self._bias(lengths, new.depths[0], cache.said.num_seen)
        encoded_mask = cache.mask.expand(-1, -1, new.most, -1)
        all_encoded = [encoded_mask.shape[-1]] * new.num_rows
        hidden = embeddings
        for index, (block, encoded) in enumerate(zip(self._decoder.block, cache.encoded, strict=True)):
            itself, other = block.layer[0], block.layer[1]
            normed = itself.layer_norm(hidden)
            own = itself.SelfAttention
            seen = cache.said.update(self._heads_of(own.k(normed)[None]), self._heads_of(own.v(normed)[None]), index)
            hidden = hidden + own.o(self._attended(own.q(normed), seen, mask, new, cache.said.before))
            cross = other.EncDecAttention
            query = cross.q(other.layer_norm(hidden))
            hidden = hidden + cross.o(self._attended(query, encoded, encoded_mask, new, all_encoded))
            hidden = block.layer[2](hidden)
        final: Tensor = self._decoder.final_layer_norm(hidden) * self._scale
        return final

    def _attended(
        self, query: Tensor, seen: tuple[Tensor, Tensor], mask: Tensor, new: NewTokens, before: Sequence[int]
    ) -> Tensor:
        return attention_of_new(self._heads_of(query[None]), *seen, mask, new, before, scaling=1.0)[0].flatten(1)

    def _heads_of(self, states: Tensor) -> Tensor:
        """(B, N, heads · width) -> (B, heads, N, width)."""
        return states.view(*states.shape[:2], self._heads, self._head_width).transpose(1, 2)

    def _bias(self, lengths: Tensor, depths: Tensor, num_slots: int) -> Tensor:
        """What each new place's attention gains from its distance to each slot, (B, heads, N, K)."""
        attention_layer = self._decoder.block[0].layer[0].SelfAttention
        slots = torch.arange(num_slots, device=self.device)
        new = (slots - lengths[:, None]).clamp(0, len(depths) - 1)
        at = torch.where(slots < lengths[:, None], slots, lengths[:, None] + depths[new])
        buckets = attention_layer._relative_position_bucket(
            at[:, None, :] - (lengths[:, None] + depths)[:, :, None],
            bidirectional=False,
            num_buckets=attention_layer.relative_attention_num_buckets,
            max_distance=attention_layer.relative_attention_max_distance,
        )
        bias: Tensor = attention_layer.relative_attention_bias(buckets).permute(0, 3, 1, 2)
        return bias

    def _embedded(self, ids: Sequence[int]) -> Tensor:
        return self.embed(torch.tensor(ids, dtype=torch.int64))
