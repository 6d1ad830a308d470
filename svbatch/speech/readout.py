"""The read-out: every speech embedding read as one of the LLM's tokens, or as blank.

Logit of token t at embedding x: exp(log_scale) · (2 x·e_t − |e_t|²), which ranks tokens by their distance to x;
the blank's logit comes from the projector. Trained with CTC (Graves et al., ICML 2006).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLANK = 0


@dataclass(frozen=True)
class Readout:
    """Class 0 is blank; class i + 1 is `token_ids[i]`, whose LLM embedding is `embeddings[i]` (V, E)."""

    token_ids: Tensor
    embeddings: Tensor
    log_scale: Tensor

    def log_probs(self, speech: Tensor, blank: Tensor) -> Tensor:
        """(B, T, E) speech embeddings, (B, T) blank logits -> (B, T, 1 + V) float32 log-probabilities."""
        squares = self.embeddings.float().square().sum(dim=1)
        products = (speech @ self.embeddings.to(speech.dtype).T).float()
        logits = self.log_scale.float().exp() * (2 * products - squares)
        return torch.cat([blank.float().unsqueeze(2), logits], dim=2).log_softmax(dim=2)

    def greedy(self, log_probs: Tensor) -> list[int]:
        """Token ids read from one row's real embeddings (T, 1 + V): repeats merged, blanks dropped."""
        best = torch.unique_consecutive(log_probs.argmax(dim=1))
        return [int(self.token_ids[c - 1]) for c in best.tolist() if c != BLANK]

    def classes(self, ids: Sequence[int]) -> list[int]:
        """Token ids as classes; a token that the read-out does not score is left out."""
        places = torch.searchsorted(self.token_ids, torch.tensor(ids, dtype=torch.long)).clamp(
            max=len(self.token_ids) - 1
        )
        return [int(p) + 1 for p, i in zip(places.tolist(), ids, strict=True) if int(self.token_ids[p]) == i]


def kept(blank_probability: Tensor, *, every: int = 8, blank_below: float = 0.5) -> Tensor:
    """(T,) blank probabilities of one row -> indices of the embeddings given to the LLM.

    Those that say a token, and one in `every` besides (0.64 s), so that silence, noise and tone are heard too.
    """
    places = torch.arange(len(blank_probability), device=blank_probability.device)
    return places[(blank_probability < blank_below) | (places % every == 0)]


def spoken_form(text: str) -> str:
    """Lower case without punctuation, a space before every word: what the read-out and the LLM write down."""
    return "".join(f" {word}" for word in re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'")))
