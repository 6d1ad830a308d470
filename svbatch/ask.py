"""Questions about spans that were heard: what was heard is read by the LLM once, every question goes on from there."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svbatch.bundle import Calibration
from svbatch.hear import Hearing, spotted_words, timed_words
from svbatch.language.decoding import Decoded, greedy
from svbatch.language.prefix import Prefix, prefill
from svbatch.language.scoring import score_many
from svbatch.model import Model
from svbatch.speech.alignment import Word
from svbatch.speech.readout import spoken_form
from svbatch.speech.spotting import Spotted
from svbatch.tasks import prompts
from svbatch.tasks.answers import label_answers, yes_no_answers
from svbatch.tasks.task import Task

Mode = Literal["audio", "text", "both"]
Answer = dict[str, Any]  # the columns beside the common ones


def ask(tasks: Sequence[Task], hearings: Sequence[Hearing], model: Model) -> dict[str, list[Answer]]:
    """Each task's answers to `hearings`, by the task's name and in their order."""
    answers: dict[str, list[Answer]] = {task.name: [] for task in tasks}
    if not hearings:
        return answers
    for mode in ("audio", "text", "both"):
        asked = [task for task in tasks if mode_of(task) == mode and not _by_recogniser(task, model)]
        if asked:
            prefix = read(hearings, mode, model)
            answers |= closed_answers([task for task in asked if task.is_closed], hearings, prefix, model)
            answers |= {t.name: _llm_transcripts(t, hearings, prefix, model) for t in asked if not t.is_closed}
    for task in tasks:
        if _by_recogniser(task, model):
            answers[task.name] = [_recogniser_transcript(hearing, model) for hearing in hearings]
        elif task.spotting:
            answers[task.name] = [
                _with_starts(answer, hearing, model)
                for answer, hearing in zip(answers[task.name], hearings, strict=True)
            ]
    return answers


def mode_of(task: Task) -> Mode:
    """What the LLM is given for a task."""
    heard = set(task.hears)
    if heard == {"audio"}:
        return "audio"
    return "text" if heard == {"transcript"} else "both"


def read(hearings: Sequence[Hearing], mode: Mode, model: Model) -> Prefix:
    """The shared prefix: [opening][speech embeddings][transcript], the parts that `mode` has."""
    opening = model.llm.embed(torch.tensor(prompts.opening_ids(model.tokenizer)))
    inputs: list[Tensor] = []
    for hearing in hearings:
        parts = [opening]
        if mode != "text":
            parts.append(hearing.speech.to(opening))
        if mode != "audio" and model.recogniser is not None:
            parts.append(model.llm.embed(torch.tensor(prompts.transcript_ids(model.tokenizer, hearing.text))))
        inputs.append(torch.cat(parts))
    return prefill(model.llm, inputs)


def closed_answers(
    tasks: Sequence[Task], hearings: Sequence[Hearing], prefix: Prefix, model: Model
) -> dict[str, list[Answer]]:
    """Answers of closed tasks: every label of every question is scored, all questions packed together."""
    questions = [
        (
            prompts.question_ids(model.tokenizer, question),
            [prompts.answer_ids(model.tokenizer, label) for label in task.label_names],
        )
        for task in tasks
        for question in task.questions()
    ]
    scores = iter(score_many(model.llm, prefix, questions) if questions else [])
    answers: dict[str, list[Answer]] = {}
    for task in tasks:
        own = [next(scores).numpy() for _ in task.questions()]
        if task.answer == "label":
            fitted = model.calibration.get(task.definition)
            answers[task.name] = label_answers(
                own[0],
                task.label_names,
                temperature=fitted.temperature if fitted else None,
                min_probability=task.min_probability,
            )
        else:
            answers[task.name] = _entry_answers(task, own, hearings, model)
    return answers


def _entry_answers(
    task: Task, scores: Sequence[NDArray[np.float32]], hearings: Sequence[Hearing], model: Model
) -> list[Answer]:
    """Yes or no to each of a task's entries, given (B, 2) scores of each."""
    fitted = model.calibration.get(task.definition)
    spotted = [
        spotted_words(task.entries, hearing, model) if task.spotting else [None] * len(task.entries)
        for hearing in hearings
    ]
    columns = [
        yes_no_answers(
            own,
            evidence=[_evidence(row[i], fitted) for row in spotted],
            temperature=fitted.temperature if fitted else None,
            min_probability=task.min_probability,
        )
        for i, own in enumerate(scores)
    ]
    return [
        {
            "keywords": [
                {"keyword": entry, "present": a["present"], "probability": a["probability"], "start": _place(a, found)}
                for entry, a, found in zip(task.entries, row, places, strict=True)
            ],
            "calibrated": fitted is not None,
        }
        for row, places in zip(zip(*columns, strict=True), spotted, strict=True)
    ]


