"""The read-out: every speech embedding read as one of the LLM's tokens, or as blank.

Logit of token t at embedding x: exp(log_scale) · (2 x·e_t − |e_t|²), which ranks tokens by their distance to x;
the blank's logit comes from the projector. Trained with CTC (Graves et al., ICML 2006).

The LLM is given what was read, in its own embeddings, with a share of each speech embedding for how it was said.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svbatch.timing import count

BLANK = 0
TONE_SHARE = 0.05  # speech embeddings are about ten times as long as the LLM's own
TONE_EVERY = 8  # of the embeddings that say nothing, one in so many is kept (0.64 s): silence and noise are heard too


@dataclass(frozen=True)
class Readout:
    """Class 0 is blank; class i + 1 is `token_ids[i]`, whose LLM embedding is `embeddings[i]` (V, E)."""

    token_ids: Tensor
    embeddings: Tensor
    log_scale: Tensor

    def log_probs(self, speech: Tensor, blank: Tensor) -> Tensor:
        """(B, T, E) speech embeddings, (B, T) blank logits -> (B, T, 1 + V) float32 log-probabilities."""
        count(2.0 * speech.numel() * len(self.embeddings), str(speech.dtype).removeprefix("torch."))
        squares = self.embeddings.float().square().sum(dim=1)
        products = (speech @ self.embeddings.to(speech.dtype).T).float()
        logits = self.log_scale.float().exp() * (2 * products - squares)
        return torch.cat([blank.float().unsqueeze(2), logits], dim=2).log_softmax(dim=2)

    def some_log_probs(self, speech: Tensor, blank: Tensor, normaliser: Tensor, classes: Sequence[int]) -> Tensor:
        """One row's log-probabilities of blank and some classes, (T, E), (T,), (T,) -> (T, 1 + len(classes)) float32.

        normaliser: log(sum(exp(logits))) over all classes, which is the blank's logit less its log-probability.
        """
        tokens = self.embeddings[torch.tensor(classes, dtype=torch.int64) - 1].float()
        logits = self.log_scale.float().exp() * (2 * speech.float() @ tokens.T - tokens.square().sum(dim=1))
        return torch.cat([blank.float()[:, None], logits], dim=1) - normaliser[:, None]

    def greedy(self, log_probs: Tensor) -> list[int]:
        """Token ids read from one row's real embeddings (T, 1 + V): repeats merged, blanks dropped."""
        best = torch.unique_consecutive(log_probs.argmax(dim=1))
        return [int(self.token_ids[c - 1]) for c in best.tolist() if c != BLANK]

    def spoken(self, speech: Tensor, log_probs: Tensor) -> Tensor:
        """What the LLM is given of one row: (T, E) speech embeddings, (T, 1 + V) log-probabilities -> (K, E) float32.

        Each place becomes Σ p(t) e_t over its tokens plus TONE_SHARE of its speech embedding. Neighbours that say the
        same token are averaged into one; of those more likely blank than not, one in TONE_EVERY is kept.
        """
        places = torch.arange(len(log_probs), device=log_probs.device)
        says = log_probs[:, BLANK].exp() < 0.5
        token = torch.where(says, log_probs[:, 1:].argmax(dim=1), -1 - places)
        is_first = torch.ones_like(says)
        is_first[1:] = token[1:] != token[:-1]
        is_kept = says | (places % TONE_EVERY == 0)
        vectors = log_probs[is_kept, 1:].exp() @ self.embeddings.float() + TONE_SHARE * speech[is_kept].float()
        count(2.0 * vectors.numel() * len(self.embeddings), "float32")
        group = (is_first & is_kept).cumsum(0)[is_kept] - 1
        num_groups = int((is_first & is_kept).sum())
        sums = vectors.new_zeros(num_groups, vectors.shape[1]).index_add(0, group, vectors)
        return sums / group.bincount(minlength=num_groups)[:, None]

    def classes(self, ids: Sequence[int]) -> list[int]:
        """Token ids as classes; a token that the read-out does not score is left out."""
        places = torch.searchsorted(self.token_ids, torch.tensor(ids, dtype=torch.long)).clamp(
            max=len(self.token_ids) - 1
        )
        return [int(p) + 1 for p, i in zip(places.tolist(), ids, strict=True) if int(self.token_ids[p]) == i]


def spoken_form(text: str) -> str:
    """Lower case without punctuation, a space before every word: what the read-out and the LLM write down."""
    return "".join(f" {word}" for word in re.findall(r"[^\W_]+(?:'[^\W_]+)*", text.lower().replace("’", "'")))
