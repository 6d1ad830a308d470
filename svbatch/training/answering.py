"""The recordings of tests heard once each, and asked everything, as a run asks; in several modes side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch

from svbatch.annotate import detector_of
from svbatch.ask import Mode as Heard
from svbatch.ask import ask, read
from svbatch.contract import contract_of
from svbatch.corpus.segment import Segment, speech_segments, windows
from svbatch.generate import MAX_TOKENS, WEIGHT_ALONE, Unanswered, transcribe, with_transcripts
from svbatch.hear import Hearing, Span, hear
from svbatch.model import Model
from svbatch.tables.schemas import entry_names
from svbatch.tasks import prompts
from svbatch.tasks.answers import Answer
from svbatch.tasks.combine import combined
from svbatch.tasks.task import Task
from svbatch.training.benchmark import Benchmark, Item
from svbatch.training.normaliser import normalised
from svbatch.training.progress import with_progress

Mode = Literal["audio", "text", "both", "both-no-speech", "both-no-transcript", "joint", "generated"]
MODES: tuple[Mode, ...] = get_args(Mode)
RECORDINGS_AT_ONCE = 16


@dataclass(frozen=True)
class Answered:
    """What one system said of one recording of a test. `wording` counts the task's wordings: 0 is the default, the
    held-out ones follow. `said` is plain (svbatch.training.metrics), None where there is no answer; of closed answers
    `confidences` are the probabilities of what is said, and `right` whether it is true."""

    test: str
    system: str
    wording: int
    item: int
    said: Any
    confidences: tuple[float, ...] = ()
    right: tuple[bool, ...] = ()


@dataclass(frozen=True)
class Batch:
    """Some recordings heard: `places` are the recording and the span of each of `hearings`; `questions` are the items
    of each test among them, by their number."""

    places: Sequence[tuple[str, Segment, bool]]
    hearings: Sequence[Hearing]
    waveforms: Mapping[str, Any]
    questions: Sequence[tuple[Benchmark, Sequence[int]]]

    def rows(self, task: Task, recording: str) -> list[int]:
        """The hearings of a recording that a task is about, as in a run."""
        return [
            row
            for row, (name, _, is_segment) in enumerate(self.places)
            if name == recording
            and (is_segment or task.scope == "window")
            and (self.hearings[row].has_speech or not task.needs_speech)
        ]


def heard_batches(tests: Sequence[Benchmark], model: Model) -> Iterator[Batch]:
    """Every recording of `tests` heard once, RECORDINGS_AT_ONCE together, whatever number of tests it belongs to."""
    recordings: dict[str, Item] = {}
    for test in tests:
        recordings |= {item.recording: item for item in test.items}
    windowed = {item.recording for test in tests if test.task.scope == "window" for item in test.items}
    spoken = {item.recording for test in tests if test.task.scope != "window" for item in test.items}
    names = list(recordings)
    for start in with_progress(range(0, len(names), RECORDINGS_AT_ONCE), "evaluate"):
        some = names[start : start + RECORDINGS_AT_ONCE]
        waveforms = {name: recordings[name].load() for name in some}
        places = []
        for name, waveform in waveforms.items():
            segments = speech_segments(waveform, detector_of(model))
            spans = windows(waveform.size, segments) if name in windowed else segments
            places += [(name, span, span in segments) for span in spans]
        spans_heard = [
            Span(waveforms[name][span.start : span.end], span.start_s, is_segment and name in spoken)
            for name, span, is_segment in places
        ]
        with torch.inference_mode():
            hearings = hear(spans_heard, model) if spans_heard else []
        numbered = [(test, [i for i, item in enumerate(test.items) if item.recording in waveforms]) for test in tests]
        yield Batch(places, hearings, waveforms, [(test, items) for test, items in numbered if items])


def mode_answers(batch: Batch, mode: Mode, model: Model, *, wordings: bool) -> Iterator[Answered]:
    """What the LLM answers in one mode; with `wordings`, to every held-out wording too.

    *both* is as in a run: all that the task hears, which may be the sound alone; its calibration holds for the other
    modes as far as they hear the sound. A test that a mode cannot be asked of has no answers.
    """
    tasks: list[Task] = []
    asked: list[tuple[Benchmark, int, list[int]]] = []
    for test, items in batch.questions:
        changed = in_mode(test.task, mode)
        if changed is None:
            continue
        for wording, words in enumerate([None, *(test.task.held_out if wordings else ())]):
            groups = [[item] for item in items] if isinstance(test.items[0].truth, Mapping) else [list(items)]
            for group in groups:
                task = _named(test.task_of(test.items[group[0]]), f"question{len(tasks)}", changed, words)
                tasks.append(task)
                asked.append((test, wording, group))
    told = _told(batch.hearings, mode, model)
    about = {
        task.name: sorted(row for item in group for row in batch.rows(test.task, test.items[item].recording))
        for task, (test, _, group) in zip(tasks, asked, strict=True)
    }
    with torch.inference_mode():
        found = _asked(tasks, told, model, about)
    for task, (test, wording, group) in zip(tasks, asked, strict=True):
        by_row = dict(zip(about[task.name], found[task.name], strict=True))
        for item in group:
            rows = [row for row in batch.rows(test.task, test.items[item].recording) if row in by_row]
            parts = [(by_row[row], batch.places[row][1].num_samples) for row in rows]
            answer = of_recording(task, [(a, n) for a, n in parts if not isinstance(a, Unanswered)])
            yield answered(test, mode, wording, item, task, answer)


def in_mode(task: Task, mode: Mode) -> Task | None:
    """The task as it is asked in a mode; None where it cannot be, or where that would be another mode again."""
    hears_both = len(task.hears) > 1
    match mode:
        case "audio":
            return task.model_copy(update={"hears": ("audio",)})
        case "text":
            is_possible = task.scope != "window"
            return task.model_copy(update={"hears": ("transcript",), "spotting": False}) if is_possible else None
        case "both":
            return task
        case "generated":
            is_possible = task.answer == "label" and task.scope != "window"
            return task.model_copy(update={"answer": "text"}) if is_possible else None
        case _:
            return task if hears_both else None


def answered(test: Benchmark, system: str, wording: int, item: int, task: Task, answer: Answer | None) -> Answered:
    """An answer in plain values, judged where it is a closed one."""
    truth = test.items[item].truth
    said: Any = None
    confidences: tuple[float, ...] = ()
    right: tuple[bool, ...]
    if system == "generated":
        text = normalised(answer["text"]) if answer else ""
        said, right = next((label for label in task.label_names if normalised(label) == text), None), ()
    elif answer is not None and task.answer == "label":
        said, confidences = answer["label"], (answer["probability"],)
        right = (said == truth,)
    elif answer is not None and task.is_closed and task.entries:
        column, (entry, *_) = entry_names(contract_of(task))
        said = {each[entry]: each["present"] for each in answer[column]}
        confidences = tuple(max(each["probability"], 1 - each["probability"]) for each in answer[column])
        right = tuple(said[name] == truth.get(name) for name in said)
    elif answer is not None and task.answer == "yes_no":
        said, confidences = answer["answer"], (max(answer["probability"], 1 - answer["probability"]),)
        right = (said == truth,)
    else:
        said, right = _open(task, answer), ()
    return Answered(test.name, system, wording, item, said, confidences, right)


def of_recording(task: Task, parts: Sequence[tuple[Answer, int]]) -> Answer | None:
    """One answer from those of a recording's spans with their lengths; None from none. Of speech_activity it is that
    of the window which is likeliest to hold speech."""
    answers = [answer for answer, _ in parts]
    if len(answers) < 2:
        return answers[0] if answers else None
    if task.definition == "speech_activity":
        return max(answers, key=lambda a: next(p["probability"] for p in a["probabilities"] if p["label"] == "speech"))
    return combined(task, answers, [length for _, length in parts])


def _named(task: Task, name: str, changed: Task, wording: str | None) -> Task:
    kept = ("hears", "spotting", "answer")
    update: dict[str, Any] = {"name": name} | {key: getattr(changed, key) for key in kept}
    if wording is not None:
        update["instructions"] = (wording,)
    return task.model_copy(update=update)


def _told(hearings: Sequence[Hearing], mode: Mode, model: Model) -> list[Hearing]:
    """The hearings as a mode has them: without a part, or with the LLM's own transcript."""
    match mode:
        case "both-no-speech":
            return [replace(hearing, speech=hearing.speech[:0], voice=None) for hearing in hearings]
        case "both-no-transcript":
            return [replace(hearing, transcript=None) for hearing in hearings]
        case "joint":
            return _written(hearings, model)
        case _:
            return list(hearings)


