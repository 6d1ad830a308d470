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
    words: Sequence[Sequence[int]], log_probs: Sequence[NDArray[np.float32]], highest: Sequence[NDArray[np.float32]]
) -> list[list[Spotted | None]]:
    """Each of `words`, as classes, in each of B hearings, (T, 1 + classes) log-probabilities; None for a word without
    classes.

    The score of a span is that of the best CTC path that reads as the word, less that of the best path at all, which
    takes the `highest` (T,) log-probability everywhere.
    """
    written = [word for word in words if word]
    longest = max(map(len, log_probs), default=0)
    if not written or not longest:
        return [[Spotted(LEAST, 0.0) if word else None for word in words] for _ in log_probs]
    relative = np.full((len(log_probs), longest, log_probs[0].shape[1]), -np.inf)  # past its end nothing is said
    for row, own, best in zip(relative, log_probs, highest, strict=True):
        row[: len(own)] = own - best[:, None]
    return [_places(words, *each) for each in zip(*_best_ends(written, relative), strict=True)]


def _places(
    words: Sequence[Sequence[int]], scores: NDArray[np.float64], firsts: NDArray[np.int64]
) -> list[Spotted | None]:
    """What was found of the words that have classes, in one hearing."""
    found = iter(zip(scores.tolist(), firsts.tolist(), strict=True))
    places: list[Spotted | None] = []
    for word in words:
        score, first = next(found) if word else (0.0, 0)
        start = max(0, first - LATE) * EMBEDDING_S
        places.append(Spotted(max(LEAST, score / len(word)), start) if word else None)
    return places


def _best_ends(
    words: Sequence[Sequence[int]], relative: NDArray[np.float64]
) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
    """(B, K) best scores of K words over all spans of (B, T, classes), and the embedding where that span starts."""
    size = max(map(len, words))
    states = np.full((len(words), 2 * size - 1), BLANK)
    for row, word in zip(states, words, strict=True):
        row[: 2 * len(word) : 2] = word
    no_skip = np.full(states.shape, -np.inf)  # a token may follow another one that differs, without blank
    no_skip[:, 2::2][states[:, 2::2] != states[:, :-2:2]] = 0.0
    last = (slice(None), np.arange(len(words)), [2 * len(word) - 2 for word in words])
    shape = (len(relative), *states.shape)
    scores, firsts = np.full(shape, -np.inf), np.zeros(shape, dtype=np.int64)
    best, best_first = np.full(shape[:2], -np.inf), np.zeros(shape[:2], dtype=np.int64)
    for t in range(relative.shape[1]):
        before = [scores, _shifted(scores, 1, -np.inf), _shifted(scores, 2, -np.inf) + no_skip]
        origins = [firsts, _shifted(firsts, 1, 0), _shifted(firsts, 2, 0)]
        came_from = np.argmax(before, axis=0)
        scores, firsts = np.choose(came_from, before), np.choose(came_from, origins)
        begins = scores[..., 0] < 0  # a span may start anywhere, at no cost
        scores[begins, 0], firsts[begins, 0] = 0.0, t
        scores += relative[:, t, states]
        ended = scores[last]
        better = ended > best
        best[better], best_first[better] = ended[better], firsts[last][better]
    return best, best_first


def _shifted(values: NDArray[np.generic], places: int, fill: float) -> NDArray[np.generic]:
    shifted = np.full_like(values, fill)
    shifted[..., places:] = values[..., :-places]
    return shifted
