"""What questions need of an LLM, whatever its kind: reading what was heard, going on from there, the output layer."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from svbatch.errors import TaskError
from svbatch.language.new_tokens import NewTokens
from svbatch.packed_linear import packed
from svbatch.timing import count

MAX_LOGITS = 2_000_000
"""The output layer makes so many logits at a time: 8 MB in float32, which stay in a processor's cache."""


class Prefix(Protocol):
    """What the LLM has read of B segments, and all questions about them share."""

    @property
    def batch_size(self) -> int:
        """B."""

    def select(self, rows: Tensor) -> "Prefix":
        """A prefix of these segments (int64 indices) in this order, which may be asked apart."""


class Cache(Protocol):
    """Keys and values of what the LLM has seen."""

    def copied(self, num_slots: int) -> "Cache":
        """A copy with at least so many slots, and none of those that come after them."""

    def keep(self, rows: Tensor) -> None:
        """Drops all rows but these, in the order of `closed_up`."""


@dataclass(frozen=True)
class Asked:
    """A prefix with an instruction, from where answers go on: `unread` are the tokens that come next, after `lengths`
    (B,) int64 positions of `cache`."""

    cache: Cache
    lengths: Tensor
    unread: list[int]


class LanguageModel(ABC):
    """An LLM over a cache of ours; its output layer is run only where asked.

    `shares_questions`: whether several instructions can go on from one prefix in one pass. `bytes_per_slot`: keys and
    values of one position. `bytes_per_position`: what a pass holds of one position between two layers.
    """

    shares_questions: bool
    bytes_per_slot: int
    bytes_per_position: int

    def __init__(self, model: PreTrainedModel, *, width: int, max_positions: int) -> None:
        """Takes the model over: eval mode, no gradients."""
        self.model = cast(Any, model)
        self.model.eval().requires_grad_(False)
        self.dtype: torch.dtype = model.dtype
        self.precision = str(model.dtype).removeprefix("torch.")
        self.device: torch.device = model.device
        self.width = width
        self.max_positions = max_positions
        self.vocab_size: int = model.config.vocab_size
        self._embedding = self.model.get_input_embeddings()
        self._output = self.model.get_output_embeddings()
        self._project = packed(self._output)

    def embed(self, ids: Tensor) -> Tensor:
        """Token ids of any shape -> their embeddings, (..., E) in the model's dtype."""
        embeddings: Tensor = self._embedding(ids.to(self.device))
        return embeddings

    @abstractmethod
    def read(self, inputs: Sequence[Tensor], *, room: int = 0) -> Prefix:
        """The prefix of one input (L_i, E) per segment, L_i >= 1, or 0 where the LLM has an encoder; the output
        layer is not run.

        Sort segments by length before they are cut into batches. `room`: for so many positions more there is place
        without moving what was read. Raises TaskError past the LLM's context.
        """

    @abstractmethod
    def read_on(self, prefix: Any, ids: Sequence[Sequence[int]]) -> Prefix:
        """The prefix with so many token ids more for each segment; the shorter one may not be asked any more."""

    @abstractmethod
    def ask(self, prefix: Any, instruction_ids: Sequence[int]) -> Asked:
        """From where answers to an instruction go on; one after the other, or together if `shares_questions`."""

    @abstractmethod
    def extend(self, cache: Any, lengths: Tensor, embeddings: Tensor, new: NewTokens) -> Tensor:
        """Hidden states (T, E) of T new tokens, which follow each row's first `lengths[b]` slots.

        lengths: (B,) int64. embeddings: (T, E). Their keys go to the cache. Raises TaskError past the LLM's context.
        """

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
        count(2.0 * len(hidden) * self.width * self.vocab_size, self.precision)
        for some in torch.split(hidden, max(1, MAX_LOGITS // self.vocab_size)):
            yield self._project(some).float()

    def _check_context(self, num_positions: int) -> None:
        if num_positions > self.max_positions:
            raise TaskError(
                f"a prompt with its answer takes {num_positions} positions and the LLM holds "
                f"{self.max_positions}; shorten the instruction or its labels"
            )


def bytes_between_layers(width: int, inner_width: int, dtype: torch.dtype) -> int:
    """What a pass holds of one position: six times the layer's width, four times that inside, two norms in float32."""
    return (6 * width + 4 * inner_width) * dtype.itemsize + 8 * width
