"""How good a bundle is on recordings with known answers, each heard as a run hears it.

Transcripts are compared in spoken form: lower case, no punctuation, words spelled out as in `SPELLINGS`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jiwer
import numpy as np
import torch
from tqdm import tqdm

from svbatch.ask import Mode, ask, read
from svbatch.corpus.segment import speech_segments, windows
from svbatch.generate import WEIGHT_ALONE, WEIGHT_BESIDE, Answer, Unanswered, transcribe
from svbatch.hear import Hearing, Span, hear, spotted_words
from svbatch.model import Model
from svbatch.speech.readout import spoken_form
from svbatch.tasks import prompts
from svbatch.tasks.task import Task, load_task
from svbatch.training.data import Example, read_waveform
from svbatch.training.questions import lookalikes

log = logging.getLogger(__name__)
EXAMPLES_AT_ONCE = 8
MAX_TOKENS = 200
MODES: tuple[Mode, ...] = ("audio", "both")
WEIGHTS: dict[Mode, float] = {"audio": WEIGHT_ALONE, "both": WEIGHT_BESIDE}  # of the read-out's voice, as in a run
SPELLINGS = {"mr": "mister", "mrs": "missus", "dr": "doctor", "st": "saint", "ok": "okay"}


@dataclass(frozen=True)
class Evaluated:
    """One example with what was made of it: texts by system, the speech_activity answer of the window that is likeliest
    to hold speech, and its hearings that hold speech."""

    example: Example
    texts: dict[str, str]
    activity: Answer
    hearings: list[Hearing]


@dataclass(frozen=True)
class Asked:
    """One keyword question: what was answered, as the probability of yes, and what is true. `evidence` is the
    read-out's (svbatch.speech.spotting), None where it cannot write the word."""

    source: str
    word: str
    probability: float
    evidence: float | None
    in_recogniser: bool
    truth: bool


def evaluate(examples: Sequence[Example], model: Model, *, seed: int) -> dict[str, Any]:
    """Figures by task and source. `examples` without a text are judged by speech_activity and silence alone."""
    evaluated = list(heard_examples(examples, model, MODES))
    return {
        "asr": _word_error_rates(evaluated),
        "no_speech_files_without_text": _silent(evaluated),
        "speech_activity": _speech_activity(evaluated),
        "keyword_search": _keyword_search(asked_keywords(evaluated, model, seed)),
    }


def heard_examples(examples: Sequence[Example], model: Model, modes: Sequence[Mode]) -> Iterator[Evaluated]:
    """Every example heard; the LLM transcribes those in English in each of `modes`."""
    activity = load_task("speech_activity", Path())
    for start in tqdm(range(0, len(examples), EXAMPLES_AT_ONCE), desc="evaluate", disable=None):
        batch = examples[start : start + EXAMPLES_AT_ONCE]
        sounds = [read_waveform(example.path) for example in batch]
        segments = [(i, s) for i, sound in enumerate(sounds) for s in speech_segments(sound)]
        parts = [(i, s) for i, sound in enumerate(sounds) for s in windows(sound.size, speech_segments(sound))]
        with torch.inference_mode():
            heard = (
                hear([Span(sounds[i][s.start : s.end], s.start_s, True) for i, s in segments], model)
                if segments
                else []
            )
            spoken = [(i, h) for (i, _), h in zip(segments, heard, strict=True) if h.has_speech]
            texts = _texts([h for _, h in spoken], [_is_english(batch[i]) for i, _ in spoken], model, modes)
            in_parts = hear([Span(sounds[i][s.start : s.end], s.start_s, False) for i, s in parts], model)
            answers = _closed(activity, in_parts, model)
        for i, example in enumerate(batch):
            own = [j for j, (k, _) in enumerate(spoken) if k == i]
            judged = [answer for (k, _), answer in zip(parts, answers, strict=True) if k == i]
            yield Evaluated(
                example,
                {system: " ".join(said[j] for j in own) for system, said in texts.items()},
                max(judged, key=_speech),
                [spoken[j][1] for j in own],
            )


def _speech(answer: Answer) -> float:
    """How probable speech is."""
    return float(sum(each["probability"] for each in answer["probabilities"] if each["label"] == "speech"))


def _closed(task: Task, hearings: Sequence[Hearing], model: Model) -> list[Answer]:
    """As a run has them."""
    answers = ask([task], hearings, model)[task.name]
    return [answer for answer in answers if not isinstance(answer, Unanswered)]


def _is_english(example: Example) -> bool:
    return example.lang == "en" and bool(example.text)


