"""The shared prefix of all questions about a batch of segments: read once, continued by each question."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from svbatch.language.cache import KeyValueCache
from svbatch.language.llm import LanguageModel


@dataclass
class Prefix:
    """What the LLM has read of B segments. `lengths`: (B,) int64, the positions of each row that count."""

    cache: KeyValueCache
    lengths: Tensor

    @property
    def batch_size(self) -> int:
        return len(self.lengths)


@torch.inference_mode()
def prefill(llm: LanguageModel, inputs: Sequence[Tensor]) -> Prefix:
    """Reads one input of (L_i, E) per segment, L_i >= 1, as one batch; the output layer is not run.

    Inputs are padded on the right to the longest: sort segments by length before they are cut into batches.
    """
    padded = pad_sequence([rows.to(llm.device, llm.dtype) for rows in inputs], batch_first=True)
    lengths = torch.tensor([len(rows) for rows in inputs], device=llm.device)
    return Prefix(llm.read(padded), lengths)