def _written(hearings: Sequence[Hearing], model: Model) -> list[Hearing]:
    """With what the LLM writes of the sound, where the recogniser found anything said."""
    spoken = [row for row, hearing in enumerate(hearings) if hearing.text]
    some = [replace(hearings[row], transcript=None) for row in spoken]
    with torch.inference_mode():
        written = with_transcripts(some, read(some, "audio", model), model) if some else []
    told = dict(zip(spoken, written, strict=True))
    return [told.get(row, hearing) for row, hearing in enumerate(hearings)]


def _asked(
    tasks: Sequence[Task], hearings: Sequence[Hearing], model: Model, about: Mapping[str, Sequence[int]]
) -> dict[str, list[Answer | Unanswered]]:
    """As `ask`, but transcripts are the LLM's, or where sound and transcript are heard those of `via: both`."""
    texts = [task for task in tasks if task.definition == "asr" and task.is_library]
    alone = [task for task in texts if len(task.hears) == 1]
    via_both = [
        task.model_copy(update={"values": task.values | {"via": "both"}}) for task in texts if task not in alone
    ]
    found = ask([*(task for task in tasks if task not in texts), *via_both], hearings, model, about)
    for task in alone:
        some = [hearings[row] for row in about[task.name]]
        found[task.name] = list(_transcripts(task, some, model)) if some else []
    return found


def _transcripts(task: Task, hearings: Sequence[Hearing], model: Model) -> Iterator[Answer]:
    """The LLM's, of the sound alone or of the recogniser's text alone."""
    [sense] = task.hears
    mode: Heard = "audio" if sense == "audio" else "text"
    weight = WEIGHT_ALONE if mode == "audio" else 0.0
    prefix = read(hearings, mode, model)
    decoded = transcribe(hearings, prefix, task.questions()[0], MAX_TOKENS, model, readout_weight=weight)
    for one in decoded:
        text = prompts.answer_text(model.tokenizer, one.ids).strip()
        yield {"text": text, "num_tokens": len(one.ids), "avg_logprob": 0.0, "finish_reason": one.finish_reason}


def _open(task: Task, answer: Answer | None) -> Any:
    if answer is None:
        return None
    match task.answer:
        case "items" | "pairs":
            column, fields = entry_names(contract_of(task))
            values = [[each[name] for name in fields[: 1 if task.answer == "items" else 2]] for each in answer[column]]
            return [value[0] if task.answer == "items" else tuple(value) for value in values]
        case "text":
            return answer["text"]
        case _:
            return answer.get("value", answer.get("object"))
