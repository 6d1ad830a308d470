"""A tiny random Llama, and the slow and obvious versions that judge the fast ones."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from svbatch.language.decoder_only import DecoderOnly, ReadPrefix

END_ID = 31
"""A token that the tiny model says at different places, so that answers end at different lengths."""
VOCABULARY = 300


def tiny_llama(**changes: object) -> LlamaForCausalLM:
    """The same weights at every call: two layers with grouped heads, wide enough that its answers vary."""
    torch.manual_seed(0)
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "initializer_range": 0.2,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": END_ID,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(LlamaConfig(**(settings | changes))).eval()


class Judge:
    """Every prompt alone, in full, through transformers' own attention: no cache, no batch, no mask."""

    def __init__(self, model: LlamaForCausalLM) -> None:
        self.model = model

    @torch.inference_mode()
    def log_probabilities(self, prefix: Tensor, ids: Sequence[int]) -> Tensor:
        """Of every next token after the prefix (L, E) and each of the ids, (1 + len(ids), vocabulary)."""
        embeddings = self.model.get_input_embeddings()(torch.tensor(ids, dtype=torch.int64))
        logits = self.model(inputs_embeds=torch.cat([prefix, embeddings])[None]).logits[0]
        return logits[len(prefix) - 1 :].float().log_softmax(-1)

    def label_score(self, prefix: Tensor, instruction_ids: Sequence[int], label: Sequence[int]) -> float:
        after = self.log_probabilities(prefix, [*instruction_ids, *label])[len(instruction_ids) :]
        return sum(float(after[step, token]) for step, token in enumerate(label))

    def greedy(self, prefix: Tensor, instruction_ids: Sequence[int], max_tokens: int) -> tuple[list[int], float]:
        """The ids, the end of the turn included if it was said, and the sum of their log-probabilities."""
        said: list[int] = []
        total = 0.0
        while len(said) < max_tokens and END_ID not in said:
            best = self.log_probabilities(prefix, [*instruction_ids, *said])[-1].max(-1)
            said.append(int(best.indices))
            total += float(best.values)
        return said, total


@pytest.fixture(scope="session")
def build_llama() -> Callable[..., LlamaForCausalLM]:
    return tiny_llama


@pytest.fixture(scope="session")
def judge() -> Judge:
    return Judge(tiny_llama())


@pytest.fixture(scope="session")
def llm() -> DecoderOnly:
    return DecoderOnly(tiny_llama())


@pytest.fixture(scope="session")
def segments() -> list[Tensor]:
    """Seven prefixes of 1 to 40 positions, as speech embeddings might be, longest in the middle."""
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, 64, generator=generator) * 0.2 for length in (5, 12, 1, 40, 23, 7, 23)]


@pytest.fixture(scope="session")
def seen_by() -> Callable[[ReadPrefix], list[Tensor]]:
    """Copies of the keys and values of the positions that count, by layer and row."""

    def copies(prefix: ReadPrefix) -> list[Tensor]:
        rows = list(enumerate(prefix.lengths.tolist()))
        return [part[row, :, :length].clone() for pair in prefix.cache for part in pair for row, length in rows]

    return copies
