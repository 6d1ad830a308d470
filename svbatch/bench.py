"""How fast a job is answered on this machine: what each part takes, and what one more question costs.

Nothing is kept: tables go to a folder that is removed. Speeds are ratios of what was measured in one run, on one
machine: to its own matrix-product speed, to the time of the sound, to a run with fewer questions.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from svbatch.annotate import Hear, annotate
from svbatch.ask import check
from svbatch.contract import contract_of
from svbatch.corpus.recording import Recording
from svbatch.corpus.sources import iter_recordings
from svbatch.errors import CorpusError
from svbatch.hear import Hearing, Span, hear
from svbatch.job import Job
from svbatch.model import Model
from svbatch.plan import RECORDINGS_PER_BATCH
from svbatch.tables.schemas import arrow_schema
from svbatch.tables.store import Store
from svbatch.tasks.task import Task
from svbatch.timing import COUNTING, Spent, part, watching

Sound = tuple[bytes, float, bool]
"""A span's samples, where it starts in seconds, and whether it is transcribed."""

MATRIX = 2048
MATRIX_RUNS = 3
ASKED_AGAIN = 3
"""How often a round asks what it has heard again: a small task is a hundredth of a run, and less than the machine's
unrest in one."""


@dataclass(frozen=True)
class Part:
    """One part of a run: its share of the time, and its speed as a share of the matrix-product speed (None where its
    operations are not counted), each operation at its own precision."""

    name: str
    share: float
    of_matrix_speed: float | None


@dataclass(frozen=True)
class Price:
    """What the k-th task added to the run with one task less: its time over that of the run with the first two tasks
    (the second: with the first), and over its floor (None where no operations are counted): its own operations at the
    matrix-product speed, where all was heard before."""

    task: str
    added: float
    of_floor: float | None


@dataclass(frozen=True)
class Figures:
    """`matrix_speeds`: operations per second by precision. `real_time_factor`: seconds of sound per second of a run
    with all tasks; `of_matrix_speed`: its operations at these speeds, as a share of its time. `prices` are of the job's
    tasks after the first, in order."""

    audio_seconds: float
    matrix_speeds: dict[str, float]
    real_time_factor: float
    of_matrix_speed: float
    parts: list[Part]
    prices: list[Price]


def bench(job: Job, model: Model, *, repeats: int) -> Figures:
    """Figures of a job whose recordings and tasks are all asked: medians of `repeats` rounds, each with one task, two,
    and so on to all, and then ASKED_AGAIN times the same of what has been heard."""
    check(job, model)
    recordings = list(iter_recordings(job.corpus, job.corpus_base, follow_outside=job.follow_outside))
    heard: dict[Sound, Hearing] = {}
    remembered = partial(_remembered, heard)
    _answered(recordings, job.tasks, model, remembered)  # what is set up on first use is not measured
    ups, again = [], []
    for _ in range(repeats):
        ups.append(_up(recordings, job.tasks, model, hear))
        again += [_up(recordings, job.tasks, model, remembered) for _ in range(ASKED_AGAIN)]
    audio_seconds = ups[0][-1].audio_seconds
    if not audio_seconds:
        raise CorpusError(f"corpus: none of the {len(recordings)} recordings can be read; `svbatch scan` says why")
    whole = _median([up[-1] for up in ups])
    return Figures(
        audio_seconds=audio_seconds,
        matrix_speeds=whole.speeds,
        real_time_factor=audio_seconds / whole.seconds,
        of_matrix_speed=_floor(whole.spent, whole.speeds) / whole.seconds,
        parts=_parts(whole),
        prices=[_price(task, k, ups, again) for k, task in enumerate(job.tasks[1:], 1)],
    )


@dataclass(frozen=True)
class Run:
    """What a run took, whole and by part, the seconds of audio that it heard, and the machine's matrix-product speeds
    by precision: the mean of right before it and right after it, because a machine's speed drifts."""

    seconds: float
    spent: dict[str, Spent]
    audio_seconds: float
    speeds: dict[str, float]


def _matrix_speeds(model: Model) -> dict[str, float]:
    precisions = {"float32": torch.float32, model.llm.precision: model.llm.dtype}
    return {name: matrix_speed(dtype) for name, dtype in precisions.items()}


def _mean(speeds: Mapping[str, float], others: Mapping[str, float]) -> dict[str, float]:
    return {name: (speeds[name] + others[name]) / 2 for name in speeds}


