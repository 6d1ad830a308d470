"""Answers to figures: each system's metric of each test with its interval, and how it stands to the baseline."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from svbatch.training.answering import Answered
from svbatch.training.benchmark import Benchmark
from svbatch.training.intervals import Verdict, interval, paired_interval, resampled, verdict
from svbatch.training.metrics import Metric, calibration_error, chrf, metric_of

WHOLE = "all"
BASELINES = ("classifier", "cascade")
"""The conventional system of a test: the first of these that answered it."""


@dataclass(frozen=True)
class Figure:
    """One system's metric of one test, or of its recordings of one source; percent, with the 95% interval.

    `difference` is ours less the baseline's, with its paired interval; None of the baseline itself, of single sources
    and of held-out wordings. `calibration_error` is in percent points, None of open answers.
    """

    test: str
    source: str
    system: str
    wording: int
    metric: str
    items: int
    speakers: int
    counted: bool
    value: float
    low: float
    high: float
    baseline: str | None = None
    difference: float | None = None
    difference_low: float | None = None
    difference_high: float | None = None
    verdict: Verdict | None = None
    calibration_error: float | None = None
    chrf: float | None = None


def figures(tests: Sequence[Benchmark], answers: Sequence[Answered], *, seed: int) -> list[Figure]:
    """All figures, in the order of the tests; of a test that names no metric there are none."""
    by_test: dict[str, dict[tuple[str, int], dict[int, Answered]]] = {}
    for answer in answers:
        systems = by_test.setdefault(answer.test, {})
        systems.setdefault((answer.system, answer.wording), {})[answer.item] = answer
    return [figure for test in tests for figure in _of_test(test, by_test.get(test.name, {}), seed)]


def _of_test(test: Benchmark, systems: Mapping[tuple[str, int], Mapping[int, Answered]], seed: int) -> Iterator[Figure]:
    metric = metric_of(test.task)
    if metric is None:
        return
    baseline = next((name for name in BASELINES if (name, 0) in systems), None)
    sources = sorted({item.source for item in test.items})
    for (system, wording), said in systems.items():
        is_compared = baseline and system not in BASELINES and not wording
        yield _figure(test, metric, said, systems[baseline, 0] if baseline and is_compared else {}, WHOLE, seed)
        if not wording and len(sources) > 1:
            yield from (_figure(test, metric, said, {}, source, seed) for source in sources)


def _figure(
    test: Benchmark,
    metric: Metric,
    said: Mapping[int, Answered],
    baseline: Mapping[int, Answered],
    source: str,
    seed: int,
) -> Figure:
    """The figure of one system's answers by item, beside the baseline's unless it has none."""
    places = [place for place, item in enumerate(test.items) if source in (WHOLE, item.source)]
    truths, speakers = zip(*((test.items[place].truth, test.items[place].speaker) for place in places), strict=True)
    plain, counts = _counted(metric, truths, [said.get(place) for place in places])
    low, high = interval(metric.figure(resampled(counts, speakers, seed=seed)))
    compared: dict[str, Any] = {}
    if baseline:
        theirs, their_counts = _counted(metric, truths, [baseline.get(place) for place in places])
        bounds = paired_interval(counts, their_counts, metric.figure, speakers, seed=seed)
        compared = {
            "baseline": next(iter(baseline.values())).system,
            "difference": metric.library(truths, plain) - metric.library(truths, theirs),
            "difference_low": bounds[0],
            "difference_high": bounds[1],
            "verdict": verdict(*bounds, is_error=metric.is_error),
        }
    sure = [c for place in places if place in said for c in said[place].confidences]
    right = [r for place in places if place in said for r in said[place].right]
    first = next(iter(said.values()))
    return Figure(
        test=test.name,
        source=source,
        system=first.system,
        wording=first.wording,
        metric=metric.name,
        items=len(places),
        speakers=len(set(speakers) - {None}),
        counted=test.is_counted,
        value=metric.library(truths, plain),
        low=low,
        high=high,
        calibration_error=calibration_error(sure, right) if sure else None,
        chrf=chrf(truths, plain) if metric.name == "bleu" else None,
        **compared,
    )


def _counted(
    metric: Metric, truths: Sequence[Any], answers: Sequence[Answered | None]
) -> tuple[list[Any], NDArray[np.float64]]:
    """Plain answers, None where there is none, and their counts (N, K)."""
    plain = [answer.said if answer else None for answer in answers]
    return plain, np.array([metric.counts(truth, said) for truth, said in zip(truths, plain, strict=True)])


def wording_spread(found: Sequence[Figure]) -> list[dict[str, Any]]:
    """For each test and system that was asked in other words: the figure with the default wording, with each held-out
    one, and the largest difference, in points."""
    rows = []
    for whole in (f for f in found if f.source == WHOLE and f.wording == 0):
        others = [f.value for f in found if (f.test, f.system) == (whole.test, whole.system) and f.wording]
        if others:
            moved = max(abs(value - whole.value) for value in others)
            rows.append(
                {"test": whole.test, "system": whole.system, "default": whole.value, "others": others, "moved": moved}
            )
    return rows


def write_figures(found: Sequence[Figure], path: Path) -> None:
    """One row a figure."""
    pq.write_table(pa.Table.from_pylist([vars(figure) for figure in found], schema=FIGURE_SCHEMA), path)


def write_answers(tests: Sequence[Benchmark], answers: Sequence[Answered], path: Path) -> None:
    """One row an answer; truths and answers as JSON, because their types differ between tests."""
    items = {test.name: test.items for test in tests}
    rows = []
    for answer in answers:
        item = items[answer.test][answer.item]
        rows.append(
            {
                "test": answer.test,
                "system": answer.system,
                "wording": answer.wording,
                "recording": item.recording,
                "source": item.source,
                "speaker": item.speaker,
                "truth": json.dumps(item.truth, ensure_ascii=False),
                "answer": json.dumps(answer.said, ensure_ascii=False),
                "probabilities": list(answer.confidences),
            }
        )
    pq.write_table(pa.Table.from_pylist(rows, schema=ANSWER_SCHEMA), path)


_TEXT, _WHOLE_NUMBER, _NUMBER = pa.string(), pa.int64(), pa.float64()
FIGURE_SCHEMA = pa.schema(
    [
        ("test", _TEXT),
        ("source", _TEXT),
        ("system", _TEXT),
        ("wording", _WHOLE_NUMBER),
        ("metric", _TEXT),
        ("items", _WHOLE_NUMBER),
        ("speakers", _WHOLE_NUMBER),
        ("counted", pa.bool_()),
        ("value", _NUMBER),
        ("low", _NUMBER),
        ("high", _NUMBER),
        ("baseline", _TEXT),
        ("difference", _NUMBER),
        ("difference_low", _NUMBER),
        ("difference_high", _NUMBER),
        ("verdict", _TEXT),
        ("calibration_error", _NUMBER),
        ("chrf", _NUMBER),
    ]
)
ANSWER_SCHEMA = pa.schema(
    [
        *((name, _TEXT) for name in ("test", "system")),
        ("wording", _WHOLE_NUMBER),
        *((name, _TEXT) for name in ("recording", "source", "speaker", "truth", "answer")),
        ("probabilities", pa.list_(_NUMBER)),
    ]
)
