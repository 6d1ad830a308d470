import re
from dataclasses import replace
from pathlib import Path

import pytest

from svbatch.errors import TrainingError
from svbatch.training.checkpoints import Schedule
from svbatch.training.data import Example
from svbatch.training.frames import Clip, Listener, LiveClip
from svbatch.training.known import known_answers, learnable_answers
from svbatch.training.questions import Question, Questioner, lookalikes
from svbatch.training.recipe import LanguageStage

TEXTS = [
    "The train leaves the station in the rain.",
    "Please bring me a plain brown envelope",
    "Don't refund the invoice before Monday!",
    "A doctor and a lawyer walk into a bar",
    "I would like to train for the race",
]


def stage(**changes: object) -> LanguageStage:
    settings = {
        "name": "tasks",
        "tokens_per_batch": 600,
        "ctc_weight": 0.3,
        "questions": {"keyword_search": 5.0},
        "modes": {"audio": 0.5, "both": 0.5},
        "schedule": Schedule(steps=1, learning_rate={}),
    }
    return LanguageStage.model_validate(settings | changes)


@pytest.fixture(scope="module")
def examples() -> list[Example]:
    spoken = [Example(Path(f"{i}.wav"), text=text, lang="en", labels={"speech": True}) for i, text in enumerate(TEXTS)]
    return [*spoken, *(Example(Path(f"noise{i}.wav"), labels={"speech": False}) for i in range(5))]


@pytest.fixture(scope="module")
def clips(examples) -> list[Clip]:
    return [Clip(i, Path("shard.npy"), 0, 100 + 10 * i) for i in range(len(examples))]


def questioner(examples: list[Example], clips: list[Clip], **changes: object) -> Questioner:
    return Questioner(examples, clips, {i: text.upper() for i, text in enumerate(TEXTS)}, stage(**changes))


def drawn(asker: Questioner, steps: int) -> list[Question]:
    return [question for step in range(steps) for question in asker.draw(step, seed=0)]


def test_keyword_answers_are_true_and_each_about_half(examples, clips):
    answers = []
    for question in drawn(questioner(examples, clips), 30):
        for instruction, answer, is_closed in question.pairs:
            assert is_closed
            [keyword] = re.findall(r'"([^"]+)"', instruction)
            assert answer == ("yes" if keyword in question.said.split() else "no")
            answers.append(answer)
    assert len(answers) > 200
    assert 0.4 < answers.count("yes") / len(answers) < 0.65


def test_speech_activity_answers_are_true_and_both_are_asked_of_sound_alone(examples, clips):
    questions = drawn(questioner(examples, clips, questions={"speech_activity": 1.0}), 20)
    for question in questions:
        expected = "speech" if examples[question.clip.example].labels["speech"] else "no_speech"
        assert [pair.answer for pair in question.pairs] == [expected]
        assert (question.mode, question.transcript) == ("audio", None)
    assert {question.pairs[0].answer for question in questions} == {"speech", "no_speech"}


def test_transcripts_to_write_are_in_spoken_form(examples, clips):
    for question in drawn(questioner(examples, clips, questions={"asr": 1.0}), 5):
        [(_, answer, is_closed)] = question.pairs
        assert answer == question.said == answer.lower()
        assert not is_closed


def test_one_hearing_is_asked_everything_as_often_as_the_recipe_says(examples, clips):
    shares = {"asr": 0.5, "keyword_search": 3.0}
    questions = drawn(questioner(examples, clips, questions=shares), 40)
    assert {sum(pair.is_closed for pair in question.pairs) for question in questions} == {3}
    assert 0.35 < sum(not p.is_closed for q in questions for p in q.pairs) / len(questions) < 0.65


def test_what_is_read_is_the_recognisers_transcript_and_nothing_in_mode_audio(examples, clips):
    for question in drawn(questioner(examples, clips), 5):
        expected = None if question.mode == "audio" else TEXTS[question.clip.example].upper()
        assert question.transcript == expected


def test_a_steps_questions_follow_from_step_and_seed_alone(examples, clips):
    asker = questioner(examples, clips)
    assert asker.draw(7, seed=1) == questioner(examples, clips).draw(7, seed=1)
    assert asker.draw(7, seed=1) != asker.draw(8, seed=1)
    assert asker.draw(7, seed=1) != asker.draw(7, seed=2)


