import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import soundfile

from svbatch.corpus.segment import speech_segments
from svbatch.tasks.task import load_task
from svbatch.training.benchmarks import benchmarks, table
from svbatch.training.data import Example, read_manifest
from svbatch.training.mixtures import MAX_PART_S, NO_SPEECH, joined, without_speech
from svbatch.training.synthesise import read_sentences
from svbatch.training.voices import VOICES
from svbatch.training.written import VARIANTS, can_speak, written_benchmarks

NUMBERS = ("one", "two", "three", "four")
SENTENCES = Path(__file__).parents[2] / "jobs" / "train" / "sentences"


@pytest.fixture
def manifest(tmp_path, bursts) -> Path:
    """Four speakers with four clips each of two sources, and two noises; every clip has all labels."""
    rows = []
    for number in range(16):
        name = f"clip{number}.wav"
        soundfile.write(tmp_path / name, bursts(0.6, 0.2, 0.4, seed=number), 16_000)
        rows.append(
            {
                "audio": name,
                "text": f"the number {NUMBERS[number % 4]} and the {chr(97 + number) * 4} thing",
                "speaker": f"s{number // 4}",
                "source": "calls" if number < 8 else "studio",
                "lang": "en",
                "speech": True,
                "emotion": ["anger", "neutral", "boredom", "sadness"][number % 4],
                "slots": {"coffeeDrink": "mocha"} if number < 3 else None,
            }
        )
    for number in range(2):
        soundfile.write(tmp_path / f"noise{number}.wav", bursts(1.0, seed=50 + number), 16_000)
        rows.append({"audio": f"noise{number}.wav", "source": "office", "speech": False})
    path = tmp_path / "dev.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def benches(manifest):
    return {test.name: test for test in benchmarks(read_manifest(manifest), seed=0, written=False)}


def test_a_manifest_allows_the_tests_that_it_has_labels_for(benches):
    assert set(benches) == {"asr", "keyword_search", "speech_activity", "speaker_count", "emotion", "slots"}


def test_labels_are_the_tasks_own_and_a_strange_one_is_left_out(benches):
    assert Counter(item.truth for item in benches["emotion"].items) == {"angry": 4, "neutral": 4, "sad": 4}


def test_of_the_words_asked_for_one_is_said_and_one_is_not(benches, manifest):
    texts = {str(e.path): e.text for e in read_manifest(manifest)}
    for item in benches["keyword_search"].items:
        words = texts[item.recording].split()
        assert {word: word in words for word in item.truth} == item.truth
        assert sorted(item.truth.values()) == [False, True]


def test_half_of_the_silences_are_composed(benches):
    truths = Counter(item.truth for item in benches["speech_activity"].items)
    assert truths == {"speech": 16, "no_speech": 4}


