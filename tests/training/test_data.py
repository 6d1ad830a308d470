import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from svbatch.corpus.recording import EPOCH, Recording
from svbatch.errors import TrainingError
from svbatch.training.data import (
    Example,
    Waveforms,
    augmented,
    example_of,
    fits,
    held_out,
    read_manifest,
    read_manifests,
    read_waveform,
)


def write(folder: Path, *lines: object) -> Path:
    path = folder / "train.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + "\n")
    return path


def test_a_manifest_is_read_with_paths_beside_it_and_other_keys_as_labels(tmp_path):
    row = {"audio": "a/b.wav", "text": "Hi", "speaker": "s1", "lang": "en", "speech": False, "emotion": None}
    full, least = read_manifest(write(tmp_path, row, "", {"audio": "c.wav"}))
    assert full == Example(tmp_path / "a/b.wav", "Hi", "s1", "", "", "en", {"speech": False})
    assert least == Example(tmp_path / "c.wav")


@pytest.mark.parametrize("line", ["{not json", '{"text": "no audio"}', '"audio"', "null"])
def test_a_bad_line_is_named_by_file_and_number(tmp_path, line):
    with pytest.raises(TrainingError, match=r"train\.jsonl, line 3: wants a JSON object with `audio`, found"):
        read_manifest(write(tmp_path, {"audio": "a.wav"}, "", line))


@pytest.mark.parametrize("line", ['["audio"]', '{"audio": 5}'])
def test_a_line_of_another_type_is_named_too(tmp_path, line):
    with pytest.raises(TrainingError, match=r"train\.jsonl, line 1: "):
        read_manifest(write(tmp_path, line))


def test_a_manifest_that_is_missing_names_the_option(tmp_path):
    with pytest.raises(TrainingError, match=r"train\.jsonl: No such file or directory; .*--data"):
        read_manifest(tmp_path / "train.jsonl")


def test_a_speaker_is_held_out_whole_or_not_at_all():
    examples = [Example(Path(f"{i}.wav"), speaker=f"s{i % 7}") for i in range(70)]
    aside = held_out(examples, every=3)
    speakers = {examples[i].speaker for i in aside}
    assert speakers == {"s2", "s5"}
    assert aside == {i for i, example in enumerate(examples) if example.speaker in speakers}


def test_examples_without_a_speaker_are_held_out_one_by_one():
    examples = [Example(Path(f"{i}.wav")) for i in range(9)]
    assert held_out(examples, every=4) == {3, 7}


def test_waveforms_are_mono_at_16_khz_and_those_that_fit_no_window_are_left_out(tmp_path):
    sounds = {"stereo.wav": np.full((8_000, 2), 0.5), "long.wav": np.zeros(8_000 * 30)}
    for name, samples in sounds.items():
        soundfile.write(tmp_path / name, samples, 8_000)
    soundfile.write(tmp_path / "nothing.wav", np.zeros(1), 96_000)
    read = Waveforms([Example(tmp_path / name) for name in [*sounds, "nothing.wav"]], [0, 1, 2])
    assert [fits(len(waveform)) for waveform in read] == [True, False, False]
    assert read[0].shape == (16_000,)
    assert read[0].dtype == np.float32


def test_a_recording_of_another_manifest_brings_its_transcript_and_labels(tmp_path):
    metadata = {"speaker": "s1", "source": "calls", "lang": "en", "emotion": "sad", "speech": "False", "age": ""}
    recording = Recording("/c/a.wav#t=1,2", tmp_path / "a.wav", 9, EPOCH, reference="Hi", metadata=metadata)
    example = example_of(recording)
    assert (example.text, example.speaker, example.source, example.lang) == ("Hi", "s1", "calls", "en")
    assert example.labels == {"emotion": "sad", "speech": False}
    assert example.is_silent
    assert example.key == recording.uri


def test_a_corpus_of_a_job_is_training_data_too(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(800), 8_000)
    write(tmp_path, {"audio": "a.wav", "text": "hi"})
    examples = read_manifests(tmp_path, ["train.jsonl", "a.wav"])
    assert [example.text for example in examples] == ["hi", None]
    assert [len(waveform) for waveform in Waveforms(examples, [0, 1])] == [1_600, 1_600]


def test_a_recording_that_a_run_would_not_read_is_named(tmp_path):
    (tmp_path / "text.wav").write_text("no sound")
    soundfile.write(tmp_path / "empty.wav", np.zeros(0), 8_000)
    for name in ("text.wav", "empty.wav", "missing.wav"):
        with pytest.raises(TrainingError, match=rf"{name} .*, or take it out of the manifest"):
            read_waveform(tmp_path / name)


def test_a_changed_example_stays_within_full_scale_and_near_its_length():
    waveform = np.sin(np.arange(16_000) / 10).astype(np.float32)
    for seed in range(10):
        changed = augmented(waveform, [], np.random.default_rng(seed))
        assert 0.87 < len(waveform) / len(changed) < 1.13
        assert 0.05 < np.abs(changed).max() <= 0.951
