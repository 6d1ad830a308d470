import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import T5Config, T5ForConditionalGeneration

from svbatch.ask import ask, mode_of, read
from svbatch.bundle import Calibration
from svbatch.generate import WEIGHT_ALONE, is_better, transcribe
from svbatch.hear import Hearing, Span, hear, log_probs_of, spotted_words, text_logprob, timed_words
from svbatch.language.encoder_decoder import EncoderDecoder
from svbatch.language.llm import Prefix
from svbatch.score import heard_labels, written_words
from svbatch.speech.readout import spoken_form
from svbatch.speech.recogniser import Transcript
from svbatch.tasks import prompts
from svbatch.tasks.task import Task, load_task
from svbatch.timing import watching


@pytest.fixture(scope="module")
def hearings(bursts, tiny_model) -> list[Hearing]:
    with torch.inference_mode():
        return hear([Span(bursts(seconds, seed=7), 3.0, transcribed=True) for seconds in (1.0, 4.0)], tiny_model)


@pytest.fixture(autouse=True)
def _no_gradients():
    with torch.inference_mode():
        yield


def task(entry: object) -> Task:
    return load_task(entry, Path())


def test_what_a_task_hears_is_what_the_llm_is_given():
    keywords = task({"keyword_search": {"keywords": ["rain"]}})
    assert mode_of(keywords) == "both"
    assert mode_of(task("speech_activity")) == "audio"
    assert mode_of(keywords.model_copy(update={"hears": ("transcript",)})) == "text"


def test_the_prefix_holds_the_parts_of_its_mode(hearings, tiny_model):
    lengths = {mode: read(hearings, mode, tiny_model).lengths for mode in ("audio", "text", "both")}
    opening = len(prompts.opening_ids(tiny_model.tokenizer))
    for i, hearing in enumerate(hearings):
        said = len(prompts.transcript_ids(tiny_model.tokenizer, hearing.text))
        heard = len(hearing.speech)
        assert [int(lengths[m][i]) for m in lengths] == [opening + heard, opening + said, opening + heard + said]


def test_all_tasks_are_answered_in_the_order_of_what_was_heard(hearings, tiny_model):
    tasks = [task("asr"), task({"keyword_search": {"keywords": ["rain", "sun"]}}), task("speech_activity")]
    answers = ask(tasks, hearings, tiny_model)
    turned = ask(tasks, hearings[::-1], tiny_model)
    assert list(answers) == ["asr", "keyword_search", "speech_activity"]
    assert [row["text"] for row in answers["asr"]] == [hearing.transcript.text for hearing in hearings]
    for name in ("keyword_search", "speech_activity"):
        assert len(answers[name]) == 2
    for row, other in zip(answers["speech_activity"], turned["speech_activity"][::-1], strict=True):
        assert row["probability"] == pytest.approx(other["probability"], abs=1e-4)


def test_nothing_heard_is_answered_with_no_rows(tiny_model):
    assert ask([task("asr"), task("speech_activity")], [], tiny_model) == {"asr": [], "speech_activity": []}


@pytest.mark.parametrize("bias", [-1000.0, 1000.0])
def test_a_keyword_has_a_start_exactly_where_it_is_present(hearings, tiny_model, bias):
    heard = replace(hearings[1], transcript=Transcript("The rain, in Spain!", [], 0.0, "stop", 0.0))
    fitted = {"keyword_search": Calibration(temperature=1.0, bias=bias)}
    words = ["rain", "in spain", "train"]
    asked = [task({"keyword_search": {"keywords": words}})]
    [answer] = ask(asked, [heard], replace(tiny_model, calibration=fitted))["keyword_search"]
    for keyword in answer["keywords"]:
        assert keyword["present"] is (bias > 0)
        assert (keyword["start"] is not None) == keyword["present"]
        assert keyword["start"] is None or 3.0 <= keyword["start"] <= 7.0
    if bias > 0:
        timed = {spoken_form(w.word).strip(): w.start for w in timed_words(heard.text, heard, tiny_model)}
        assert [k["start"] for k in answer["keywords"][:2]] == [timed["rain"], timed["in"]]