def test_mixtures_have_one_speaker_or_several_of_one_source(benches):
    items = benches["speaker_count"].items
    assert Counter(item.truth for item in items) == {"one": 60, "two": 60}
    speaker_of = {f"clip{n}.wav": f"s{n // 4}" for n in range(16)}
    for item in items:
        paths = item.load.args[0]
        speakers = {speaker_of[path.name] for path in paths}
        assert (len(speakers) > 1) == (item.truth == "two")
        assert item.speaker in speakers
        assert len({int(s[1]) // 2 for s in speakers}) == 1
        assert len(set(paths)) == len(paths) == 2  # as many as there are speakers in a source, so that no number tells


def test_slots_of_a_corpus_are_asked_under_names_that_say_what_they_are(benches):
    test = benches["slots"]
    assert test.items[0].truth == [("drink", "mocha")]
    assert test.task.label_names == ("drink",)


def test_the_same_manifest_and_seed_give_the_same_tests_and_sounds(manifest):
    once, again = (benchmarks(read_manifest(manifest), seed=5, written=False) for _ in range(2))
    for one, other in zip(once, again, strict=True):
        assert [(i.recording, i.speaker, i.truth) for i in one.items] == [
            (i.recording, i.speaker, i.truth) for i in other.items
        ]
        assert np.array_equal(one.items[-1].load(), other.items[-1].load())
    other_seed = benchmarks(read_manifest(manifest), seed=6, written=False)
    assert [i.truth for i in once[1].items] != [i.truth for i in other_seed[1].items]


def test_a_limit_keeps_labels_and_speakers_even(benches):
    few = benches["emotion"].limited(6, seed=0)
    assert Counter(item.truth for item in few.items) == {"angry": 2, "neutral": 2, "sad": 2}
    assert benches["asr"].limited(4, seed=0).num_speakers == 4
    assert benches["asr"].limited(400, seed=0).items == benches["asr"].items


def test_the_table_calls_small_tests_indicative_and_names_what_confounds_them(benches):
    rows = {row["test"]: row for row in table(list(benches.values()))}
    assert not rows["speaker_count"]["counted"]
    assert rows["speaker_count"]["items"] == 120
    assert rows["speaker_count"]["speakers"] == 4
    assert rows["speaker_count"]["kind"] == "composed"
    assert "joined" in rows["speaker_count"]["confounds"]


def test_a_hundred_recordings_of_ten_speakers_are_counted():
    examples = [
        Example(Path(f"{n}.wav"), speaker=f"s{n % 10}", labels={"gender": ("male", "female")[n // 10 % 2]})
        for n in range(100)
    ]
    [test] = [t for t in benchmarks(examples, seed=0, written=False) if t.name == "gender"]
    assert test.is_counted
    assert not test.limited(99, seed=0).is_counted


def test_a_mixture_has_every_part_at_one_level_and_fits_into_a_window(tmp_path, bursts):
    paths = [tmp_path / f"{n}.wav" for n in range(3)]
    for number, path in enumerate(paths):
        soundfile.write(path, bursts(12.0, seed=number) * 0.1**number, 16_000, subtype="FLOAT")
    sound = joined(paths, [0, 1])
    assert sound.size <= 30 * 16_000
    assert len(speech_segments(sound)) == 1
    part = round(MAX_PART_S * 16_000)
    levels = [np.sqrt(np.mean(piece**2)) for piece in (sound[:part], sound[-part:])]
    assert levels[0] == pytest.approx(levels[1], rel=0.05)


@pytest.mark.parametrize("kind", NO_SPEECH)
def test_sounds_without_speech_are_bounded_and_follow_from_their_seed(kind):
    sound = without_speech(kind, [1, 2])
    assert np.array_equal(sound, without_speech(kind, [1, 2]))
    assert 2 * 16_000 <= sound.size <= 8 * 16_000
    assert np.abs(sound).max() <= 0.5
    assert (kind == "silence") == (not sound.any())


def test_written_tests_are_large_enough_and_balanced():
    written = {test.name: test for test in written_benchmarks()}
    of_library = {"sentiment", "intent", "accent_written", "translation", "keywords", "slots_written"}
    assert set(written) == of_library | {"unseen_intent", "unseen_topic", "unseen_sentence_type"}
    assert all(test.is_counted and test.kind == "synthetic" for test in written.values())
    assert set(Counter(item.truth for item in written["sentiment"].items).values()) == {34}
    assert set(Counter(item.truth for item in written["intent"].items).values()) == {10}
    assert min(Counter(item.truth for item in written["accent_written"].items).values()) >= 40
    assert set(Counter(item.truth for item in written["unseen_intent"].items).values()) == {13}
    assert set(Counter(item.truth for item in written["unseen_topic"].items).values()) == {17}
    assert set(Counter(item.truth for item in written["unseen_sentence_type"].items).values()) == {36, 30}


def test_what_is_unseen_is_no_task_or_label_that_is_trained_on():
    unseen = [test for test in written_benchmarks() if test.name.startswith("unseen_")]
    labels = {label for name in ("intent", "sentiment") for label in load_task(name, Path()).label_names}
    for test in unseen:
        assert test.task.definition == "intent" or not test.task.is_library
        assert not labels & set(test.task.label_names)
        assert "{{ label_descriptions }}" in "".join([*test.task.instructions[:1], *test.task.held_out])


def test_what_is_written_for_tests_is_consistent_and_never_trained_on():
    sentences = read_sentences(sorted(path for path in SENTENCES.iterdir()))
    trained = {text.rstrip(".?!").lower() for text, _ in sentences}
    for test in written_benchmarks():
        labels = set(test.task.label_names)
        for item in test.items:
            assert item.recording.isascii()
            assert item.recording.rstrip(".?!").lower() not in trained
            if test.task.answer == "label":
                assert item.truth in labels
            if test.name == "slots_written":
                assert all(slot in labels and value in item.recording for slot, value in item.truth)
            if test.name == "keywords":
                assert all(word.lower() in item.recording.lower() for word in item.truth)


def test_test_voices_are_none_that_speech_for_training_is_made_with():
    assert not {voice.name.split("+")[-1] for voice in VOICES} & set(VARIANTS)


@pytest.mark.skipif(not can_speak(), reason="espeak-ng is not installed")
def test_a_written_text_is_spoken_alike_every_time():
    item = next(written_benchmarks()).items[0]
    first, second = item.load(), item.load()
    assert first.size > 16_000
    assert np.abs(first).max() > 0.1
    assert first.shape == second.shape