def test_a_stage_that_its_data_cannot_answer_is_refused(examples, clips):
    with pytest.raises(TrainingError, match="`transcripts` above 0"):
        Questioner(examples, clips, {}, stage())
    with pytest.raises(TrainingError, match="`speech: false`"):
        questioner(examples, clips[:5], questions={"speech_activity": 1.0})
    with pytest.raises(TrainingError, match="`lang: en`"):
        questioner(examples, clips[5:])


@pytest.fixture
def labelled() -> list[Example]:
    """Speakers with labels: one emotion is rare."""
    emotions = ["happy"] * 45 + ["sad"] * 5
    return [
        Example(
            Path(f"{i}.wav"),
            text=TEXTS[i % 5],
            lang="en",
            speaker=f"s{i % 10}",
            source=f"c{i % 2}",
            labels={"emotion": emotion, "slots": {"dish": "soup"} if i % 2 else {}, "translation": {"German": "Hallo"}},
        )
        for i, emotion in enumerate(emotions)
    ]


def asked_of(examples: list[Example], steps: int = 30, listener: Listener | None = None, **changes) -> list[Question]:
    clips = [Clip(i, Path("shard.npy"), 0, 100) for i in range(len(examples))]
    asker = Questioner(examples, clips, {}, stage(modes={"audio": 1.0}, **changes), listener)
    return drawn(asker, steps)


def test_a_label_is_the_answer_and_a_rare_one_is_asked_as_often(labelled):
    questions = asked_of(labelled, questions={"emotion": 1.0})
    for question in questions:
        [pair] = question.pairs
        assert (pair.answer, pair.is_closed) == (labelled[question.clip.example].labels["emotion"], True)
    answers = [question.pairs[0].answer for question in questions]
    assert 0.4 < answers.count("sad") / len(answers) < 0.6


def test_slots_and_translations_are_asked_where_they_are_known(labelled):
    questions = asked_of(labelled, questions={"slots": 1.0, "translation": 1.0})
    pairs = [(labelled[q.clip.example], pair) for q in questions for pair in q.pairs]
    slots = [(example.labels["slots"], pair) for example, pair in pairs if pair.answer != "Hallo"]
    assert {pair.answer for said, pair in slots if said} == {"dish = soup"}
    assert {pair.answer for said, pair in slots if not said} == {"none"}
    assert any("dish" in pair.instruction for _, pair in slots)
    assert any("German" in pair.instruction for _, pair in pairs)
    assert not any(pair.is_closed for _, pair in pairs)


def test_slots_of_a_manifests_own_are_asked_alone_and_may_be_unsaid():
    examples = [
        Example(Path("a.wav"), labels={"slots": {"flavour": "lemon", "cone": None}}),
        Example(Path("b.wav"), labels={"slots": {"place": "Oslo"}}),
    ]
    known = {i: own[0] for i, own in known_answers("slots", examples).items()}
    assert {i: one.answer for i, one in known.items()} == {0: "flavour = lemon", 1: "place = Oslo"}
    assert known[0].task.label_names == ("cone", "flavour")
    assert "person" in known[1].task.label_names


def of_five(**fields) -> list[Example]:
    """The same of five speakers."""
    return [Example(Path(f"{i}.wav"), speaker=f"{fields}{i}", **fields) for i in range(5)]


def test_a_manifests_own_word_for_a_label_is_the_tasks():
    examples = [*of_five(labels={"emotion": "anger"}), *of_five(labels={"accent": "US"})]
    assert {known[0].answer for known in known_answers("emotion", examples).values()} == {"angry"}
    assert {known[0].answer for known in known_answers("accent", examples).values()} == {"american"}


def test_language_comes_from_lang_and_labels_of_another_set_are_not_asked():
    examples = [*of_five(lang="de-AT", labels={"emotion": "bored"}), *of_five(lang="en", labels={"emotion": "sad"})]
    answers = [known[0].answer for known in known_answers("language", examples).values()]
    assert answers == ["german"] * 5 + ["english"] * 5
    assert list(known_answers("emotion", examples)) == [5, 6, 7, 8, 9]


def test_a_label_of_the_voice_that_few_speakers_have_is_left_out_and_named(caplog):
    examples = [*of_five(labels={"accent": "us"}), *of_five(labels={"accent": "canada"})[:4]]
    assert {known[0].answer for known in known_answers("accent", examples).values()} == {"american", "canadian"}
    assert {known[0].answer for known in learnable_answers("accent", examples).values()} == {"american"}
    assert "accent: canadian is left out: fewer than 5 speakers have it" in caplog.text
    words = of_five(lang="en", labels={"sentiment": "positive"})[:1]
    assert list(learnable_answers("sentiment", words)) == [0]