def test_evidence_in_the_sound_and_in_the_transcript_counts_as_much_as_was_fitted(hearings, tiny_model):
    asked = task({"keyword_search": {"keywords": ["rain"]}})
    [[spotted]] = spotted_words(["rain"], [hearings[1]], tiny_model)
    told = replace(hearings[1].transcript, text="The rain!", ids=[1, 2], sum_logprob=3 * math.log(0.8))
    hearing = replace(hearings[1], transcript=told)
    words = ["rain", "THE RAIN", "the train", "rain the"]
    assert written_words(words, hearing) == pytest.approx([0.8, 0.8, -0.8, -0.8])

    def log_odds(asked: Task = asked, **fitted: float) -> float:
        calibration = {"keyword_search": Calibration(temperature=1.0, **fitted)}
        [answer] = ask([asked], [hearing], replace(tiny_model, calibration=calibration))["keyword_search"]
        probability = answer["keywords"][0]["probability"]
        return math.log(probability / (1 - probability))

    assert log_odds(spotting=0.1, bias=0.5) - log_odds() == pytest.approx(0.1 * spotted.evidence + 0.5, abs=1e-3)
    assert log_odds(written=2.0) - log_odds() == pytest.approx(1.6, abs=1e-3)
    alone = asked.model_copy(update={"hears": ("audio",)})
    assert log_odds(alone, written=2.0) == pytest.approx(log_odds(alone), abs=1e-6), "it does not hear the transcript"


def test_the_voice_counts_as_much_as_was_fitted(hearings, tiny_model):
    def log_probs(voice: float) -> list[float]:
        calibration = {"gender": Calibration(temperature=2.0, voice=voice)}
        [answer] = ask([task("gender")], hearings[1:], replace(tiny_model, calibration=calibration))["gender"]
        return [math.log(each["probability"]) for each in answer["probabilities"]]

    assert list(tiny_model.voiced) == ["emotion", "gender"]
    heard = hearings[1].voice[4:].tolist()
    [with_voice, without] = [log_probs(voice) for voice in (0.5, 0.0)]
    gained = [a - b for a, b in zip(with_voice, without, strict=True)]
    assert gained[1] - gained[0] == pytest.approx(0.5 * (heard[1] - heard[0]), abs=1e-3)


def test_an_answer_among_a_jobs_own_labels_is_calibrated_only_if_these_labels_were(hearings, tiny_model):
    names = ("book", "cancel")
    own = task({"intent": {"labels": [{"name": name, "description": "of our own"} for name in names]}})

    def is_calibrated(asked: Task, fitted: Calibration) -> bool:
        model = replace(tiny_model, calibration={"intent": fitted})
        return ask([asked], hearings[1:], model)["intent"][0]["calibrated"]

    assert is_calibrated(task("intent"), Calibration(temperature=2.0))
    assert not is_calibrated(own, Calibration(temperature=2.0))
    assert is_calibrated(own, Calibration(temperature=2.0, labels=list(names)))
    assert not is_calibrated(task("intent"), Calibration(temperature=2.0, labels=list(names)))


def test_what_the_llm_has_read_of_the_sound_serves_its_transcript_and_every_task(hearings, tiny_model):
    alone = replace(tiny_model, recogniser=None)
    heard = [replace(hearing, transcript=None) for hearing in hearings]
    with watching() as once:
        read(heard, "audio", alone)
    with watching() as spent:
        answers = ask([task("asr"), task("emotion")], heard, alone)
    assert [answer["via"] for answer in answers["asr"]] == ["llm", "llm"]
    assert spent["prefill"].operations == once["prefill"].operations


def test_labels_of_a_jobs_own_are_not_those_that_the_voice_was_read_for(hearings, tiny_model):
    own = task("gender").model_copy(update={"definition": "emotion"})
    assert heard_labels(task("gender"), hearings, tiny_model).shape == (len(hearings), 2)
    assert heard_labels(own, hearings, tiny_model) is None
    assert heard_labels(task("accent"), hearings, tiny_model) is None


def test_a_draft_changes_no_word_of_the_llms_transcript(hearings, tiny_model):
    def prefix() -> Prefix:
        return read(hearings, "both", tiny_model)

    plain = transcribe(hearings, prefix(), "Write it down.", 24, tiny_model, readout_weight=0.5, drafts=False)
    drafted = transcribe(hearings, prefix(), "Write it down.", 24, tiny_model, readout_weight=0.5)
    assert [(d.ids, d.finish_reason) for d in drafted] == [(d.ids, d.finish_reason) for d in plain]
    assert [d.sum_logprob for d in drafted] == pytest.approx([d.sum_logprob for d in plain], abs=1e-3)


def test_asr_can_be_asked_of_the_llm(hearings, tiny_model):
    wanted = task({"asr": {"via": "llm"}}).model_copy(update={"max_tokens": 16})
    for row in ask([wanted], hearings, tiny_model)["asr"]:
        assert row["via"] == "llm"
        assert row["num_tokens"] <= 16
        assert row["avg_logprob"] <= 0
        assert [word["word"] for word in row["words"]] == row["text"].split()


