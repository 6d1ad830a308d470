"""Held-out recordings heard as a run hears them, and asked what calibration wants to know."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from svbatch.annotate import detector_of
from svbatch.ask import ask
from svbatch.bundle import Calibration
from svbatch.corpus.segment import speech_segments, windows
from svbatch.generate import Unanswered
from svbatch.habit import habit
from svbatch.hear import Hearing, Span, hear, spotted_words
from svbatch.model import Model
from svbatch.score import heard_labels, written_words
from svbatch.tasks.answers import Answer
from svbatch.tasks.task import Task, library_labels, load_task
from svbatch.training.benchmarks import speaker_counts
from svbatch.training.data import Example, waveform_of
from svbatch.training.known import known_answers
from svbatch.training.normaliser import normalised
from svbatch.training.progress import with_progress
from svbatch.training.questions import lookalikes

EXAMPLES_AT_ONCE = 8
HEARINGS_AT_ONCE = 16


@dataclass(frozen=True)
class Listened:
    """One example with the speech_activity answer of the window that is likeliest to hold speech, and its hearings
    that hold speech."""

    example: Example
    activity: Answer
    hearings: list[Hearing]


@dataclass(frozen=True)
class Asked:
    """One keyword question: what was answered, as the probability of yes, and what is true. `evidence` is the
    read-out's (svbatch.speech.spotting), None where it cannot write the word; `written` the transcript's."""

    word: str
    probability: float
    evidence: float | None
    written: float
    truth: bool


def heard_examples(examples: Sequence[Example], model: Model) -> Iterator[Listened]:
    """Every example heard."""
    activity = load_task("speech_activity", Path())
    for start in with_progress(range(0, len(examples), EXAMPLES_AT_ONCE), "listen"):
        batch = examples[start : start + EXAMPLES_AT_ONCE]
        sounds = [waveform_of(example) for example in batch]
        speech = [speech_segments(sound, detector_of(model)) for sound in sounds]
        segments = [(i, s) for i, own in enumerate(speech) for s in own]
        parts = [(i, s) for i, own in enumerate(speech) for s in windows(sounds[i].size, own)]
        with torch.inference_mode():
            spans = [Span(sounds[i][s.start : s.end], s.start_s, True) for i, s in segments]
            heard = hear(spans, model) if spans else []
            spoken = [(i, h) for (i, _), h in zip(segments, heard, strict=True) if h.has_speech]
            in_parts = hear([Span(sounds[i][s.start : s.end], s.start_s, False) for i, s in parts], model)
            answers = _closed(activity, in_parts, model)
        for i, example in enumerate(batch):
            judged = [answer for (k, _), answer in zip(parts, answers, strict=True) if k == i]
            yield Listened(example, max(judged, key=_speech), [h for k, h in spoken if k == i])


def asked_keywords(heard: Sequence[Listened], model: Model, seed: int) -> list[Asked]:
    """Of each English recording with a text a word that is said and one that is not, asked side by side."""
    asked = []
    for each, truths in with_progress(_keyword_questions(heard, seed), "keyword_search"):
        words = list(truths)
        task = load_task({"keyword_search": {"keywords": words}}, Path())
        with torch.inference_mode():
            found = _closed(task, each.hearings, model)
        spotted = spotted_words(words, each.hearings, model)
        written = [written_words(words, hearing) for hearing in each.hearings]
        for place, (word, truth) in enumerate(truths.items()):
            probability = max(answer["keywords"][place]["probability"] for answer in found)
            evidence = max((best.evidence for own in spotted if (best := own[place]) is not None), default=None)
            asked.append(Asked(word, probability, evidence, max(own[place] for own in written), truth))
    return asked


@dataclass(frozen=True)
class Judged:
    """Answers to one closed task at temperature 1: the probability of every label in the task's order, (N, L), and the
    places of the true ones, (N,). `habit` (L,) are the log-probabilities where nothing was heard, `voice` (N, L) those
    that the voice alone gives, where it is read. `labels` are empty where they are the library's."""

    probabilities: list[list[float]]
    truths: list[int]
    habit: list[float]
    voice: list[list[float]] = field(default_factory=list)
    labels: tuple[str, ...] = ()


