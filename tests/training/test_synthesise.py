import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import soundfile

from svbatch.errors import TrainingError
from svbatch.training.synthesise import draw, main, read_sentences, synthesise
from svbatch.training.voices import VOICES, choose_voices, missing_packages

ROOT = Path(__file__).parents[2]
ESPEAK = choose_voices(["espeak-ng"])
needs_espeak = pytest.mark.skipif(bool(missing_packages(ESPEAK)), reason="needs Debian's espeak-ng")


@pytest.fixture
def sentences(tmp_path):
    path = tmp_path / "orders.jsonl"
    texts = ["One large tea, please.", "Cancel my order.", "Where is the waiter?"]
    path.write_text("".join(json.dumps({"text": text, "intent": "order"}) + "\n" for text in texts))
    return path


def rows(output):
    return [json.loads(line) for line in (output / "manifest.jsonl").read_text().splitlines()]


@needs_espeak
def test_the_manifest_describes_each_audio_file(sentences, tmp_path):
    assert synthesise([sentences], tmp_path / "speech", voices=ESPEAK, seed=3) == 3
    written = rows(tmp_path / "speech")
    assert {row["text"] for row in written} == {text for text, _ in read_sentences([sentences])}
    for row in written:
        audio = soundfile.info(tmp_path / "speech" / row["audio"])
        assert (audio.samplerate, audio.channels, audio.subtype) == (16_000, 1, "OPUS")
        assert audio.duration == pytest.approx(row["duration"], abs=0.001)
        assert row["source"] == "synthesised"
        assert row["lang"] == "en"
        assert row["speech"] is True
        assert row["intent"] == "order"
        assert row["speaker"].startswith("espeak-ng-en")
        assert row["gender"] == ("female" if "+f" in row["speaker"] else "male")
        assert [word["word"] for word in row["words"]] == row["text"].split()


@needs_espeak
def test_what_the_manifest_lists_is_not_spoken_again_and_another_seed_adds_voices(sentences, tmp_path):
    output = tmp_path / "speech"
    assert synthesise([sentences], output, voices=ESPEAK, seed=1, limit=2) == 2
    assert synthesise([sentences], output, voices=ESPEAK, seed=1) == 1
    assert synthesise([sentences], output, voices=ESPEAK, seed=1) == 0
    assert synthesise([sentences], output, voices=ESPEAK, seed=2) == 3
    assert len({row["audio"] for row in rows(output)}) == 6


@needs_espeak
def test_a_half_written_line_of_a_killed_run_is_spoken_again(sentences, tmp_path):
    output = tmp_path / "speech"
    synthesise([sentences], output, voices=ESPEAK)
    whole = rows(output)
    manifest = output / "manifest.jsonl"
    os.truncate(manifest, manifest.stat().st_size - 10)
    assert synthesise([sentences], output, voices=ESPEAK) == 1
    assert [row["audio"] for row in rows(output)] == [row["audio"] for row in whole]


def test_a_voice_depends_on_seed_and_sentence_and_each_synthesiser_gets_a_third():
    drawn = [draw(f"Tree {number}.", {}, voices=VOICES, seed=5).voice.synthesiser for number in range(900)]
    assert draw("A tree.", {}, voices=VOICES, seed=1) == draw("A tree.", {}, voices=VOICES, seed=1)
    assert draw("A tree.", {}, voices=VOICES, seed=1) != draw("A tree.", {}, voices=VOICES, seed=2)
    assert all(250 < drawn.count(synthesiser) < 350 for synthesiser in ("espeak-ng", "flite", "festival"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", "{'text': 1}", "line 1: not JSON"),
        ("a.jsonl", '\n{"words": []}', 'line 2: expected an object with a "text"'),
        ("a.jsonl", '{"text": " "}', 'expected an object with a "text" that is not empty'),
        ("a.jsonl", '{"text": "Hi.", "speaker": "me", "audio": 1}', "remove audio, speaker"),
        ("a.txt", "# note\n\nA café.", "line 3: é: not every voice reads it"),
        ("a.txt", "Hello.\nHello.", "line 2: the same sentence as in .*line 1"),
    ],
)
def test_a_bad_line_is_named(tmp_path, name, content, message):
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(TrainingError, match=message):
        read_sentences([tmp_path / name])


def test_an_unknown_voice_and_a_missing_file_exit_2_with_one_line(tmp_path, capsys):
    absent = tmp_path / "absent.txt"
    assert main(["--sentences", str(absent), "--output", str(tmp_path), "--voices", "flite"]) == 2
    assert capsys.readouterr().err.startswith(f"error: {absent}: sentences cannot be read")
    assert main(["--sentences", str(absent), "--output", str(tmp_path), "--voices", "siri"]) == 2
    assert capsys.readouterr().err.startswith("error: unknown voice siri;")


def test_a_missing_synthesiser_names_the_packages_to_install(sentences, tmp_path):
    command = [sys.executable, "-m", "svbatch.training.synthesise", "--voices", "flite", "festival"]
    done = subprocess.run(
        [*command, "--sentences", sentences, "--output", tmp_path / "speech"],
        env={"PATH": str(tmp_path)},
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    packages = "festvox-kallpc16k festvox-kdlpc16k festvox-us-slt-hts flite"
    assert done.returncode == 2
    assert f"`apt-get install {packages}`" in done.stderr
    assert not (tmp_path / "speech").exists()


def test_the_sentences_of_the_project_are_read_and_are_4_to_25_words_long():
    texts = [text for text, _ in read_sentences(sorted((ROOT / "jobs/train/sentences").glob("*.txt")))]
    assert len(texts) >= 400
    assert all(4 <= len(text.split()) <= 25 for text in texts)