def _texts(
    hearings: Sequence[Hearing], asked: Sequence[bool], model: Model, modes: Sequence[Mode]
) -> dict[str, list[str]]:
    """What each system wrote of each hearing; the LLM is asked only where `asked`, else its text is empty."""
    texts = {
        "recogniser": [h.text for h in hearings],
        "read_out": [model.tokenizer.decode(h.read) for h in hearings],
    }
    question = load_task("asr", Path()).questions()[0]
    chosen = [i for i, wish in enumerate(asked) if wish]
    some = [hearings[i] for i in chosen]
    for mode in modes:
        for name, weight in ((f"llm_{mode}", 0.0), (f"llm_{mode}_read_out", WEIGHTS[mode])):
            texts[name] = [""] * len(hearings)
            if some:
                prefix = read(some, mode, model)
                answers = transcribe(some, prefix, question, MAX_TOKENS, model, readout_weight=weight)
                for i, answer in zip(chosen, answers, strict=True):
                    texts[name][i] = prompts.answer_text(model.tokenizer, answer.ids)
    return texts


def normalised(text: str) -> str:
    """`text` in the form that is compared."""
    return " ".join(SPELLINGS.get(word, word) for word in spoken_form(text).split())


def _word_error_rates(evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """Per source of English speech: clips, and the word error rate in percent of each system."""
    groups: dict[str, list[Evaluated]] = {}
    for each in evaluated:
        if _is_english(each.example):
            groups.setdefault(each.example.source, []).append(each)
    return {
        source: {"clips": len(members)}
        | {
            system: round(
                100
                * jiwer.wer(
                    [normalised(m.example.text or "") for m in members],
                    [normalised(m.texts[system]) for m in members],
                ),
                2,
            )
            for system in members[0].texts
        }
        for source, members in sorted(groups.items())
    }


def _silent(evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    quiet = [each for each in evaluated if each.example.labels.get("speech") is False]
    without = sum(not each.texts["recogniser"] for each in quiet)
    speech = [each for each in evaluated if each.example.labels.get("speech") is True]
    lost = sum(not each.texts["recogniser"] for each in speech)
    return {
        "files": len(quiet),
        "without_text": without,
        "speech_files": len(speech),
        "speech_without_text": lost,
    }


def _speech_activity(evaluated: Sequence[Evaluated]) -> dict[str, Any]:
    """Unweighted average recall in percent, and each recall."""
    recalls = {}
    for label, speaks in (("speech", True), ("no_speech", False)):
        members = [each for each in evaluated if each.example.labels.get("speech") is speaks]
        recalls[label] = (
            100 * float(np.mean([each.activity["label"] == label for each in members])) if members else float("nan")
        )
    return {"unweighted_average_recall": round(float(np.mean(list(recalls.values()))), 2), **recalls}


def keyword_questions(evaluated: Sequence[Evaluated], seed: int) -> list[tuple[Evaluated, str, bool]]:
    """For each transcript a word that is said and one that is not; every other absent one looks like a said one."""
    random = np.random.default_rng(seed)
    spoken = [each for each in evaluated if each.example.lang == "en" and each.example.text and each.hearings]
    vocabulary = sorted({w for e in spoken for w in normalised(e.example.text or "").split() if len(w) > 2})
    asked = []
    for number, each in enumerate(spoken):
        said = normalised(each.example.text or "").split()
        present = str(random.choice([w for w in said if len(w) > 2] or said))
        absent = [w for w in (lookalikes(present, vocabulary) if number % 2 else vocabulary) if w not in said]
        asked.append((each, present, True))
        if absent:
            asked.append((each, str(absent[0] if number % 2 else random.choice(absent)), False))
    return asked


def asked_keywords(evaluated: Sequence[Evaluated], model: Model, seed: int) -> list[Asked]:
    asked = []
    for each, word, truth in tqdm(keyword_questions(evaluated, seed), desc="keyword_search", disable=None):
        task = load_task({"keyword_search": {"keywords": [word]}}, Path())
        with torch.inference_mode():
            found = _closed(task, each.hearings, model)
        probability = max(answer["keywords"][0]["probability"] for answer in found)
        spotted = [place for hearing in each.hearings for place in spotted_words([word], hearing, model)]
        evidence = max((place.evidence for place in spotted if place is not None), default=None)
        in_recogniser = word in normalised(each.texts["recogniser"]).split()
        asked.append(Asked(each.example.source, word, probability, evidence, in_recogniser, truth))
    return asked


def _keyword_search(asked: Sequence[Asked]) -> dict[str, Any]:
    """Accuracy in percent, whole and by source; `recogniser` is a search for the word in its transcript."""

    def accuracies(said: Callable[[Asked], bool]) -> dict[str, float]:
        groups = {"accuracy": list(asked)}
        for each in asked:
            groups.setdefault(each.source, []).append(each)
        return {
            name: round(100 * float(np.mean([said(a) == a.truth for a in group])), 2) for name, group in groups.items()
        }

    return {
        "questions": len(asked),
        "llm": accuracies(lambda a: a.probability >= 0.5),
        "recogniser": accuracies(lambda a: a.in_recogniser),
    }
