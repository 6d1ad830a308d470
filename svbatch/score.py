"""Closed answers: every label of every question is scored, all questions of a batch packed together."""

import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from svbatch.bundle import Calibration
from svbatch.contract import contract_of
from svbatch.habit import UNFITTED, habit
from svbatch.hear import Hearing, spotted_words, timed_words
from svbatch.language.llm import Prefix
from svbatch.language.scoring import score_many
from svbatch.model import Model
from svbatch.speech.alignment import Word
from svbatch.speech.readout import spoken_form
from svbatch.speech.spotting import Spotted
from svbatch.tables.schemas import entry_names
from svbatch.tasks import prompts
from svbatch.tasks.answers import Answer, label_answers, yes_no_answers
from svbatch.tasks.task import Task, library_labels
from svbatch.timing import part

Scores = NDArray[np.float32]


def closed_answers(
    tasks: Sequence[Task], hearings: Sequence[Hearing], prefix: Prefix, model: Model
) -> dict[str, list[Answer]]:
    """Answers of closed tasks to `hearings`, which the prefix has read, by the task's name."""
    questions = [
        (
            prompts.question_ids(model.tokenizer, question),
            [prompts.answer_ids(model.tokenizer, answer) for answer in task.scored],
        )
        for task in tasks
        for question in task.questions()
    ]
    with part("scoring"):
        scores = iter(score_many(model.llm, prefix, questions) if questions else [])
    answers: dict[str, list[Answer]] = {}
    for task in tasks:
        own = [next(scores).numpy() for _ in task.questions()]
        fitted = calibration_of(task, model)
        if task.answer == "label":
            answers[task.name] = _label_answers(task, own[0], fitted, hearings, model)
        elif task.entries:
            answers[task.name] = _entry_answers(task, own, fitted, hearings, model)
        else:
            answers[task.name] = _yes_no_answers(task, own[0], fitted)
    return answers


def calibration_of(task: Task, model: Model) -> Calibration | None:
    """What was fitted for the task's answers; None where nothing was, or for other labels than a job gives it."""
    fitted = model.calibration.get(task.definition) if task.is_library else None
    if fitted is None or task.answer != "label":
        return fitted
    return fitted if task.label_names == (tuple(fitted.labels) or library_labels(task.definition)) else None


def _label_answers(
    task: Task, scores: Scores, fitted: Calibration | None, hearings: Sequence[Hearing], model: Model
) -> list[Answer]:
    used = fitted or UNFITTED
    heard = heard_labels(task, hearings, model) if used.voice else None
    return label_answers(
        scores - used.habit * habit(task, model) if used.habit else scores,
        task.scored,
        evidence=0.0 if heard is None else used.voice * heard,
        temperature=used.temperature,
        is_calibrated=fitted is not None,
        min_probability=task.min_probability,
    )


def heard_labels(task: Task, hearings: Sequence[Hearing], model: Model) -> Scores | None:
    """What the voice alone says of a task's labels, log-probabilities (B, N); None where these labels are not read."""
    if not task.is_library or tuple(model.voiced.get(task.definition, ())) != tuple(task.scored):
        return None
    before = list(model.voiced)[: list(model.voiced).index(task.definition)]
    start = sum(len(model.voiced[name]) for name in before)
    read = [hearing.voice[start : start + len(task.scored)] for hearing in hearings if hearing.voice is not None]
    return torch.stack(read).float().numpy() if len(read) == len(hearings) > 0 else None


def _yes_no_answers(
    task: Task, scores: Scores, fitted: Calibration | None, evidence: Sequence[float] | float = 0.0
) -> list[Answer]:
    return yes_no_answers(
        scores,
        evidence=evidence,
        temperature=fitted.temperature if fitted else 1.0,
        is_calibrated=fitted is not None,
        min_probability=task.min_probability,
    )


def _entry_answers(
    task: Task,
    scores: Sequence[Scores],
    fitted: Calibration | None,
    hearings: Sequence[Hearing],
    model: Model,
) -> list[Answer]:
    """Yes or no to each of a task's entries, in one list a hearing, named as the task's contract names it."""
    column, fields = entry_names(contract_of(task))
    spotted: list[list[Spotted | None]] = [[None] * len(task.entries) for _ in hearings]
    if task.spotting:
        spotted = spotted_words(task.entries, hearings, model)
    is_read = task.spotting and "transcript" in task.hears
    read = [written_words(task.entries, hearing) if is_read else [0.0] * len(task.entries) for hearing in hearings]
    by_entry = [
        _spotted_answers(task, own, fitted, [row[i] for row in spotted], [row[i] for row in read])
        for i, own in enumerate(scores)
    ]
    rows: list[Answer] = []
    for answers, places, hearing in zip(zip(*by_entry, strict=True), spotted, hearings, strict=True):
        present = [answer["answer"] for answer in answers]
        starts = _starts(task.entries, present, places, hearing, model) if task.spotting else [None] * len(present)
        values = zip(task.entries, present, [a["probability"] for a in answers], starts, strict=True)
        rows.append(
            {
                column: [dict(zip(fields, value, strict=False)) for value in values],
                "calibrated": all(answer["calibrated"] for answer in answers),
            }
        )
    return rows


def written_words(words: Sequence[str], hearing: Hearing) -> list[float]:
    """The transcript's evidence that each of `words` is said: the mean probability of its tokens where it has the word,
    less than 0 by as much where it has not; 0 without a transcript."""
    if hearing.transcript is None:
        return [0.0] * len(words)
    spoken = spoken_form(hearing.text).split()
    sureness = math.exp(hearing.transcript.avg_logprob)
    return [-sureness if _place(spoken_form(word).split(), spoken) is None else sureness for word in words]


def _spotted_answers(
    task: Task,
    scores: Scores,
    fitted: Calibration | None,
    spotted: Sequence[Spotted | None],
    read: Sequence[float],
) -> list[Answer]:
    """Yes or no to one entry in each hearing. What the read-out cannot write has no evidence, and is not calibrated."""
    if fitted is None or (task.spotting and None in spotted):
        return _yes_no_answers(task, scores, None)
    heard = [place.evidence if place else 0.0 for place in spotted]
    evidence = [
        fitted.bias + fitted.spotting * of_sound + fitted.written * of_text
        for of_sound, of_text in zip(heard, read, strict=True)
    ]
    return _yes_no_answers(task, scores, fitted, evidence)


def _starts(
    entries: Sequence[str],
    present: Sequence[bool | None],
    places: Sequence[Spotted | None],
    hearing: Hearing,
    model: Model,
) -> list[float | None]:
    """Where each present entry is said: its first place in the transcript, else where the sound is most like it."""
    words = timed_words(hearing.text, hearing, model) if any(present) else []
    spoken = [spoken_form(word.word).strip() for word in words]
    return [
        _first(entry, spoken, words, place.start if place else None) if is_present else None
        for entry, is_present, place in zip(entries, present, places, strict=True)
    ]


def _first(entry: str, spoken: Sequence[str], words: Sequence[Word], otherwise: float | None) -> float | None:
    place = _place(spoken_form(entry).split(), spoken)
    return otherwise if place is None else words[place].start


def _place(wanted: Sequence[str], spoken: Sequence[str]) -> int | None:
    """Where the words `wanted` first stand among those `spoken`, one after the other; None if nowhere."""
    places = range(len(spoken) - len(wanted) + 1) if wanted else ()
    return next((i for i in places if list(spoken[i : i + len(wanted)]) == list(wanted)), None)