def _evidence(spotted: Spotted | None, fitted: Calibration | None) -> float:
    """What a spotted word adds to the log-odds of yes; nothing where its weight was not fitted."""
    if spotted is None or fitted is None:
        return 0.0
    return fitted.bias + fitted.spotting * spotted.evidence


def _place(answer: Answer, spotted: Spotted | None) -> float | None:
    return spotted.start if answer["present"] and spotted is not None else None


def transcribe(
    hearings: Sequence[Hearing],
    prefix: Prefix,
    question: str,
    max_tokens: int,
    model: Model,
    *,
    drafts: bool = True,
) -> list[Decoded]:
    """The LLM's own transcripts; drafts are the recogniser's text where there is one, else the read-out's tokens."""
    guesses = [_draft(hearing, model) for hearing in hearings] if drafts else None
    return greedy(
        model.llm,
        prefix,
        prompts.question_ids(model.tokenizer, question),
        end_id=prompts.end_id(model.tokenizer),
        max_tokens=max_tokens,
        drafts=guesses,
    )


def _draft(hearing: Hearing, model: Model) -> list[int]:
    text = spoken_form(hearing.text) if hearing.transcript else model.tokenizer.decode(hearing.read)
    return prompts.answer_ids(model.tokenizer, text.strip())


def _llm_transcripts(task: Task, hearings: Sequence[Hearing], prefix: Prefix, model: Model) -> list[Answer]:
    decoded = transcribe(hearings, prefix, task.questions()[0], task.max_tokens or 400, model)
    answers = []
    for hearing, answer in zip(hearings, decoded, strict=True):
        text = prompts.answer_text(model.tokenizer, answer.ids).strip()
        answers.append(
            {
                "text": text,
                "words": _words(timed_words(text, hearing, model)),
                "num_tokens": len(answer.ids),
                "avg_logprob": answer.sum_logprob / max(1, len(answer.ids) + (answer.finish_reason == "stop")),
                "finish_reason": answer.finish_reason,
                "no_speech_probability": hearing.transcript.no_speech_probability if hearing.transcript else None,
                "via": "llm",
            }
        )
    return answers


def _recogniser_transcript(hearing: Hearing, model: Model) -> Answer:
    transcript = hearing.transcript
    assert transcript is not None, "a span asked of the recogniser was not transcribed"
    return {
        "text": transcript.text,
        "words": _words(timed_words(transcript.text, hearing, model)),
        "num_tokens": transcript.num_tokens,
        "avg_logprob": transcript.avg_logprob,
        "finish_reason": transcript.finish_reason,
        "no_speech_probability": transcript.no_speech_probability,
        "via": "recogniser",
    }


def _by_recogniser(task: Task, model: Model) -> bool:
    return task.answer == "text" and task.values.get("via") == "recogniser" and model.recogniser is not None


def _words(words: Sequence[Word]) -> list[Answer]:
    return [{"word": w.word, "start": w.start, "end": w.end} for w in words]


def _with_starts(answer: Answer, hearing: Hearing, model: Model) -> Answer:
    """The answer with the time in the transcript of each keyword that is present and stands there."""
    if not any(keyword["present"] for keyword in answer["keywords"]):
        return answer
    words = timed_words(hearing.text, hearing, model)
    spoken = [spoken_form(word.word).strip() for word in words]
    keywords = [
        k | {"start": _start(k["keyword"], spoken, words, k["start"])} if k["present"] else k
        for k in answer["keywords"]
    ]
    return answer | {"keywords": keywords}


def _start(keyword: str, spoken: Sequence[str], words: Sequence[Word], otherwise: float | None) -> float | None:
    wanted = spoken_form(keyword).split()
    for i in range(len(spoken) - len(wanted) + 1):
        if list(spoken[i : i + len(wanted)]) == wanted:
            return words[i].start
    return otherwise
