"""What tells one voice from several is fitted, not learnt by gradients: a space of speakers by linear discriminant
analysis, then a logistic regression on clips that are joined, of one source each, of one speaker or of as many as there
are clips."""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from torch import Tensor

from svbatch.corpus.decode import SAMPLE_RATE_HZ
from svbatch.errors import TrainingError
from svbatch.speech.projector import Projector
from svbatch.speech.speakers import DIMENSIONS, SpeakerCount, clues, window_statistics
from svbatch.training.data import Example, waveform_of
from svbatch.training.frames import Heard, Listener

CLIPS_OF_EACH = 6  # speaker, that place the space; and as many windows of each
WINDOWS_OF_EACH = 6
COMPONENTS = 250  # of all that windows hold, before speakers are told apart
SHRINKAGE = 0.1
JOINED = 1000  # hearings that the regression sees
MAX_PIECES = 3  # of one speaker, or of as many
MAX_FRAMES = 200  # of a piece: 4 s
GAP_FRAMES = (8, 25)
GAPS = 24  # of silence as the encoder hears it after speech
Frames = NDArray[np.float16]
Voices = dict[str, dict[str, list[Heard]]]
"""Clips by source and speaker."""
T = TypeVar("T")


def fit_speaker_count(
    projector: Projector,
    counter: SpeakerCount,
    examples: Sequence[Example],
    clips: Sequence[Heard],
    listener: Listener,
    *,
    seed: int,
) -> None:
    """Fits `counter`, which is the projector's. Labels are two: one voice, and several. Raises TrainingError where no
    source has two speakers."""
    spoken = [clip for clip in clips if examples[clip.example].speaker and not examples[clip.example].is_silent]
    voices = comparable(by_speaker(examples, spoken))
    if not voices:
        raise TrainingError("speaker_count wants a source with examples of two `speaker`s; add some")
    random = np.random.default_rng([seed, 0])
    _place(counter, projector, voices, random)
    gaps = _gaps(examples, spoken, listener)
    told, truths = [], []
    for number in range(JOINED):
        is_one = number % 2 == 0
        parts = pieces(of_a_source(voices, random), is_one, random)
        told.append(_clues(counter, projector, _joined(parts, gaps, random)))
        truths.append(not is_one)
    fitted = LogisticRegression(C=10.0, max_iter=1000).fit(np.stack(told), truths)
    halves = np.array([-0.5, 0.5])
    counter.output.copy_(torch.from_numpy(halves[:, None] * fitted.coef_))
    counter.output_offset.copy_(torch.from_numpy(halves * fitted.intercept_))


def _place(counter: SpeakerCount, projector: Projector, voices: Voices, random: np.random.Generator) -> None:
    """The map to the space in which speakers lie apart, one linear layer of all its steps."""
    windows: list[NDArray[np.float32]] = []
    speakers: list[str] = []
    for source, by in sorted(voices.items()):
        for name, own in sorted(by.items()):
            for place in random.permutation(len(own))[:CLIPS_OF_EACH]:
                found = _windows(projector, own[int(place)].read())[0][0, :WINDOWS_OF_EACH].numpy()
                windows += list(found)
                speakers += [f"{source} {name}"] * len(found)
    known, counts = np.unique(speakers, return_counts=True)
    often = set(known[counts > 2]) or set(known)
    kept = [i for i, name in enumerate(speakers) if name in often]
    num_components = min(COMPONENTS, len(windows) - 1, windows[0].size)
    steps = make_pipeline(StandardScaler(), PCA(num_components)).fit(np.stack(windows))
    own_names = [speakers[i] for i in kept]
    apart = LinearDiscriminantAnalysis(
        solver="eigen", shrinkage=SHRINKAGE, n_components=min(DIMENSIONS, num_components, len(often) - 1)
    ).fit(steps.transform(np.stack(windows)[kept]), own_names)
    size = windows[0].size
    moved = apart.transform(steps.transform(np.concatenate([np.zeros((1, size)), np.eye(size)])))
    linear, offset = moved[1:] - moved[0], moved[0]
    scale = np.abs(linear).max()  # only directions count, and float16 has to hold it
    counter.place.zero_()
    counter.place_offset.zero_()
    counter.place[: linear.shape[1]] = torch.from_numpy(linear.T / scale)
    counter.place_offset[: linear.shape[1]] = torch.from_numpy(offset / scale)


