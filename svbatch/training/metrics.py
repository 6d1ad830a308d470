"""The field's metric of each task, by its key `metric`, from a library; and what lets it be resampled.

A metric is a figure over sums: each recording has a vector of counts, and the figure is made from their sum. So a
thousand bootstrap resamples are one product of matrices (svbatch.training.intervals). All figures are in percent.

| metric | counts of one recording | figure |
|---|---|---|
| `word_error_rate` | errors and words, by jiwer, in spoken form | errors per word |
| `bleu` | matches and n-grams of order 1 to 4, and both lengths, by sacrebleu: cased, 13a tokens | BLEU |
| `accuracy` | right answers and answers | share that is right |
| `unweighted_average_recall` | its place in the confusion matrix | mean recall of the classes that occur |
| `macro_f1` | F1 of its set of keywords, in spoken form, and 1 | mean over recordings |
| `slu_f1` | as SLURP counts (Bastianelli et al., EMNLP 2020), see `slot_counts` | F1 |
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svbatch.errors import TrainingError
from svbatch.tasks.task import Task
from svbatch.training.normaliser import normalised

try:
    import jiwer
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF
    from sklearn.metrics import accuracy_score, f1_score, recall_score
    from sklearn.preprocessing import MultiLabelBinarizer
except ModuleNotFoundError as error:
    raise TrainingError(f"{error.name} is not installed; `pip install svbatch[evaluate]` brings it") from error

Counts = NDArray[np.float64]
NO_ANSWER = ""
BLEU_ORDERS = 4


@dataclass(frozen=True)
class Metric:
    """`counts` of one recording's truth and answer, (K,); `figure` of sums (…, K), the figure (…) in percent;
    `library` is the same figure of all truths and answers, by the library that the field quotes."""

    name: str
    is_error: bool
    counts: Callable[[Any, Any], Counts]
    figure: Callable[[Counts], Counts]
    library: Callable[[Sequence[Any], Sequence[Any]], float]


def metric_of(task: Task) -> Metric | None:
    """What the task's `metric` names; None where it names none.

    Truths and answers are plain values: text and label a string, keywords a list of strings, slots a list of (slot,
    value), yes or no to several entries a mapping. An answer that is missing is None: it is wrong.
    """
    match task.metric:
        case "word_error_rate":
            return Metric(task.metric, True, word_counts, _share, _library_word_error_rate)
        case "bleu":
            return Metric(task.metric, False, bleu_counts, bleu, _library_bleu)
        case "accuracy":
            return Metric(task.metric, False, right_counts, _share, _library_accuracy)
        case "unweighted_average_recall":
            labels = task.label_names
            return Metric(
                task.metric, False, lambda truth, said: confusion(truth, said, labels), average_recall, _library_recall
            )
        case "macro_f1":
            return Metric(task.metric, False, keyword_counts, _share, _library_keyword_f1)
        case "slu_f1":
            return Metric(task.metric, False, slot_counts, f1, _slu_f1)
        case _:
            return None


def word_counts(truth: str, said: str | None) -> Counts:
    """Errors (substitutions, deletions, insertions) and words of the truth."""
    found = jiwer.process_words(normalised(truth), normalised(said or NO_ANSWER))
    errors = found.substitutions + found.deletions + found.insertions
    return np.array([errors, found.hits + found.substitutions + found.deletions], dtype=np.float64)


def bleu_counts(truth: str, said: str | None) -> Counts:
    """Matches of order 1 to 4, n-grams of order 1 to 4, length of the answer, length of the truth."""
    found = BLEU().corpus_score([said or NO_ANSWER], [[truth]])
    return np.array([*found.counts, *found.totals, found.sys_len, found.ref_len], dtype=np.float64)


def bleu(sums: Counts) -> Counts:
    """BLEU of sums (…, 10), smoothed as sacrebleu's default does: the k-th order without a match counts 1/2^k."""
    matches, totals = sums[..., :BLEU_ORDERS], sums[..., BLEU_ORDERS : 2 * BLEU_ORDERS]
    said, meant = sums[..., -2], sums[..., -1]
    missed = matches == 0
    smoothed = np.where(missed, 0.5 ** np.cumsum(missed, axis=-1), matches)
    is_void = (matches.sum(axis=-1) == 0) | (totals == 0).any(axis=-1)
    precision = np.exp(np.log(smoothed / np.maximum(totals, 1)).mean(axis=-1))
    brevity = np.exp(np.minimum(0.0, 1 - meant / np.maximum(said, 1)))
    return np.asarray(np.where(is_void, 0.0, 100 * brevity * precision))


def right_counts(truth: Any, said: Any) -> Counts:
    """Right answers and answers: of each entry of a mapping, or one."""
    if isinstance(truth, Mapping):
        answers = said or {}
        return np.array([sum(answers.get(entry) == value for entry, value in truth.items()), len(truth)], float)
    return np.array([said == truth, 1], dtype=np.float64)


def confusion(truth: str, said: str | None, labels: Sequence[str]) -> Counts:
    """One in the place of (truth, answer) of a matrix of C labels by C + 1, the last column for none; flat."""
    places = np.zeros((len(labels), len(labels) + 1))
    places[labels.index(truth), labels.index(said) if said in labels else -1] = 1
    return places.reshape(-1)


