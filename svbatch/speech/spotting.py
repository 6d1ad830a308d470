"""Whether a word is heard anywhere in a segment: a best path of its tokens through the read-out's posteriors.

The transcript holds one guess per word; the posteriors still know how near the second guess was.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from svbatch.speech.alignment import EMBEDDING_S, LATE
from svbatch.speech.readout import BLANK

LEAST = -60.0  # evidence of what cannot be there at all: more tokens than sound


@dataclass(frozen=True)
class Spotted:
    """The likeliest place of a word: `start` in seconds from the start of the segment. `evidence` is 0 where the
    read-out's first choices say the word, and below by what they are likelier than the word, per token (natural log).
    """

    evidence: float
    start: float


def spot(
    words: Sequence[Sequence[int]], log_probs: NDArray[np.float32], highest: NDArray[np.float32]
) -> list[Spotted | None]:
    """Each of `words`, as classes, in (T, 1 + classes) log-probabilities; None for a word without classes.

    The score of a span is that of the best CTC path that reads as the word, less that of the best path at all, which
    takes the `highest` (T,) log-probability everywhere.
    """
    written = [word for word in words if word]
    if not written or not len(log_probs):
        return [Spotted(LEAST, 0.0) if word else None for word in words]
    scores, firsts = _best_ends(written, log_probs - highest[:, None])
    found = iter(
        Spotted(max(LEAST, float(score) / len(word)), float(max(0, first - LATE) * EMBEDDING_S))
        for word, score, first in zip(written, scores, firsts, strict=True)
    )
    return [next(found) if word else None for word in words]


def _best_ends(
    words: Sequence[Sequence[int]], relative: NDArray[np.float32]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(K,) best scores of K words over all spans, and (K,) the embedding where that span starts."""
    size = max(map(len, words))
    states = np.full((len(words), 2 * size - 1), BLANK)
    for row, word in zip(states, words, strict=True):
        row[: 2 * len(word) : 2] = word
    skips = np.zeros(states.shape, dtype=bool)  # a token may follow another one that differs, without blank
    skips[:, 2::2] = states[:, 2::2] != states[:, :-2:2]
    last = np.array([2 * len(word) - 2 for word in words])
    rows = np.arange(len(words))
    scores = np.full(states.shape, -np.inf)
    firsts = np.zeros(states.shape, dtype=np.int64)
    best, best_first = np.full(len(words), -np.inf), np.zeros(len(words), dtype=np.int64)
    for t, frame in enumerate(relative):
        before = [scores, _shifted(scores, 1, -np.inf), np.where(skips, _shifted(scores, 2, -np.inf), -np.inf)]
        origins = [firsts, _shifted(firsts, 1, 0), _shifted(firsts, 2, 0)]
        came_from = np.argmax(before, axis=0)
        scores, firsts = np.choose(came_from, before), np.choose(came_from, origins)
        begins = scores[:, 0] < 0  # a span may start anywhere, at no cost
        scores[begins, 0], firsts[begins, 0] = 0.0, t
        scores = scores + frame[states]
        ended = scores[rows, last]
        better = ended > best
        best[better], best_first[better] = ended[better], firsts[rows, last][better]
    return best, best_first


def _shifted(values: NDArray[np.generic], places: int, fill: float) -> NDArray[np.generic]:
    shifted = np.full_like(values, fill)
    shifted[:, places:] = values[:, :-places]
    return shifted