def asked_labels(name: str, heard: Sequence[Listened], model: Model, *, is_read: bool = False) -> Judged:
    """A task of the library asked of each recording that has its label, and holds speech; `is_read`: of its transcript
    alone."""
    known = known_answers(name, [each.example for each in heard])
    told = [(heard[i].hearings[0], own[0].answer) for i, own in known.items() if heard[i].hearings]
    task = next((own[0].task for own in known.values()), None)
    if task is None:
        return Judged([], [], [])
    return _judged(task.model_copy(update={"hears": ("transcript",)}) if is_read else task, told, model)


def asked_speaker_counts(examples: Sequence[Example], model: Model, seed: int) -> Judged:
    """speaker_count asked of clips that are joined as for its test."""
    told: list[tuple[Hearing, str]] = []
    items = speaker_counts(examples, seed)
    for start in with_progress(range(0, len(items), EXAMPLES_AT_ONCE), "speaker_count"):
        batch = [(item.load(), item.truth) for item in items[start : start + EXAMPLES_AT_ONCE]]
        first = [(sound, s, truth) for sound, truth in batch for s in speech_segments(sound, detector_of(model))[:1]]
        spans = [Span(sound[s.start : s.end], s.start_s, False) for sound, s, _ in first]
        with torch.inference_mode():
            hearings = hear(spans, model) if spans else []
        told += zip(hearings, [truth for _, _, truth in first], strict=True)
    return _judged(load_task("speaker_count", Path()), told, model)


def _judged(task: Task, told: Sequence[tuple[Hearing, str]], model: Model) -> Judged:
    places = {label: place for place, label in enumerate(task.label_names)}
    is_own = task.label_names != library_labels(task.definition)
    judged = Judged([], [], habit(task, model).tolist(), labels=task.label_names if is_own else ())
    for start in range(0, len(told), HEARINGS_AT_ONCE):
        some = told[start : start + HEARINGS_AT_ONCE]
        with torch.inference_mode():
            answers = ask([task], [hearing for hearing, _ in some], _uncalibrated(task, model))[task.name]
        heard = heard_labels(task, [hearing for hearing, _ in some], model)
        for row, (answer, (_, truth)) in enumerate(zip(answers, some, strict=True)):
            if not isinstance(answer, Unanswered):
                judged.voice.extend([] if heard is None else [heard[row].tolist()])
                by_label = {each["label"]: each["probability"] for each in answer["probabilities"]}
                judged.probabilities.append([by_label[label] for label in places])
                judged.truths.append(places[truth])
    return judged


def _keyword_questions(heard: Sequence[Listened], seed: int) -> list[tuple[Listened, dict[str, bool]]]:
    """For each transcript a word that is said and one that is not, and which is; every other absent one looks like a
    said one."""
    random = np.random.default_rng(seed)
    spoken = [each for each in heard if each.example.lang == "en" and each.example.text and each.hearings]
    vocabulary = sorted({w for e in spoken for w in normalised(e.example.text or "").split() if len(w) > 2})
    asked = []
    for number, each in enumerate(spoken):
        said = normalised(each.example.text or "").split()
        present = str(random.choice([w for w in said if len(w) > 2] or said))
        absent = [w for w in (lookalikes(present, vocabulary) if number % 2 else vocabulary) if w not in said]
        truths = {present: True}
        if absent:
            truths[str(absent[0] if number % 2 else random.choice(absent))] = False
        asked.append((each, truths))
    return asked


def _speech(answer: Answer) -> float:
    """How probable speech is."""
    return float(sum(each["probability"] for each in answer["probabilities"] if each["label"] == "speech"))


def _closed(task: Task, hearings: Sequence[Hearing], model: Model) -> list[Answer]:
    """As a run has them, but uncalibrated."""
    answers = ask([task], hearings, _uncalibrated(task, model))[task.name]
    return [answer for answer in answers if not isinstance(answer, Unanswered)]


def _uncalibrated(task: Task, model: Model) -> Model:
    """The model, whose probabilities are those of the LLM's scores alone."""
    as_scored = Calibration(temperature=1.0, labels=list(task.label_names) if task.answer == "label" else [])
    return replace(model, calibration={task.definition: as_scored})
