"""Stage tone: the projector's head learns how something is said, from labels alone, without the LLM.

Every hearing is drawn for one attribute: a label, each as often; then one of the sources that have it, by the root of
how many speakers it has there, so that neither the largest stands for the label nor a voice or two; then a speaker;
then a clip. How many people speak is fitted instead (svbatch.training.speakers).
"""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from svbatch.errors import TrainingError
from svbatch.speech.projector import Projector
from svbatch.training.align import masked, stretched
from svbatch.training.data import Example
from svbatch.training.frames import Heard
from svbatch.training.known import learnable_answers
from svbatch.training.recipe import ToneStage
from svbatch.training.shape import COUNTED
from svbatch.training.speakers import Frames, Voices, any_of, by_speaker, cropped, of_a_source


class ToneTeacher:
    """Batches of clips with a label each, and the losses by attribute of the projector's head, which it has. `labels`:
    of each attribute, in the head's order."""

    def __init__(
        self,
        projector: Projector,
        labels: Mapping[str, Sequence[str]],
        examples: Sequence[Example],
        clips: Sequence[Heard],
        stage: ToneStage,
        *,
        seed: int,
    ) -> None:
        assert projector.tone is not None
        self._projector, self._head, self._labels = projector, projector.tone, labels
        self._examples, self._stage, self._seed = examples, stage, seed
        self._pools = {name: _by_label(name, examples, clips) for name in labels if name != COUNTED}
        if not self._pools:
            raise TrainingError(f"projector.tone: {COUNTED} is fitted, not learnt; name another task beside it")
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
        for name in self._pools:
            own = [(row, label) for row, (task, label, _, _) in enumerate(drawn) if task == name]
            if own:
                truths = torch.tensor([label for _, label in own], device=device)
                found[name] = cross_entropy(parts[name][[row for row, _ in own]].float(), truths) / len(self._pools)
        return found

    def describe(self, batch: int) -> str:
        """The batch's files, for a person who looks for the odd one."""
        names = sorted({self._examples[index].path.name for *_, index in self._drawn(batch)})
        return f"batch {batch} of seed {self._seed} ({', '.join(names)})"

    def _drawn(self, batch: int) -> list[tuple[str, int, Frames, int]]:
        """Attribute, label, frames and the example that they begin with."""
        random = np.random.default_rng([self._seed, batch])
        names = list(self._pools)
        return [self._one(names[i % len(names)], random) for i in range(self._stage.hearings_per_batch)]

    def _one(self, name: str, random: np.random.Generator) -> tuple[str, int, Frames, int]:
        label = any_of(sorted(self._pools[name]), random)
        voices = of_a_source(self._pools[name][label], random)
        clip = any_of(voices[any_of(sorted(voices), random)], random)
        return name, self._labels[name].index(label), cropped(clip.read(), random), clip.example


def _by_label(name: str, examples: Sequence[Example], clips: Sequence[Heard]) -> dict[str, Voices]:
    known = learnable_answers(name, examples)
    labelled: dict[str, list[Heard]] = {}
    for clip in clips:
        for one in known.get(clip.example, ())[:1]:
            labelled.setdefault(one.answer, []).append(clip)
    return {label: by_speaker(examples, own) for label, own in labelled.items()}