def _windows(projector: Projector, frames: Frames) -> tuple[Tensor, Tensor]:
    sound = projector.voice(torch.from_numpy(frames.astype(np.float32))[None].to(projector.log_scale.device))
    windows, real = window_statistics(sound, torch.tensor([sound.shape[1]], device=sound.device))
    return windows[:, real[0]].cpu(), real[:, real[0]].cpu()


def _clues(counter: SpeakerCount, projector: Projector, frames: Frames) -> NDArray[np.float32]:
    windows, real = _windows(projector, frames)
    device = counter.place.device
    found: NDArray[np.float32] = clues(counter.points(windows.to(device)), real.to(device))[0].cpu().numpy()
    return found


def pieces(voices: Mapping[str, Sequence[Heard]], is_one: bool, random: np.random.Generator) -> list[Frames]:
    """Frames of two or three clips: of one of the speakers, or of as many. Where a speaker has too few clips they are
    parts of clips, whoever speaks, so that no length tells."""
    size = min(int(random.integers(2, MAX_PIECES + 1)), len(voices))
    names = [sorted(voices)[int(i)] for i in random.permutation(len(voices))][:size]
    if any(len(own) < MAX_PIECES for own in voices.values()):
        chosen = [any_of(voices[name], random) for name in names]
        clips = [chosen[0]] * size if is_one else chosen
        return [np.array_split(clip.read(), size)[place] for place, clip in enumerate(clips)]
    own = voices[names[0]]
    same = [own[int(i)] for i in random.permutation(len(own))[:size]]
    return [clip.read() for clip in (same if is_one else [any_of(voices[name], random) for name in names])]


def _joined(parts: Sequence[Frames], gaps: Sequence[Frames], random: np.random.Generator) -> Frames:
    """The parts, cut to MAX_FRAMES, with silence between them."""
    row: list[Frames] = []
    for part in parts:
        row += [cropped(part, random), any_of(gaps, random)[: int(random.integers(*GAP_FRAMES))]]
    return np.concatenate(row[:-1])


def cropped(frames: Frames, random: np.random.Generator) -> Frames:
    """MAX_FRAMES of them, or all."""
    start = int(random.integers(max(1, len(frames) - MAX_FRAMES + 1)))
    return frames[start : start + MAX_FRAMES]


def by_speaker(examples: Sequence[Example], clips: Sequence[Heard]) -> Voices:
    """A clip of a speaker who is not known stands for one."""
    found: Voices = {}
    for clip in clips:
        example = examples[clip.example]
        found.setdefault(example.source, {}).setdefault(example.speaker or example.key, []).append(clip)
    return found


def comparable(voices: Voices) -> Voices:
    """Of each source the speakers with MAX_PIECES clips or more if there are two, or else all; no source of one."""
    able = {}
    for source, speakers in voices.items():
        repeated = {name: own for name, own in speakers.items() if len(own) >= MAX_PIECES}
        able[source] = repeated if len(repeated) > 1 else speakers
    return {source: speakers for source, speakers in able.items() if len(speakers) > 1}


def of_a_source(voices: Voices, random: np.random.Generator) -> dict[str, list[Heard]]:
    """The speakers of one source, which is drawn by the root of their number."""
    sources = sorted(voices)
    weights = np.sqrt([len(voices[source]) for source in sources])
    return voices[sources[int(random.choice(len(sources), p=weights / weights.sum()))]]


def _gaps(examples: Sequence[Example], clips: Sequence[Heard], listener: Listener) -> list[Frames]:
    """Frames of a second of silence after speech, of some clips."""
    random = np.random.default_rng(0)
    chosen = [clips[int(i)].example for i in random.permutation(len(clips))[:GAPS]]
    silence = np.zeros(SAMPLE_RATE_HZ, np.float32)
    sounds = [np.concatenate([waveform_of(examples[i])[: 8 * SAMPLE_RATE_HZ], silence]) for i in chosen]
    return [listener.frames(sound)[-SAMPLE_RATE_HZ // listener.frame_samples :] for sound in sounds]


def any_of(some: Sequence[T], random: np.random.Generator) -> T:
    """One of them, each as likely."""
    return some[int(random.integers(len(some)))]
