"""How good a bundle is on recordings with known answers, beside the conventional system of the same parts.

    manifest ─► tests ─► each recording heard once ─┬─► the LLM, in each mode ─┐
                                                    └─► cascade, classifiers ──┴─► figures, intervals, verdicts

Left in the output: `answers.parquet`, `figures.parquet`, `figures.png` and the page `report.md`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from svbatch.bundle import Bundle
from svbatch.errors import TrainingError
from svbatch.model import Model, Precision
from svbatch.training.answering import MODES, Answered, Mode, heard_batches, mode_answers
from svbatch.training.benchmark import Benchmark
from svbatch.training.benchmarks import benchmarks, table
from svbatch.training.cascade import cascade_answers, load_cascade
from svbatch.training.data import read_manifest
from svbatch.training.figures import Figure, figures, write_answers, write_figures
from svbatch.training.frame_classifier import FrameClassifier, classifier_answers, load_classifiers
from svbatch.training.results import page, plot

SEED = 0
CLASSIFIER_RECORDINGS = 240
"""Of each task at most so many are enough for a classifier: more take longer and help little."""


@dataclass(frozen=True)
class Systems:
    """What answers: the LLM in `modes` (and the held-out `wordings` in the last of them), the `cascade` (a model with
    the cascade's LLM, None where the bundle has no recogniser), and classifiers by test."""

    modes: Sequence[Mode]
    wordings: bool
    cascade: Model | None
    classifiers: dict[str, FrameClassifier]


def read_benchmarks(
    manifest: Path, *, names: Sequence[str] = (), limit: int | None = None, written: bool = True
) -> list[Benchmark]:
    """The tests that a manifest allows, or those of `names`, each of at most `limit` recordings; `written`: those that
    need no manifest too. Raises TrainingError for a name that is none of them."""
    tests = benchmarks(read_manifest(manifest), seed=SEED, written=written)
    known = [test.name for test in tests]
    if unknown := [name for name in names if name not in known]:
        raise TrainingError(f"{manifest}: no test {', '.join(unknown)}; it allows {', '.join(known) or 'none'}")
    chosen = [test for test in tests if not names or test.name in names]
    return [test if limit is None else test.limited(limit, seed=SEED) for test in chosen]


def answer_all(tests: Sequence[Benchmark], model: Model, systems: Systems) -> list[Answered]:
    """What every system answers to every test. Of the sound alone *audio* and *both* are one, and asked once."""
    alike = {t.name for t in tests if len(t.task.hears) == 1} if {"audio", "both"} <= {*systems.modes} else set()
    found: list[Answered] = []
    for batch in heard_batches(tests, model):
        for mode in systems.modes:
            asked = [q for q in batch.questions if mode != "audio" or q[0].name not in alike]
            asks_others = systems.wordings and mode == systems.modes[-1]
            own = replace(model, calibration={}) if mode == "text" else model
            found += mode_answers(replace(batch, questions=asked), mode, own, wordings=asks_others)
        if systems.cascade is not None:
            found += cascade_answers(batch, systems.cascade)
        found += classifier_answers(batch, systems.classifiers, model)
    return found + [
        replace(a, system="audio") for a in found if a.test in alike and a.system == "both" and not a.wording
    ]


def evaluate(
    tests: Sequence[Benchmark],
    bundle: Bundle,
    model: Model,
    output: Path,
    *,
    precision: Precision,
    modes: Sequence[Mode] = ("audio", "both"),
    wordings: bool = False,
    cascade: str | None = None,
    training: Sequence[Benchmark] = (),
) -> list[Figure]:
    """Measures `model` on `tests` and writes all results into `output`.

    `cascade`: the bundle whose adapter the cascade's LLM has; None for no adapter. `training`: tests made of training
    recordings, from which the classifiers learn.
    """
    other, what = load_cascade(bundle, cascade, model, precision) if model.recogniser else (None, "none")
    encoder_id = bundle.manifest.files[bundle.manifest.encoder.graph].sha256
    classifiers = load_classifiers(tests, training, model, encoder_id, bundle.cache) if training else {}
    ordered = [mode for mode in MODES if mode in modes]
    answers = answer_all(tests, model, Systems(ordered, wordings, other, classifiers))
    found = figures(tests, answers, seed=SEED)
    facts = [
        f"bundle {bundle.manifest.name} {bundle.manifest.version}, id {bundle.id}, {precision}",
        f"cascade: the recogniser's transcript, then {what}; asr is the transcript, keyword_search a search in it",
        "classifier: on the encoder's frames, trained for each task"
        + (f" ({', '.join(classifiers)})" if classifiers else "; none was trained"),
        f"seed {SEED}; texts are compared in lower case without punctuation, translations as they are written",
    ]
    output.mkdir(parents=True, exist_ok=True)
    write_answers(tests, answers, output / "answers.parquet")
    write_figures(found, output / "figures.parquet")
    title = f"{bundle.manifest.name} on {len(tests)} tests"
    (output / "report.md").write_text(page(title, facts, table(tests), found), encoding="utf-8")
    plot(found, output / "figures.png")
    return found
