"""Open answers: transcripts, free text, and answers under a grammar."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from svbatch.contract import contract_of
from svbatch.hear import Hearing, log_probs_of, text_logprob, timed_words
from svbatch.language.decoding import Decoded, Question, greedy
from svbatch.language.guide import Guide, guides
from svbatch.language.llm import Prefix
from svbatch.model import Model
from svbatch.speech.prefix_score import PrefixScorer
from svbatch.speech.readout import spoken_form
from svbatch.speech.recogniser import Transcript
from svbatch.tables.schemas import entry_names
from svbatch.tasks import prompts
from svbatch.tasks.answers import Answer
from svbatch.tasks.grammar import Said, grammar_of, parse_items, parse_number, parse_object, parse_pairs
from svbatch.tasks.task import Task, bare_task
from svbatch.timing import part

MAX_TOKENS = 400
# Weight of the read-out's voice in the LLM's transcripts, of sound alone and beside the recogniser's transcript; both
# were chosen on held-out recordings.
WEIGHT_ALONE, WEIGHT_BESIDE = 0.5, 0.15
# `asr: {via: both}`: below this mean log p of its tokens the recogniser is doubted, and the LLM's transcript is taken
# if the read-out finds it likelier, by this much a token, the surer the recogniser the more. Chosen on 328 held-out
# clips: WER of non-native speech 45.3 by the recogniser, 36.8 by the LLM, 35.2 so; of the rest 4.5, 7.4 and 4.6.
DOUBTED = -0.3
LIKELIER, SURER = 2.75, 2.5


@dataclass(frozen=True)
class Unanswered:
    """Why a task has no answer to one hearing: a short word, fit for grouping, and a line for a person."""

    code: str
    message: str


def open_answers(
    tasks: Sequence[Task], hearings: Sequence[Hearing], prefix: Prefix, model: Model
) -> dict[str, list[Answer | Unanswered]]:
    """A generated answer of each task to each of `hearings`, which the prefix has read, by the task's name. They are
    written in one batch, but for transcripts, which have drafts."""
    answers: dict[str, list[Answer | Unanswered]] = {}
    free = []
    for task in tasks:
        if task.definition == "asr" and task.is_library:
            answers[task.name] = list(_llm_transcripts(task, hearings, prefix, model))
        else:
            free.append(task)
    questions = [
        Question(
            prompts.question_ids(model.tokenizer, task.questions()[0]),
            max_tokens=task.max_tokens or MAX_TOKENS,
            guides=guides_of(task, model, count=prefix.batch_size),
        )
        for task in free
    ]
    with part("generation"):
        decoded = greedy(model.llm, prefix, questions, end_id=prompts.end_id(model.tokenizer))
    for task, question, own in zip(free, questions, decoded, strict=True):
        if question.guides is not None:
            answers[task.name] = [_typed_answer(task, one, model) for one in own]
        else:
            beside = _columns_beside(task, hearings, model)
            answers[task.name] = [_text_answer(one, model) | more for one, more in zip(own, beside, strict=True)]
    return answers


def _columns_beside(task: Task, hearings: Sequence[Hearing], model: Model) -> list[Answer]:
    """What stands in a text's row beside its type's columns: of a translation what the LLM wrote down before it."""
    if not (task.is_library and task.definition == "translation"):
        return [{}] * len(hearings)
    is_joint = model.recogniser is None
    return [{"transcript": hearing.text if is_joint else None} for hearing in hearings]


def guides_of(task: Task, model: Model, *, count: int) -> list[Guide] | None:
    """A guide for each of `count` answers of a task; None where any text is one. Raises TaskError for a grammar that
    cannot be followed."""
    grammar = grammar_of(task)
    if grammar is None:
        return None
    end_id = prompts.end_id(model.tokenizer)
    return guides(model.tokenizer, model.llm.vocab_size, end_id, grammar, count=count)


def with_transcripts(hearings: Sequence[Hearing], prefix: Prefix, model: Model) -> list[Hearing]:
    """The hearings with what the LLM writes of each: what a bundle without a recogniser reads beside the sound.

    `prefix` has read the sound. This is SpeechVerse's joint decoding: the transcript is written once, and every task
    that wants it goes on from there.
    """
    question = bare_task("asr", Path()).instructions[0]
    decoded = transcribe(hearings, prefix, question, MAX_TOKENS, model, readout_weight=WEIGHT_ALONE)
    return [
        replace(hearing, transcript=_as_transcript(one, model)) for hearing, one in zip(hearings, decoded, strict=True)
    ]


def _as_transcript(decoded: Decoded, model: Model) -> Transcript:
    assert decoded.finish_reason != "grammar", "a transcript has no grammar"
    return Transcript(
        text=prompts.answer_text(model.tokenizer, decoded.ids).strip(),
        ids=decoded.ids,
        sum_logprob=decoded.sum_logprob,
        finish_reason=decoded.finish_reason,
        no_speech_probability=None,
    )


def is_transcript(task: Task, model: Model) -> bool:
    """Whether the transcript that stands in the prefix is the answer."""
    is_asr = task.is_library and task.definition == "asr"
    return is_asr and (task.values["via"] == "recogniser" or model.recogniser is None)


def transcript_answer(hearing: Hearing, model: Model) -> Answer:
    """A hearing's transcript as an answer of `asr`."""
    transcript = hearing.transcript
    assert transcript is not None, "a span was not transcribed"
    return {
        "text": transcript.text,
        "words": _words(transcript.text, hearing, model),
        "num_tokens": transcript.num_tokens,
        "avg_logprob": transcript.avg_logprob,
        "finish_reason": transcript.finish_reason,
        "no_speech_probability": transcript.no_speech_probability,
        "via": "llm" if model.recogniser is None else "recogniser",
    }