def matrix_speed(dtype: torch.dtype) -> float:
    """Operations a second of a product of two square matrices, the median of MATRIX_RUNS."""
    left, right = (torch.randn(MATRIX, MATRIX).to(dtype) for _ in range(2))
    return 2.0 * MATRIX**3 / statistics.median(_seconds(lambda: left @ right) for _ in range(MATRIX_RUNS))


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def _up(recordings: Sequence[Recording], tasks: Sequence[Task], model: Model, listen: Hear) -> list[Run]:
    """Runs with one task, two, and so on to all."""
    return [_timed(recordings, tasks[: k + 1], model, listen) for k in range(len(tasks))]


def _remembered(heard: dict[Sound, Hearing], spans: Sequence[Span], model: Model) -> list[Hearing]:
    """What is in `heard` of the spans; what is not is heard, and joins it."""
    sounds = [(span.waveform.tobytes(), span.start_s, span.transcribed) for span in spans]
    new = [place for place, sound in enumerate(sounds) if sound not in heard]
    if new:
        heard.update(zip([sounds[place] for place in new], hear([spans[place] for place in new], model), strict=True))
    return [heard[sound] for sound in sounds]


def _timed(recordings: Sequence[Recording], tasks: Sequence[Task], model: Model, listen: Hear) -> Run:
    before = _matrix_speeds(model)
    with watching() as spent:
        start = time.perf_counter()
        audio_seconds = _answered(recordings, tasks, model, listen)
        seconds = time.perf_counter() - start
    speeds = _mean(before, _matrix_speeds(model))
    return Run(seconds - spent.pop(COUNTING, Spent()).seconds, dict(spent), audio_seconds, speeds)


def _answered(recordings: Sequence[Recording], tasks: Sequence[Task], model: Model, listen: Hear) -> float:
    """Annotates and commits in batches as a run does; returns the seconds of audio heard."""
    audio_seconds = 0.0
    versions = {task.name: "bench" for task in tasks}
    with tempfile.TemporaryDirectory() as folder:
        store = Store(Path(folder))
        store.prepare({task.name: arrow_schema(contract_of(task)) for task in tasks})
        for start in range(0, len(recordings), RECORDINGS_PER_BATCH):
            some = recordings[start : start + RECORDINGS_PER_BATCH]
            annotated = annotate(some, tasks, versions, model, "bench", listen=listen)
            with part("writing"):
                store.commit(annotated.answers, annotated.failures, annotated.recordings)
            audio_seconds += annotated.audio_seconds
    return audio_seconds


def _median(runs: Sequence[Run]) -> Run:
    return sorted(runs, key=lambda run: run.seconds)[(len(runs) - 1) // 2]


def _floor(spent: Mapping[str, Spent], speeds: Mapping[str, float]) -> float:
    """Seconds that all operations would take at the matrix-product speed of their precision."""
    return sum(n / speeds[precision] for own in spent.values() for precision, n in own.operations.items())


def _parts(run: Run) -> list[Part]:
    named = [
        Part(name, own.seconds / run.seconds, _floor({name: own}, run.speeds) / own.seconds if own.operations else None)
        for name, own in sorted(run.spent.items(), key=lambda each: -each[1].seconds)
    ]
    return [*named, Part("the rest", 1 - sum(each.share for each in named), None)]


def _price(task: Task, k: int, ups: Sequence[Sequence[Run]], again: Sequence[Sequence[Run]]) -> Price:
    """Of the task at place `k`: a run is compared with that of one task less right before it."""
    added = statistics.median(_added(up[k], up[k - 1]) for up in ups)
    base = statistics.median(up[min(k - 1, 1)].seconds for up in ups)
    floors = [(_added(up[k], up[k - 1]), _added_floor(up[k], up[k - 1])) for up in again]
    of_floor = statistics.median(taken / floor for taken, floor in floors) if floors[0][1] > 0 else None
    return Price(task.name, added / base, of_floor)


def _added(run: Run, less: Run) -> float:
    """Seconds that a run took more than the one with a task less. Parts that did the very same operations in both are
    left out: what differs there is the machine's unrest, which may be more than a small task takes."""
    before = {name: own for name, own in less.spent.items() if own.operations}
    alike = [name for name, own in before.items() if run.spent[name].operations == own.operations]
    return run.seconds - less.seconds - sum(run.spent[name].seconds - before[name].seconds for name in alike)


def _added_floor(run: Run, less: Run) -> float:
    """Seconds that the operations which a run did more than the one with a task less take at the matrix-product speed
    around both."""
    speeds = _mean(run.speeds, less.speeds)
    return _floor(run.spent, speeds) - _floor(less.spent, speeds)