def average_recall(sums: Counts) -> Counts:
    """Mean recall of the classes that occur, from flat confusion matrices (…, C · (C + 1))."""
    num_labels = int((np.sqrt(1 + 4 * sums.shape[-1]) - 1) / 2)
    matrix = sums.reshape(*sums.shape[:-1], num_labels, num_labels + 1)
    occur = matrix.sum(axis=-1)
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    recalls = np.divide(right, occur, out=np.zeros_like(right), where=occur > 0)
    return np.asarray(100 * recalls.sum(axis=-1) / np.maximum((occur > 0).sum(axis=-1), 1))


def keyword_counts(truth: Sequence[str], said: Sequence[str] | None) -> Counts:
    """F1 of one recording's set of keywords, and 1."""
    meant, found = {normalised(word) for word in truth}, {normalised(word) for word in said or ()}
    whole = len(meant) + len(found)
    return np.array([2 * len(meant & found) / whole if whole else 1.0, 1.0])


def slot_counts(truth: Sequence[tuple[str, str]], said: Sequence[tuple[str, str]] | None) -> Counts:
    """True positives, false positives, false negatives of one recording's slots, words and characters together.

    A slot of the truth is matched with the nearest value said for the same slot: one true positive, and its distance
    (the word, then the character error rate, at most 1) as false positive and as false negative. What is left on
    either side is wrong as a whole.
    """
    sums = np.zeros(3)
    for distance in (jiwer.wer, jiwer.cer):
        left = [(slot, normalised(value)) for slot, value in said or ()]
        for slot, value in truth:
            alike = [(_distance(distance, normalised(value), own), (name, own)) for name, own in left if name == slot]
            if not alike:
                sums += (0, 0, 1)
                continue
            nearest, pair = min(alike)
            left.remove(pair)
            sums += (1, nearest, nearest)
        sums += (0, len(left), 0)
    return sums


def f1(sums: Counts) -> Counts:
    """F1 of true positives, false positives, false negatives (…, 3)."""
    whole = 2 * sums[..., 0] + sums[..., 1] + sums[..., 2]
    return np.asarray(100 * np.divide(2 * sums[..., 0], whole, out=np.zeros_like(whole), where=whole > 0))


def chrf(truths: Sequence[str], answers: Sequence[str | None]) -> float:
    """chrF of a translation, by sacrebleu."""
    return float(CHRF().corpus_score([said or NO_ANSWER for said in answers], [list(truths)]).score)


def calibration_error(confidences: Sequence[float], right: Sequence[bool], *, num_bins: int = 10) -> float:
    """Expected calibration error in percent points (Guo et al., ICML 2017): over bins of equal width of the answer's
    probability, the mean distance of probability and accuracy, weighted by the bin's size."""
    sure, hits = np.asarray(confidences, dtype=np.float64), np.asarray(right, dtype=np.float64)
    bins = np.minimum((sure * num_bins).astype(int), num_bins - 1)
    gaps = np.bincount(bins, weights=sure - hits, minlength=num_bins)
    return float(100 * np.abs(gaps).sum() / max(1, sure.size))


def _distance(rate: Callable[[str, str], float], meant: str, said: str) -> float:
    return min(1.0, float(rate(meant, said))) if meant and said else float(meant != said)


def _share(sums: Counts) -> Counts:
    part, whole = sums[..., 0], sums[..., 1]
    return np.asarray(100 * np.divide(part, whole, out=np.zeros_like(whole), where=whole > 0))


def _library_word_error_rate(truths: Sequence[str], answers: Sequence[str | None]) -> float:
    said = [normalised(answer or NO_ANSWER) for answer in answers]
    return 100 * float(jiwer.wer([normalised(truth) for truth in truths], said))


def _library_bleu(truths: Sequence[str], answers: Sequence[str | None]) -> float:
    return float(BLEU().corpus_score([said or NO_ANSWER for said in answers], [list(truths)]).score)


def _library_accuracy(truths: Sequence[Any], answers: Sequence[Any]) -> float:
    meant: list[str] = []
    found: list[str] = []
    for truth, said in zip(truths, answers, strict=True):
        for entry, value in truth.items() if isinstance(truth, Mapping) else [(None, truth)]:
            meant.append(str(value))
            found.append(str(said if entry is None else (said or {}).get(entry)))
    return 100 * float(accuracy_score(meant, found))


def _library_recall(truths: Sequence[str], answers: Sequence[str | None]) -> float:
    said = [answer or NO_ANSWER for answer in answers]
    present = sorted(set(truths))
    return 100 * float(recall_score(truths, said, labels=present, average="macro", zero_division=0))


def _library_keyword_f1(truths: Sequence[Sequence[str]], answers: Sequence[Sequence[str] | None]) -> float:
    meant = [{normalised(word) for word in truth} for truth in truths]
    found = [{normalised(word) for word in said or ()} for said in answers]
    binarizer = MultiLabelBinarizer().fit([*meant, *found, {"\n", "\t"}])  # it wants two at least; no word is these
    return 100 * float(
        f1_score(binarizer.transform(meant), binarizer.transform(found), average="samples", zero_division=1)
    )


def _slu_f1(truths: Sequence[Any], answers: Sequence[Any]) -> float:
    pairs = zip(truths, answers, strict=True)
    return float(f1(np.sum([slot_counts(truth, said) for truth, said in pairs], axis=0)))
