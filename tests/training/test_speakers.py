from pathlib import Path

import numpy as np
import pytest
import torch

from svbatch.errors import TrainingError
from svbatch.speech.projector import Projector, ProjectorConfig
from svbatch.training import speakers as fitting
from svbatch.training.data import Example
from svbatch.training.frames import Clip
from svbatch.training.speakers import by_speaker, comparable, fit_speaker_count, pieces

WIDTH = 6


class Silence:
    """Hears nothing but zeros."""

    frame_samples = 320

    def frames(self, sound: np.ndarray) -> np.ndarray:
        return np.zeros((50, WIDTH), np.float16)


@pytest.mark.parametrize("num_clips", [1, 3])
def test_people_are_counted_in_pieces_of_one_source(tmp_path, num_clips):
    shard, random = tmp_path / "shard.npy", np.random.default_rng(0)
    speakers = [speaker for speaker in range(4) for _ in range(num_clips)]
    frames = [np.full((40, WIDTH), speaker + 1, np.float16) for speaker in speakers]
    np.save(shard, np.concatenate(frames))
    examples = [Example(Path(f"{i}.wav"), speaker=f"s{s}", source="all") for i, s in enumerate(speakers)]
    clips = [Clip(i, shard, 40 * i, 40) for i in range(len(examples))]
    [voices] = comparable(by_speaker(examples, clips)).values()
    lengths: dict[bool, list[int]] = {True: [], False: []}
    for number in range(100):
        is_one = number % 2 == 0
        parts = pieces(voices, is_one, random)
        spoken = [float(part[0, 0]) for part in parts]
        assert len(set(spoken)) == (1 if is_one else len(parts))
        lengths[is_one] += [len(part) for part in parts]
    assert set(lengths[True]) == set(lengths[False])


def corpus(folder: Path, *, num_speakers: int) -> tuple[list[Example], list[Clip]]:
    """Four clips of 4 s of each speaker, whose frames differ in their pattern over the width."""
    random = np.random.default_rng(1)
    patterns = random.normal(0, 1, (num_speakers, WIDTH))
    examples, rows = [], []
    for speaker, pattern in enumerate(patterns):
        for take in range(4):
            examples.append(Example(folder / f"{speaker}-{take}.wav", speaker=f"s{speaker}", source="all"))
            rows.append((pattern + random.normal(0, 0.7, (200, WIDTH))).astype(np.float16))
    np.save(folder / "shard.npy", np.concatenate(rows))
    return examples, [Clip(i, folder / "shard.npy", 200 * i, 200) for i in range(len(examples))]


def test_a_fitted_count_tells_new_speakers(tmp_path, monkeypatch):
    examples, clips = corpus(tmp_path, num_speakers=24)
    monkeypatch.setattr(fitting, "waveform_of", lambda example: np.zeros(16_000, np.float32))
    projector = Projector(ProjectorConfig(encoder_width=WIDTH, width=8, llm_width=4, tone=(2, 2), counted=1)).eval()
    fit_speaker_count(projector, projector.tone.speakers, examples[:64], clips[:64], Silence(), seed=0)
    new = [clip.read() for clip in clips[64:]]
    right = 0
    for number in range(0, 32, 2):
        one = np.concatenate([new[number], new[number + 1]])
        two = np.concatenate([new[number], new[(number + 4) % 32]])
        frames = torch.from_numpy(np.stack([one, two]).astype(np.float32))
        logits = projector.tone.logits(frames, torch.tensor([400, 400]))[:, 2:]
        right += int(logits[0, 0] > logits[0, 1]) + int(logits[1, 1] > logits[1, 0])
    assert right >= 29


def test_a_source_with_one_speaker_tells_nothing(tmp_path):
    examples, clips = corpus(tmp_path, num_speakers=1)
    projector = Projector(ProjectorConfig(encoder_width=WIDTH, width=8, llm_width=4, tone=(2,), counted=0))
    with pytest.raises(TrainingError, match="speaker_count wants a source with examples of two"):
        fit_speaker_count(projector, projector.tone.speakers, examples, clips, Silence(), seed=0)
