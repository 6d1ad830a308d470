"""What a person reads of an evaluation: a page of Markdown tables, and a plot."""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from svbatch.errors import TrainingError
from svbatch.training.benchmark import MIN_ITEMS, MIN_SPEAKERS
from svbatch.training.figures import BASELINES, WHOLE, Figure, wording_spread
from svbatch.training.markdown import markdown_table

try:
    from matplotlib.figure import Figure as Canvas
except ModuleNotFoundError as error:
    raise TrainingError(f"{error.name} is not installed; `pip install svbatch[evaluate]` brings it") from error

HEADINGS = {"word_error_rate": "WER", "bleu": "BLEU", "accuracy": "accuracy", "unweighted_average_recall": "UAR"}
HEADINGS |= {"macro_f1": "F1", "slu_f1": "SLU-F1"}


def tests_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The table of tests (svbatch.training.benchmarks.table) in Markdown."""
    return markdown_table(
        ["test", "metric", "recordings", "speakers", "kind", "standing", "sources", "confounded by"],
        [
            [
                row["test"],
                HEADINGS.get(row["metric"], "none"),
                row["items"],
                row["speakers"] or "unknown",
                row["kind"],
                "counted" if row["counted"] else "indicative",
                row["sources"],
                row["confounds"],
            ]
            for row in rows
        ],
    )


def page(title: str, facts: Sequence[str], tests: Sequence[Mapping[str, Any]], found: Sequence[Figure]) -> str:
    """The whole page; `facts` are lines on what was measured, and how."""
    whole = [figure for figure in found if figure.source == WHOLE and not figure.wording]
    parts = [f"# {title}", "\n".join(f"- {fact}" for fact in facts), "## Tests", tests_table(tests)]
    parts += [
        f"Fewer than {MIN_ITEMS} recordings or {MIN_SPEAKERS} known speakers: indicative, not counted.",
        "## Figures",
        "Percent, with the 95% bootstrap interval by speaker. Of WER less is better, of all others more.",
        _figures_table(whole),
        "## Beside the baseline",
        "Ours less the baseline's, in points; an interval that holds zero is a tie.",
        _comparison_table(whole),
    ]
    if spread := wording_spread(found):
        parts += ["## Held-out wordings", _spread_table(spread)]
    if by_source := [figure for figure in found if figure.source != WHOLE and not figure.wording]:
        parts += ["## By source", _source_table(by_source)]
    return "\n\n".join(parts) + "\n"


def plot(found: Sequence[Figure], path: Path) -> None:
    """Every system's figure of every test with its interval, as an image; the format is the name's."""
    whole = [figure for figure in found if figure.source == WHOLE and not figure.wording]
    tests, systems = _unique(f.test for f in whole), _unique(f.system for f in whole)
    canvas = Canvas(figsize=(8, 1.5 + 0.6 * len(tests)), layout="constrained")
    axes = canvas.subplots()
    for number, system in enumerate(systems):
        own = [figure for figure in whole if figure.system == system]
        heights = [tests.index(f.test) + 0.14 * (number - (len(systems) - 1) / 2) for f in own]
        values = [f.value for f in own]
        spans = [[max(0.0, f.value - f.low) for f in own], [max(0.0, f.high - f.value) for f in own]]
        axes.errorbar(values, heights, xerr=spans, fmt="o", capsize=3, label=system)
    metrics = {f.test: HEADINGS[f.metric] for f in whole}
    axes.set_yticks(range(len(tests)), [f"{test} ({metrics[test]})" for test in tests])
    axes.invert_yaxis()
    axes.set_xlabel("percent, with the 95% interval; of WER less is better")
    axes.grid(axis="x", alpha=0.3)
    axes.legend()
    canvas.savefig(path, dpi=120)


def _figures_table(whole: Sequence[Figure]) -> str:
    systems = _unique(figure.system for figure in whole)
    rows = []
    for test in _unique(figure.test for figure in whole):
        own = {figure.system: figure for figure in whole if figure.test == test}
        name = test if next(iter(own.values())).counted else f"{test} (indicative)"
        metric = HEADINGS[next(iter(own.values())).metric]
        rows.append([name, metric, *(_interval(own[s]) if s in own else "" for s in systems)])
    return markdown_table(["test", "metric", *systems], rows)


def _interval(figure: Figure) -> str:
    extra = f", ECE {figure.calibration_error:.1f}" if figure.calibration_error is not None else ""
    extra += f", chrF {figure.chrf:.1f}" if figure.chrf is not None else ""
    return f"{figure.value:.1f} ({figure.low:.1f} to {figure.high:.1f}){extra}"


def _comparison_table(whole: Sequence[Figure]) -> str:
    rows = []
    for figure in whole:
        if figure.verdict is not None and figure.system not in BASELINES:
            bounds = f"{figure.difference:+.1f} ({figure.difference_low:+.1f} to {figure.difference_high:+.1f})"
            standing = figure.verdict if figure.counted else f"{figure.verdict} (indicative)"
            rows.append([figure.test, figure.system, figure.baseline, bounds, standing])
    return markdown_table(["test", "system", "baseline", "difference", "verdict"], rows)


def _spread_table(rows: Sequence[Mapping[str, Any]]) -> str:
    return markdown_table(
        ["test", "system", "default", "held out", "largest difference"],
        [
            [
                row["test"],
                row["system"],
                f"{row['default']:.1f}",
                ", ".join(f"{value:.1f}" for value in row["others"]),
                f"{row['moved']:.1f}",
            ]
            for row in rows
        ],
    )


def _source_table(found: Sequence[Figure]) -> str:
    systems = _unique(figure.system for figure in found)
    rows = []
    for test, source in _unique((figure.test, figure.source) for figure in found):
        own = {figure.system: figure for figure in found if (figure.test, figure.source) == (test, source)}
        first = next(iter(own.values()))
        values = [f"{own[s].value:.1f}" if s in own else "" for s in systems]
        rows.append([test, source, HEADINGS[first.metric], first.items, first.speakers or "unknown", *values])
    return markdown_table(["test", "source", "metric", "recordings", "speakers", *systems], rows)


def _unique(values: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(values))