def test_of_both_the_recognisers_transcript_stands_where_it_is_sure(hearings, tiny_model):
    llm, both = (task({"asr": {"via": via}}).model_copy(update={"max_tokens": 8}) for via in ("llm", "both"))
    transcript = replace(hearings[1].transcript, text="to town", ids=[1, 2])
    sure, lost = (replace(hearings[1], transcript=replace(transcript, sum_logprob=x)) for x in (-0.3, -900.0))
    kept, taken = ask([both], [sure, lost], tiny_model)["asr"]
    assert (kept["text"], kept["via"]) == ("to town", "recogniser")
    [written] = ask([llm], [lost], tiny_model)["asr"]
    assert (taken["text"], taken["via"]) == (written["text"], "llm")


def test_an_unsure_transcript_is_left_for_another_if_the_sound_is_more_like_that(hearings, tiny_model):
    def unsure(text: str, avg_logprob: float) -> Hearing:
        return replace(hearings[1], transcript=Transcript(text, [1, 2], 3 * avg_logprob, "stop", 0.0))

    assert not is_better("to town", unsure("to town", -0.5), tiny_model)
    assert is_better("to town", unsure("to town", -2.0), tiny_model)
    assert is_better("to town", unsure("ab " * 99, -0.5), tiny_model), "no sound of 4 s can be so long a text"
    assert not is_better("ab " * 99, unsure("to town", -2.0), tiny_model)


def test_nothing_said_is_as_likely_as_nothing_but_blanks(hearings, tiny_model):
    blanks = log_probs_of(hearings[1], tiny_model)[:, 0].sum()
    assert text_logprob("", hearings[1], tiny_model) == pytest.approx(float(blanks), rel=1e-5)


def test_without_a_recogniser_the_llm_writes_the_transcript_once_and_all_tasks_go_on_from_it(hearings, tiny_model):
    alone = replace(tiny_model, recogniser=None)
    heard = [replace(hearing, transcript=None) for hearing in hearings]
    keywords = task({"keyword_search": {"keywords": ["rain"]}})
    answers = ask([task("asr"), keywords], heard, alone)
    written = transcribe(
        heard, read(heard, "audio", alone), task("asr").questions()[0], 400, alone, readout_weight=WEIGHT_ALONE
    )
    texts = [prompts.answer_text(alone.tokenizer, one.ids).strip() for one in written]
    assert [(row["text"], row["via"]) for row in answers["asr"]] == [(text, "llm") for text in texts]
    assert all(row["no_speech_probability"] is None for row in answers["asr"])
    given = [
        replace(hearing, transcript=Transcript(text, one.ids, one.sum_logprob, one.finish_reason, None))
        for hearing, text, one in zip(heard, texts, written, strict=True)
    ]
    [first, _] = answers["keyword_search"]
    [judged, _] = ask([keywords], given, tiny_model)["keyword_search"]
    assert first["keywords"][0]["probability"] == pytest.approx(judged["keywords"][0]["probability"], abs=1e-4)


def test_a_keyword_without_a_letter_is_answered_uncalibrated_and_has_no_place(hearings, tiny_model):
    fitted = {"keyword_search": Calibration(temperature=1.0, bias=1000.0)}
    heard = [replace(hearing, transcript=Transcript("", [], 0.0, "stop", 0.0)) for hearing in hearings]
    asked = [task({"keyword_search": {"keywords": ["%"]}})]
    for row in ask(asked, heard, replace(tiny_model, calibration=fitted))["keyword_search"]:
        assert row["keywords"][0]["start"] is None
        assert not row["calibrated"]


def test_an_encoder_decoder_llm_answers_every_kind_of_task(hearings, tiny_model):
    """The same interface: [sound][transcript][instruction] is encoded for each task."""
    torch.manual_seed(1)
    config = T5Config(
        vocab_size=tiny_model.llm.vocab_size,
        d_model=tiny_model.llm.width,
        d_kv=16,
        d_ff=64,
        num_layers=2,
        num_heads=4,
        initializer_factor=0.5,
        decoder_start_token_id=0,
    )
    model = replace(tiny_model, llm=EncoderDecoder(T5ForConditionalGeneration(config)))
    keywords = task({"keywords": {}}).model_copy(update={"max_tokens": 40})
    translation = task("translation").model_copy(update={"max_tokens": 8})
    asr = task({"asr": {"via": "llm"}}).model_copy(update={"max_tokens": 8})
    tasks = [task("speech_activity"), task("emotion"), task({"keyword_search": {"keywords": ["rain"]}}), asr]
    tasks += [keywords, translation]
    together = ask(tasks, hearings, model)
    alone = [ask(tasks, [hearing], model) for hearing in hearings]
    for asked in tasks:
        assert len(together[asked.name]) == len(hearings)
        for one, other in zip(together[asked.name], [answers[asked.name][0] for answers in alone], strict=True):
            assert type(one) is type(other)
    for name in ("speech_activity", "emotion"):
        for one, other in zip(together[name], [answers[name][0] for answers in alone], strict=True):
            assert one["probability"] == pytest.approx(other["probability"], abs=1e-4)
