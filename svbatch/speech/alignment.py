"""Word times: the best path of a text through the read-out's posteriors (CTC forced alignment)."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from svbatch.speech.readout import BLANK

EMBEDDING_S = 0.08
LATE = 1  # embeddings by which the read-out says a word after it began: 83 ms in the median of 612 synthesised ones


@dataclass(frozen=True)
class Word:
    """A word as it was written, with its start and end in seconds from the start of the segment."""

    word: str
    start: float
    end: float


def word_times(words: Sequence[str], classes: Sequence[Sequence[int]], log_probs: NDArray[np.float32]) -> list[Word]:
    """Times of `words`, whose read-out classes are `classes` (none for a word that the read-out cannot write).

    `log_probs` (T, 1 + V) are those of the segment's real embeddings. A word without classes takes the gap between
    its neighbours; so do all, evenly, where the text is longer than the sound.
    """
    labels = [c for word in classes for c in word]
    path = best_path(labels, log_probs)
    duration_s = len(log_probs) * EMBEDDING_S
    if path is None or not labels:
        edges = np.linspace(0.0, duration_s, len(words) + 1)
        return [Word(w, float(a), float(b)) for w, a, b in zip(words, edges[:-1], edges[1:], strict=True)]
    spans: list[tuple[float, float] | None] = []
    at = 0
    for word in classes:
        inside = path[at : at + len(word)]
        at += len(word)
        first, last = (inside[0][0], inside[-1][1]) if inside else (0, 0)
        spans.append((max(0, first - LATE) * EMBEDDING_S, (last + 1) * EMBEDDING_S) if inside else None)
    for i, (span, following) in enumerate(pairwise(spans)):
        if span is not None and following is not None:
            spans[i] = (span[0], min(span[1], following[0]))
    return [Word(w, *span) for w, span in zip(words, _filled(spans, duration_s), strict=True)]


def best_path(labels: Sequence[int], log_probs: NDArray[np.float32]) -> list[tuple[int, int]] | None:
    """First and last embedding of each label on the most probable CTC path; None if they do not fit in (T, 1 + V)."""
    states = np.full(2 * len(labels) + 1, BLANK)
    states[1::2] = labels
    skips = np.zeros(len(states), dtype=bool)  # a label may follow another label that differs, without blank
    skips[3::2] = states[3::2] != states[1:-2:2]
    scores = np.full(len(states), -np.inf)
    scores[:2] = log_probs[0, states[:2]] if len(log_probs) else -np.inf
    came_from = np.zeros((len(log_probs), len(states)), dtype=np.int8)
    for t in range(1, len(log_probs)):
        stay = scores
        step = np.concatenate([[-np.inf], scores[:-1]])
        skip = np.where(skips, np.concatenate([[-np.inf, -np.inf], scores[:-2]])[: len(states)], -np.inf)
        options = np.stack([stay, step, skip])
        came_from[t] = options.argmax(axis=0)
        scores = options.max(axis=0) + log_probs[t, states]
    state = len(states) - 1 if len(states) == 1 or scores[-1] >= scores[-2] else len(states) - 2
    if not np.isfinite(scores[state]):
        return None
    spans: dict[int, tuple[int, int]] = {}
    for t in range(len(log_probs) - 1, -1, -1):
        if state % 2:
            spans[state // 2] = (t, spans.get(state // 2, (t, t))[1])
        state -= int(came_from[t, state])
    return [spans[i] for i in range(len(labels))]


def _filled(spans: Sequence[tuple[float, float] | None], duration_s: float) -> list[tuple[float, float]]:
    """Runs of words without times share the gap between their neighbours evenly."""
    filled: list[tuple[float, float]] = []
    index = 0
    while index < len(spans):
        known = spans[index]
        if known is not None:
            filled.append(known)
            index += 1
            continue
        after = next((j for j in range(index, len(spans)) if spans[j] is not None), len(spans))
        start = filled[-1][1] if filled else 0.0
        following = spans[after] if after < len(spans) else None
        edges = np.linspace(start, max(start, following[0] if following else duration_s), after - index + 1)
        filled += [(float(a), float(b)) for a, b in pairwise(edges)]
        index = after
    return filled
