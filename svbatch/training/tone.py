"""Stage tone: the projector's head learns how something is said, from labels alone, without the LLM.

Every hearing is drawn for one attribute: a label, each as often; then one of the sources that have it, so that the
largest does not stand for the label; then a clip. How many people speak is composed of clips of one source.
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
from svbatch.speech.tone import ToneHead
from svbatch.training.align import masked, stretched
from svbatch.training.data import Example, waveform_of
from svbatch.training.frames import Heard, Listener
from svbatch.training.known import known_answers
from svbatch.training.recipe import ToneStage

MAX_FRAMES = 200  # of a clip: 4 s
GAP_FRAMES = (8, 25)
GAPS = 24  # of silence as the encoder hears it after speech
COUNTED = "speaker_count"
Frames = NDArray[np.float16]
T = TypeVar("T")


class ToneTeacher:
    """Batches of clips with a label each, and the losses of the head by attribute. `labels`: of each attribute, in the
    head's order."""

    def __init__(
        self,
        head: ToneHead,
        labels: Mapping[str, Sequence[str]],
        examples: Sequence[Example],
        clips: Sequence[Heard],
        listener: Listener,
        stage: ToneStage,
        *,
        seed: int,
    ) -> None:
        self._head, self._labels, self._stage, self._seed = head, labels, stage, seed
        self._examples = examples
        self._pools = {name: _by_label(name, examples, clips) for name in labels if name != COUNTED}
        if COUNTED in labels:
            self._speakers = _by_speaker(examples, clips)
            if not self._speakers:
                raise TrainingError("speaker_count wants a source with two `speaker`s of two examples each; add some")
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
        logits = self._head.logits(masked(frames, lengths).to(device), lengths.to(device))
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
        sources = self._pools[name][label]
        clip = _any(sources[_any(sorted(sources), random)], random)
        return name, self._labels[name].index(label), _cropped(clip.read(), random), clip.example

    def _counted(self, random: np.random.Generator) -> tuple[str, int, Frames, int]:
        """Two or three clips of one source with gaps: of one speaker, or of as many."""
        speakers = self._speakers[_any(sorted(self._speakers), random)]
        size, is_one = int(random.integers(2, 4)), bool(random.random() < 0.5)
        order = [int(i) for i in random.permutation(len(speakers))]
        chosen = [order[0]] * size if is_one else order[:size]
        clips = [_any(speakers[i], random) for i in chosen]
        pieces: list[Frames] = []
        for clip in clips:
            gap = _any(self._gaps, random)[: int(random.integers(*GAP_FRAMES))]
            pieces += [_cropped(clip.read(), random), gap]
        label = self._labels[COUNTED].index("one" if is_one else "two")
        return COUNTED, label, np.concatenate(pieces[:-1]), clips[0].example


def _by_label(name: str, examples: Sequence[Example], clips: Sequence[Heard]) -> dict[str, dict[str, list[Heard]]]:
    """Clips by label and source."""
    known = known_answers(name, examples)
    pools: dict[str, dict[str, list[Heard]]] = {}
    for clip in clips:
        for one in known.get(clip.example, ())[:1]:
            pools.setdefault(one.answer, {}).setdefault(examples[clip.example].source, []).append(clip)
    return pools


def _by_speaker(examples: Sequence[Example], clips: Sequence[Heard]) -> dict[str, list[list[Heard]]]:
    """Clips of each speaker who has two or more, of sources with two such speakers or more."""
    found: dict[str, dict[str, list[Heard]]] = {}
    for clip in clips:
        example = examples[clip.example]
        if example.speaker and not example.is_silent:
            found.setdefault(example.source, {}).setdefault(example.speaker, []).append(clip)
    repeated = {source: [own for own in by.values() if len(own) > 1] for source, by in found.items()}
    return {source: speakers for source, speakers in repeated.items() if len(speakers) > 1}


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
