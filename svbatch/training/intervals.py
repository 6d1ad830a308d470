"""Bootstrap intervals of figures over sums (svbatch.training.metrics), resampled by speaker.

Recordings of one speaker are not independent, so whole speakers are drawn, with replacement; a recording without a
known speaker is one of its own. Two systems that answered the same recordings are compared draw by draw.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Counts = NDArray[np.float64]
Verdict = Literal["beats", "loses", "tie"]
NUM_RESAMPLES = 2_000
COVERED = 95.0


def resampled(counts: Counts, speakers: Sequence[str | None], *, seed: int, num: int = NUM_RESAMPLES) -> Counts:
    """Sums (num, K) of `num` draws of speakers, from the counts (N, K) of N recordings.

    The draws follow from the speakers and the seed alone: the counts of another system on the same recordings are
    drawn alike.
    """
    names = [f"speaker {name}" if name is not None else f"recording {i}" for i, name in enumerate(speakers)]
    unique, places = np.unique(names, return_inverse=True)
    by_speaker = np.zeros((len(unique), counts.shape[1]))
    np.add.at(by_speaker, places, counts)
    draws = np.random.default_rng(seed).multinomial(len(unique), np.full(len(unique), 1 / len(unique)), size=num)
    sums: Counts = draws.astype(np.float64) @ by_speaker
    return sums


def interval(figures: Counts) -> tuple[float, float]:
    """The middle COVERED percent of the figures (num,) of resamples."""
    outside = (100 - COVERED) / 2
    low, high = np.percentile(figures, [outside, 100 - outside])
    return float(low), float(high)


def paired_interval(
    ours: Counts,
    theirs: Counts,
    figure: Callable[[Counts], Counts],
    speakers: Sequence[str | None],
    *,
    seed: int,
) -> tuple[float, float]:
    """The interval of figure(ours) - figure(theirs), counts (N, K) of two systems on the same recordings."""
    return interval(figure(resampled(ours, speakers, seed=seed)) - figure(resampled(theirs, speakers, seed=seed)))


def verdict(low: float, high: float, *, is_error: bool) -> Verdict:
    """What the interval of a difference, ours less theirs, says of ours: a tie if it holds zero."""
    if low <= 0 <= high:
        return "tie"
    return "beats" if (high < 0) == is_error else "loses"