def transcribe(
    hearings: Sequence[Hearing],
    prefix: Prefix,
    question: str,
    max_tokens: int,
    model: Model,
    *,
    readout_weight: float,
    drafts: bool = True,
) -> list[Decoded]:
    """The LLM's transcripts: each next token has the highest log p of the LLM + `readout_weight` · log p of the
    read-out's CTC. Drafts are the recogniser's text where there is one, else the read-out's tokens."""
    has_drafts = model.readout is not None or all(hearing.transcript for hearing in hearings)
    guesses = [_draft(hearing, model) for hearing in hearings] if drafts and has_drafts else None
    end_id = prompts.end_id(model.tokenizer)
    has_voters = bool(readout_weight) and model.readout is not None
    voters = [_Listener(hearing, model, end_id, readout_weight) for hearing in hearings] if has_voters else None
    asked = Question(
        prompts.question_ids(model.tokenizer, question), max_tokens=max_tokens, drafts=guesses, voters=voters
    )
    with part("generation"):
        [decoded] = greedy(model.llm, prefix, [asked], end_id=end_id)
    return decoded


class _Listener(PrefixScorer):
    """What the read-out of a hearing says of each next token, weighted."""

    def __init__(self, hearing: Hearing, model: Model, end_id: int, weight: float) -> None:
        assert model.readout is not None
        super().__init__(log_probs_of(hearing, model), model.readout, end_id)
        self._weight = weight

    def weigh(self, tokens: Sequence[int]) -> list[float]:
        return [self._weight * score for score in super().weigh(tokens)]


def _draft(hearing: Hearing, model: Model) -> list[int]:
    ids = model.tokenizer.encode(spoken_form(hearing.text), add_special_tokens=False).ids
    return [*(ids if hearing.transcript else hearing.read), prompts.end_id(model.tokenizer)]


def _llm_transcripts(task: Task, hearings: Sequence[Hearing], prefix: Prefix, model: Model) -> list[Answer]:
    """Of `via: llm` the LLM's, of `via: both` the recogniser's unless it is doubted and the LLM's is likelier."""
    is_choice = task.values["via"] == "both"
    rows = [row for row, hearing in enumerate(hearings) if not (is_choice and _is_trusted(hearing))]
    heard = [hearings[row] for row in rows]
    limit = task.max_tokens or MAX_TOKENS
    some = prefix if len(rows) == len(hearings) else prefix.select(torch.tensor(rows))
    question = task.questions()[0]
    decoded = transcribe(heard, some, question, limit, model, readout_weight=WEIGHT_BESIDE) if rows else []
    written: dict[int, Answer] = {}
    for row, hearing, one in zip(rows, heard, decoded, strict=True):
        said = _text_answer(one, model)
        if not is_choice or is_better(said["text"], hearing, model):
            no_speech = hearing.transcript.no_speech_probability if hearing.transcript else None
            words = _words(said["text"], hearing, model)
            written[row] = said | {"words": words, "no_speech_probability": no_speech, "via": "llm"}
    return [written.get(row) or transcript_answer(hearing, model) for row, hearing in enumerate(hearings)]


def _is_trusted(hearing: Hearing) -> bool:
    """Whether the recogniser's transcript stands, whatever the LLM might write."""
    return hearing.transcript is not None and hearing.transcript.avg_logprob >= DOUBTED


def is_better(other: str, hearing: Hearing, model: Model) -> bool:
    """Whether the LLM's transcript, the `other`, is taken instead of the recogniser's: the read-out finds it likelier
    by enough."""
    transcript = hearing.transcript
    if transcript is None or hearing.readings is None:
        return transcript is None
    gain = text_logprob(other, hearing, model) - text_logprob(transcript.text, hearing, model)
    return gain > (LIKELIER + SURER * transcript.avg_logprob) * max(1, transcript.num_tokens)


def _text_answer(decoded: Decoded, model: Model) -> Answer:
    return {
        "text": prompts.answer_text(model.tokenizer, decoded.ids).strip(),
        "num_tokens": len(decoded.ids),
        "avg_logprob": decoded.sum_logprob / max(1, len(decoded.ids) + (decoded.finish_reason == "stop")),
        "finish_reason": decoded.finish_reason,
    }


def _typed_answer(task: Task, decoded: Decoded, model: Model) -> Answer | Unanswered:
    """The answer that the grammar let be formed; cut short, it is none."""
    if decoded.finish_reason != "stop":
        code = {"length": "token_limit"}.get(decoded.finish_reason, decoded.finish_reason)
        limit = task.max_tokens or MAX_TOKENS
        return Unanswered(
            code, f"task {task.name}: the answer was not complete after {len(decoded.ids)} of {limit} tokens"
        )
    text = prompts.answer_text(model.tokenizer, decoded.ids)
    ends = [len(prompts.answer_text(model.tokenizer, decoded.ids[: n + 1])) for n in range(len(decoded.ids))]
    said = Said(text, ends, decoded.logprobs)
    if task.answer in ("number", "object"):
        value, score = parse_number(said) if task.answer == "number" else parse_object(said)
        return {"value" if task.answer == "number" else "object": value, "score": score}
    parse: Callable[[Said], Sequence[tuple[Any, ...]]] = parse_items if task.answer == "items" else parse_pairs
    column, fields = entry_names(contract_of(task))
    return {column: [dict(zip(fields, found, strict=True)) for found in parse(said)]}


def _words(text: str, hearing: Hearing, model: Model) -> list[Answer] | None:
    """The words of a text with their times; None where there is no read-out to align them to."""
    if model.readout is None:
        return None
    return [{"word": w.word, "start": w.start, "end": w.end} for w in timed_words(text, hearing, model)]
