"""How well the sound agrees with a text so far: CTC prefix probabilities (Watanabe et al., IEEE JSTSP 2017, III-B).

The read-out's posteriors give the probability that what is said begins with some tokens, whatever follows. A decoder
that weighs each next token by it keeps its place in the sound: it neither skips words nor says them again and again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svbatch.speech.readout import BLANK, Readout

UNWRITABLE = -25.0  # log-probability of a token that the read-out cannot write


@dataclass(frozen=True)
class Heard:
    """The paths that read as a text so far: log-probability (T,) of those that end at each embedding in the text's last
    token, and in a blank; `whole` is that of the text as a prefix, `last` its last class."""

    in_token: Tensor
    in_blank: Tensor
    whole: float
    last: int | None


class PrefixScorer:
    """Scores of next tokens for one text, token by token. `log_probs` (T, 1 + V) are the read-out's, T > 0."""

    def __init__(self, log_probs: Tensor, readout: Readout, end_id: int) -> None:
        self._log_probs = log_probs.double()
        self._readout = readout
        self._end_id = end_id
        silent = self._log_probs[:, BLANK].cumsum(0)
        self._now = Heard(torch.full_like(silent, -torch.inf), silent, 0.0, None)
        self._next: dict[int, Heard] = {}

    def weigh(self, tokens: Sequence[int]) -> list[float]:
        """Log-probability that each of `tokens` comes next, or that the text ends where it is the end of the turn."""
        classes = {token: found[0] for token in tokens if (found := self._readout.classes([token]))}
        self._next = dict(zip(classes, self._continued(list(classes.values())), strict=True)) if classes else {}
        scores = {token: heard.whole - self._now.whole for token, heard in self._next.items()}
        ended = torch.logaddexp(self._now.in_token[-1], self._now.in_blank[-1])
        scores[self._end_id] = float(ended) - self._now.whole
        return [max(UNWRITABLE, scores.get(token, UNWRITABLE)) for token in tokens]

    def follow(self, token: int) -> None:
        """The text goes on with `token`, one of those that were weighed last; one that the read-out cannot write is
        passed over."""
        self._now = self._next.get(token, self._now)

    def _continued(self, classes: Sequence[int]) -> list[Heard]:
        """The text so far with each of K classes after it."""
        now = self._now
        said = self._log_probs[:, list(classes)].T
        repeats = torch.tensor([c == now.last for c in classes])[:, None]
        ready = torch.where(repeats, now.in_blank, torch.logaddexp(now.in_token, now.in_blank))
        before = torch.full((len(classes), 1), 0.0 if now.last is None else -torch.inf, dtype=said.dtype)
        entered = torch.cat([before, ready[:, :-1]], dim=1) + said  # the token begins here
        in_token = _carried(entered, said)
        in_blank = _carried(_delayed(in_token) + self._log_probs[:, BLANK], self._log_probs[:, BLANK].expand_as(said))
        whole = entered.logsumexp(dim=1).tolist()
        return [Heard(*each) for each in zip(in_token, in_blank, whole, classes, strict=True)]


def _carried(entered: Tensor, staying: Tensor) -> Tensor:
    """x[t] = log(exp(entered[t]) + exp(x[t - 1] + staying[t])) along the last axis of (K, T), without a loop."""
    sums = staying.cumsum(1)
    return sums + torch.logcumsumexp(entered - sums, dim=1)


def _delayed(values: Tensor) -> Tensor:
    return torch.cat([torch.full_like(values[:, :1], -torch.inf), values[:, :-1]], dim=1)
