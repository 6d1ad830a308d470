"""One answer of a whole recording from those of its segments."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from svbatch.tasks.answers import Answer, label_answers, yes_no_answers
from svbatch.tasks.task import Task


def combined(task: Task, answers: Sequence[Answer], lengths: Sequence[float]) -> Answer:
    """The answer of a recording whose segments, in time order and of such lengths, have `answers`.

    label: probabilities are averaged over time. yes_no, labels: by the task's `combine`, `any` (the default) takes the
    segment that says yes most, `mean` averages over time. items and pairs: all that differ, each with its highest
    score. text: joined by spaces, a transcript's words one after the other. At least one answer, of these types.
    """
    match task.answer:
        case "label":
            return _label(task, answers, lengths)
        case "yes_no" | "labels":
            return _yes_or_no(task, answers, lengths)
        case "text":
            return _text(answers)
        case _:
            return _union(answers)


def _label(task: Task, answers: Sequence[Answer], lengths: Sequence[float]) -> Answer:
    each = np.array([[p["probability"] for p in answer["probabilities"]] for answer in answers])
    mean = np.average(each, axis=0, weights=lengths)
    [answer] = label_answers(_log(mean[None]), task.label_names, min_probability=task.min_probability)
    return answer | {"calibrated": all(a["calibrated"] for a in answers)}


def _yes_or_no(task: Task, answers: Sequence[Answer], lengths: Sequence[float]) -> Answer:
    calibrated = {"calibrated": all(answer["calibrated"] for answer in answers)}
    if not task.entries:
        return _one_yes_or_no(task, answers, lengths) | calibrated
    [column] = [name for name, value in answers[0].items() if isinstance(value, list)]
    entries = []
    for of_entry in zip(*(answer[column] for answer in answers), strict=True):
        found = _one_yes_or_no(task, of_entry, lengths)
        surest = max(of_entry, key=lambda entry: entry["probability"])
        start = {"start": surest["start"] if found["answer"] else None} if "start" in surest else {}
        entries.append({**surest, "present": found["answer"], "probability": found["probability"], **start})
    return {column: entries} | calibrated


def _one_yes_or_no(task: Task, answers: Sequence[Mapping[str, Any]], lengths: Sequence[float]) -> Answer:
    each = [answer["probability"] for answer in answers]
    yes = float(np.average(each, weights=lengths)) if task.combine == "mean" else max(each)
    [answer] = yes_no_answers(_log(np.array([[yes, 1 - yes]])), min_probability=task.min_probability)
    return answer


def _text(answers: Sequence[Answer]) -> Answer:
    num_tokens = sum(answer["num_tokens"] for answer in answers)
    weights = [max(1, answer["num_tokens"] + (answer["finish_reason"] == "stop")) for answer in answers]
    cut = [answer["finish_reason"] for answer in answers if answer["finish_reason"] != "stop"]
    return (
        _of_transcripts(answers)
        | _of_translations(answers)
        | {
            "text": " ".join(answer["text"] for answer in answers if answer["text"]),
            "num_tokens": num_tokens,
            "avg_logprob": float(np.average([answer["avg_logprob"] for answer in answers], weights=weights)),
            "finish_reason": cut[0] if cut else "stop",
        }
    )


def _of_transcripts(answers: Sequence[Answer]) -> Answer:
    """The columns that transcripts have beside those of any text; none for other texts. A recording is as silent as
    the segment that is most surely speech."""
    if "words" not in answers[0]:
        return {}
    silent = [answer["no_speech_probability"] for answer in answers]
    return {
        "words": [word for answer in answers for word in answer["words"] or ()],
        "no_speech_probability": min((each for each in silent if each is not None), default=None),
        "via": answers[0]["via"] if len({answer["via"] for answer in answers}) == 1 else "both",
    }


def _of_translations(answers: Sequence[Answer]) -> Answer:
    """The column that translations have beside those of any text; none for other texts."""
    if "transcript" not in answers[0]:
        return {}
    return {"transcript": " ".join(answer["transcript"] for answer in answers if answer["transcript"]) or None}


def _union(answers: Sequence[Answer]) -> Answer:
    [column] = answers[0]
    best: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in (entry for answer in answers for entry in answer[column]):
        key = tuple(value for value in entry.values() if isinstance(value, str))
        if key not in best or best[key]["score"] < entry["score"]:
            best[key] = entry
    return {column: list(best.values())}


def _log(probabilities: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(probabilities))