def test_a_sound_asked_of_alone_is_not_asked_of_beside_a_transcript(labelled):
    clips = [Clip(i, Path("shard.npy"), 0, 100) for i in range(len(labelled))]
    transcripts = dict.fromkeys(range(len(labelled)), "hello")
    modes = {"audio": 0.5, "both": 0.5}
    asker = Questioner(labelled, clips, transcripts, stage(modes=modes, questions={"emotion": 1.0, "slots": 1.0}))
    for question in drawn(asker, 30):
        emotions = [pair for pair in question.pairs if pair.answer in ("happy", "sad")]
        assert not emotions or question.mode == "audio"


def test_one_speaker_or_two_and_clips_that_are_joined_tell_neither(labelled):
    listener = Listener(labelled, None, 320, [])
    questions = asked_of(labelled, questions={"speaker_count": 1.0}, listener=listener)
    answers = [question.pairs[0].answer for question in questions]
    assert 0.35 < answers.count("two") / len(answers) < 0.65
    for question, answer in zip(questions, answers, strict=True):
        if not isinstance(question.clip, LiveClip):
            assert answer == "one"
            continue
        other, layout = question.clip.other
        own = labelled[question.clip.example]
        assert (labelled[other].speaker == own.speaker) == (answer == "one")
        assert labelled[other].source == own.source
        assert answer == "two" or layout == "joined"
        assert question.said is None
    assert any(isinstance(q.clip, LiveClip) and a == "one" for q, a in zip(questions, answers, strict=True))


def test_a_corpus_is_heard_as_often_as_its_weight_says(labelled):
    questions = asked_of(labelled, questions={"asr": 1.0}, corpora={"c0": 3.0, "c1": 1.0})
    heard = [labelled[question.clip.example].source for question in questions]
    assert 0.65 < heard.count("c0") / len(heard) < 0.85
    assert {labelled[q.clip.example].source for q in asked_of(labelled, corpora={"c0": 0.0})} == {"c1"}


def test_what_no_label_answers_is_refused_by_its_task(labelled):
    with pytest.raises(TrainingError, match="no example has an answer to accent; add its label"):
        asked_of(labelled, questions={"accent": 1.0})
    with pytest.raises(TrainingError, match="moood is no task of the library; name one of accent, asr"):
        asked_of(labelled, questions={"moood": 1.0})
    with pytest.raises(TrainingError, match="two `speaker`s"):
        asked_of(labelled[:1], questions={"speaker_count": 1.0})


def test_lookalikes_share_letters_and_never_are_the_word_itself():
    vocabulary = ["train", "rain", "trains", "brain", "envelope", "trail"]
    assert set(lookalikes("train", vocabulary)) == {"rain", "trains", "brain", "trail"}
    assert lookalikes("zzz", vocabulary) == []


def test_a_cascades_questions_are_all_asked_of_transcripts(labelled):
    clips = [Clip(i, Path("shard.npy"), 0, 100) for i in range(len(labelled))]
    transcripts = dict.fromkeys(range(0, len(labelled), 2), "hello")
    asker = Questioner(labelled, clips, transcripts, stage(modes={"text": 1.0}, questions={"slots": 1.0}))
    for question in drawn(asker, 20):
        assert question.mode == "text"
        assert question.transcript == "hello"
    with pytest.raises(TrainingError, match="emotion cannot be told from a transcript; leave out, or give other modes"):
        Questioner(labelled, clips, transcripts, stage(modes={"text": 1.0}, questions={"emotion": 1.0}))


def test_labels_are_listed_in_any_order_and_often_fewer_but_always_with_the_answer(labelled):
    orders = set()
    for question in asked_of(labelled, 40, questions={"emotion": 1.0}):
        for pair in question.pairs:
            if named := [name for name in ("neutral", "happy", "sad", "angry") if f"{name}: " in pair.instruction]:
                assert pair.answer in named
                orders.add(tuple(sorted(named, key=pair.instruction.index)))
    assert {len(order) for order in orders} == {2, 3, 4}
    assert len({order for order in orders if len(order) == 4}) > 3


def test_all_slots_are_asked_in_any_order(labelled):
    examples = [replace(each, labels={"slots": {"dish": "soup", "size": None}}) for each in labelled]
    asked = [pair.instruction for q in asked_of(examples, questions={"slots": 1.0}) for pair in q.pairs]
    assert all("dish" in one and "size" in one for one in asked)
    assert {one.index("dish") < one.index("size") for one in asked} == {True, False}
