"""Stage tone: the projector's head learns how something is said, from labels alone, without the LLM.

Every hearing is drawn for one attribute: a label, each as often; then one of the sources that have it, by the root of
how many speakers it has there, so that neither the largest stands for the label nor a voice or two; then a speaker;
then a clip. How many people speak is composed of clips of one source.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from svbatch.corpus.decode import SAMPLE_RATE_HZ
from svbatch.errors import TrainingError
from svbatch.speech.projector import Projector
from svbatch.training.align import masked, stretched
from svbatch.training.data import Example, waveform_of
from svbatch.training.frames import Heard, Listener
from svbatch.training.known import learnable_answers
from svbatch.training.recipe import ToneStage

MAX_FRAMES = 200  # of a clip: 4 s
GAP_FRAMES = (8, 25)
MAX_PIECES = 3  # of one speaker, or of as many
GAPS = 24  # of silence as the encoder hears it after speech
COUNTED = "speaker_count"
Frames = NDArray[np.float16]
Voices = dict[str, dict[str, list[Heard]]]
"""Clips by source and speaker."""
T = TypeVar("T")


class ToneTeacher:
    """Batches of clips with a label each, and the losses by attribute of the projector's head, which it has. `labels`:
    of each attribute, in the head's order."""

    def __init__(
        self,
        projector: Projector,
        labels: Mapping[str, Sequence[str]],
        examples: Sequence[Example],
        clips: Sequence[Heard],
        listener: Listener,
        stage: ToneStage,
        *,
        seed: int,
    ) -> None:
        assert projector.tone is not None
        self._projector, self._head, self._labels = projector, projector.tone, labels
        self._examples, self._stage, self._seed = examples, stage, seed
        self._pools = {name: _by_label(name, examples, clips) for name in labels if name != COUNTED}
        if COUNTED in labels:
            self._voices = _comparable(
                _by_speaker(examples, [c for c in clips if _is_of_a_speaker(examples[c.example])])
            )
            if not self._voices:
                raise TrainingError("speaker_count wants a source with examples of two `speaker`s; add some")
            self._gaps = _gaps(examples, clips, listener)
        if bare := [name for name, pools in self._pools.items() if not pools]:
            raise TrainingError(
                f"projector.tone: no example has a label for {', '.join(bare)}; add some, or leave it out"
            )

    def losses(self, batch: int) -> dict[str, Tensor]:
        """Cross-entropy of each attribute in one batch."""
        drawn = self._drawn(batch)
        rows = [torch.from_numpy(frames.astype(np.float32)) for _, _, frames, _ in drawn]
        frames, lengths = stretched(pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]))
        device = self._head.words.device
        voice = self._projector.voice(masked(frames, lengths).to(device))
        logits = self._head.logits(voice, lengths.to(device))
        parts = dict(zip(self._labels, torch.split(logits, self._head.num_labels, dim=1), strict=True))
        found = {}
        for name in self._labels:
            own = [(row, label) for row, (task, label, _, _) in enumerate(drawn) if task == name]
            if own:
                truths = torch.tensor([label for _, label in own], device=device)
                found[name] = cross_entropy(parts[name][[row for row, _ in own]].float(), truths) / len(self._labels)
        return found

    def describe(self, batch: int) -> str:
        """The batch's files, for a person who looks for the odd one."""
        names = sorted({self._examples[index].path.name for *_, index in self._drawn(batch)})
        return f"batch {batch} of seed {self._seed} ({', '.join(names)})"

    def _drawn(self, batch: int) -> list[tuple[str, int, Frames, int]]:
        """Attribute, label, frames and the example that they begin with."""
        random = np.random.default_rng([self._seed, batch])
        names = list(self._labels)
        return [self._one(names[i % len(names)], random) for i in range(self._stage.hearings_per_batch)]

    def _one(self, name: str, random: np.random.Generator) -> tuple[str, int, Frames, int]:
        if name == COUNTED:
            return self._counted(random)
        label = _any(sorted(self._pools[name]), random)
        voices = _of_a_source(self._pools[name][label], random)
        clip = _any(voices[_any(sorted(voices), random)], random)
        return name, self._labels[name].index(label), _cropped(clip.read(), random), clip.example

    def _counted(self, random: np.random.Generator) -> tuple[str, int, Frames, int]:
        """Two or three pieces with gaps: of one speaker, or of as many."""
        is_one = bool(random.random() < 0.5)
        first, parts = _pieces(_of_a_source(self._voices, random), is_one, random)
        pieces: list[Frames] = []
        for part in parts:
            gap = _any(self._gaps, random)[: int(random.integers(*GAP_FRAMES))]
            pieces += [_cropped(part, random), gap]
        label = self._labels[COUNTED].index("one" if is_one else "two")
        return COUNTED, label, np.concatenate(pieces[:-1]), first.example


def _pieces(
    voices: Mapping[str, Sequence[Heard]], is_one: bool, random: np.random.Generator
) -> tuple[Heard, list[Frames]]:
    """The first clip, and the frames of two or three: of one of the speakers, or of as many. Where a speaker has too
    few clips they are parts of clips, whoever speaks, so that no length tells."""
    size = min(int(random.integers(2, MAX_PIECES + 1)), len(voices))
    names = [sorted(voices)[int(i)] for i in random.permutation(len(voices))][:size]
    if any(len(own) < MAX_PIECES for own in voices.values()):
        chosen = [_any(voices[name], random) for name in names]
        clips = [chosen[0]] * size if is_one else chosen
        return clips[0], [np.array_split(clip.read(), size)[place] for place, clip in enumerate(clips)]
    own = voices[names[0]]
    same = [own[int(i)] for i in random.permutation(len(own))[:size]]
    clips = same if is_one else [_any(voices[name], random) for name in names]
    return clips[0], [clip.read() for clip in clips]


def _by_label(name: str, examples: Sequence[Example], clips: Sequence[Heard]) -> dict[str, Voices]:
    known = learnable_answers(name, examples)
    labelled: dict[str, list[Heard]] = {}
    for clip in clips:
        for one in known.get(clip.example, ())[:1]:
            labelled.setdefault(one.answer, []).append(clip)
    return {label: _by_speaker(examples, own) for label, own in labelled.items()}


def _by_speaker(examples: Sequence[Example], clips: Sequence[Heard]) -> Voices:
    """A clip of a speaker who is not known stands for one."""
    found: Voices = {}
    for clip in clips:
        example = examples[clip.example]
        found.setdefault(example.source, {}).setdefault(example.speaker or example.key, []).append(clip)
    return found


def _is_of_a_speaker(example: Example) -> bool:
    return example.speaker is not None and not example.is_silent


def _comparable(voices: Voices) -> Voices:
    """Of each source the speakers with MAX_PIECES clips or more if there are two, or else all; no source of one."""
    able = {}
    for source, speakers in voices.items():
        repeated = {name: own for name, own in speakers.items() if len(own) >= MAX_PIECES}
        able[source] = repeated if len(repeated) > 1 else speakers
    return {source: speakers for source, speakers in able.items() if len(speakers) > 1}


def _of_a_source(voices: Voices, random: np.random.Generator) -> dict[str, list[Heard]]:
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


def _any(some: Sequence[T], random: np.random.Generator) -> T:
    return some[int(random.integers(len(some)))]


def _cropped(frames: Frames, random: np.random.Generator) -> Frames:
    start = int(random.integers(max(1, len(frames) - MAX_FRAMES + 1)))
    return frames[start : start + MAX_FRAMES]
