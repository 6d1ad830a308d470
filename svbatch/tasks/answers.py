"""Scores of labels -> probabilities -> answers, as dicts that fit the tables' structs.

A score is the sum of the log-probabilities of a label's tokens and of the end of the turn. Probabilities are
the softmax of score / temperature over the task's labels, so they sum to 1; a temperature that was fitted on
held-out data makes them calibrated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

LOW_CONFIDENCE = "low_confidence"
Answer = dict[str, Any]  # the columns beside the common ones


def probabilities(scores: ArrayLike, temperature: float = 1.0) -> NDArray[np.float64]:
    """Scores (B, N), natural log, any float type -> probabilities (B, N). A label that cannot be said has
    score -inf and probability 0. Raises ValueError for NaN, +inf, and a row without any finite score."""
    logits = np.asarray(scores, dtype=np.float64)
    if temperature <= 0 or not np.isfinite(temperature):
        raise ValueError(f"the temperature is {temperature}; it must be a positive number")
    highest = logits.max(axis=1, keepdims=True)
    bad_rows = np.flatnonzero(~np.isfinite(highest[:, 0]))
    if bad_rows.size:
        raise ValueError(f"no finite scores in rows {bad_rows.tolist()}: {logits[bad_rows[0]].tolist()}")
    weights = np.exp((logits - highest) / temperature)
    return np.asarray(weights / weights.sum(axis=1, keepdims=True))


def label_answers(
    scores: ArrayLike,
    labels: Sequence[str],
    *,
    evidence: ArrayLike = 0.0,
    temperature: float = 1.0,
    is_calibrated: bool = False,
    min_probability: float | None = None,
) -> list[dict[str, Any]]:
    """Scores (B, N) of N labels -> B answers {label, probability, probabilities, reason, calibrated}.

    `evidence` (B, N) is what speaks for each label beside score / temperature.
    `probability` is that of the most probable label, the first of equals. Below `min_probability` the label
    is None with reason low_confidence; the numbers stay. `is_calibrated`: whether they were fitted for these labels."""
    answers = []
    scaled = np.asarray(scores, dtype=np.float64) / temperature
    for row in probabilities(scaled + np.asarray(evidence, dtype=np.float64)):
        best = int(row.argmax())
        reason = _reason(row[best], min_probability)
        answers.append(
            {
                "label": None if reason else labels[best],
                "probability": float(row[best]),
                "probabilities": [
                    {"label": label, "probability": float(p)} for label, p in zip(labels, row, strict=True)
                ],
                "reason": reason,
                "calibrated": is_calibrated,
            }
        )
    return answers


def yes_no_answers(
    scores: ArrayLike,
    *,
    evidence: ArrayLike = 0.0,
    temperature: float = 1.0,
    is_calibrated: bool = False,
    min_probability: float | None = None,
) -> list[dict[str, Any]]:
    """Scores (B, 2) of yes and no, in this order -> B answers {answer, probability, reason, calibrated}.

    `evidence` (B,) is what speaks for yes beside the scores, added to its log-odds.

    `probability` is that of yes, and `answer` is whether it is at least 0.5. Where the more probable of the
    two is below `min_probability`, `answer` is None with reason low_confidence."""
    answers = []
    scaled = np.array(scores, dtype=np.float64) / temperature
    scaled[:, 0] += np.asarray(evidence, dtype=np.float64)
    for row in probabilities(scaled):
        yes, no = (float(p) for p in row)
        reason = _reason(max(yes, no), min_probability)
        answers.append(
            {
                "answer": None if reason else yes >= no,
                "probability": yes,
                "reason": reason,
                "calibrated": is_calibrated,
            }
        )
    return answers


def _reason(probability: float, min_probability: float | None) -> str | None:
    return LOW_CONFIDENCE if min_probability is not None and probability < min_probability else None
