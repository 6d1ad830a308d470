"""Stage 1, align: the projector learns to land near the LLM's token embeddings, by CTC and without the LLM's layers."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from svbatch.model import Precision
from svbatch.speech.projector import Projector
from svbatch.speech.readout import BLANK, Readout, spoken_form
from svbatch.training.data import Example
from svbatch.training.frames import Heard
from svbatch.training.recipe import AlignStage

MAX_MASKED_FRAMES = 20
MASKED_FEATURES = 0.125  # of a frame, at most


def scored_tokens(tokenizer: Tokenizer, texts: Sequence[str], *, size: int) -> Tensor:
    """Ids of the tokens that the read-out scores: all of `texts`, then the commonest lower-case ones, up to `size`."""
    wanted = {token for text in texts for token in tokenizer.encode(text, add_special_tokens=False).ids}
    plain = re.compile(r"Ġ?[a-z']+")
    vocabulary = sorted((i, token) for token, i in tokenizer.get_vocab().items())
    for token_id, token in vocabulary:
        if len(wanted) >= size:
            break
        if plain.fullmatch(token):
            wanted.add(token_id)
    return torch.tensor(sorted(wanted))


def batches(
    clips: Sequence[Heard], *, frames_per_batch: int, seed: int, epoch: int, weights: Sequence[float] | None = None
) -> list[list[int]]:
    """Indices into `clips`, neighbours in length together, batches in an order drawn for the epoch. A clip of weight w
    comes w times in an epoch on average."""
    random = np.random.default_rng([seed, epoch])
    noisy = np.array([clip.length for clip in clips]) * random.uniform(0.9, 1.1, len(clips))
    order = np.argsort(noisy)
    if weights is not None:
        order = np.repeat(order, (np.array(weights)[order] + random.random(len(clips))).astype(int))
    result: list[list[int]] = [[]]
    longest = 0
    for index in order:
        longest = max(longest, clips[index].length)
        if result[-1] and longest * (len(result[-1]) + 1) > frames_per_batch:
            result.append([])
            longest = clips[index].length
        result[-1].append(int(index))
    return [result[i] for i in random.permutation(len(result))]


def padded_frames(clips: Sequence[Heard]) -> tuple[Tensor, Tensor]:
    """(B, T, D) float32, zero past each clip's end, and (B,) lengths in frames."""
    arrays = [torch.from_numpy(clip.read()).float() for clip in clips]
    return torch.nn.utils.rnn.pad_sequence(arrays, batch_first=True), torch.tensor([len(a) for a in arrays])


def stretched(frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """A batch of frames spoken faster or slower by one factor of 0.87 to 1.15, by linear interpolation in time."""
    factor = 0.87 + 0.28 * float(torch.rand(()))
    size = max(1, round(frames.shape[1] * factor))
    changed = torch.nn.functional.interpolate(frames.transpose(1, 2), size=size, mode="linear").transpose(1, 2)
    return changed, (lengths * factor).round().long().clamp(1, size)


def masked(frames: Tensor, lengths: Tensor) -> Tensor:
    """`frames` with random spans of time and of features zeroed (SpecAugment, arXiv 1904.08779), in place."""
    for row, length in zip(frames, lengths.tolist(), strict=True):
        for _ in range(1 + length // 200):
            start = int(torch.randint(0, max(1, length), ()))
            row[start : start + int(torch.randint(0, MAX_MASKED_FRAMES, ()))] = 0.0
        first = int(torch.randint(0, row.shape[1], ()))
        row[:, first : first + int(torch.randint(0, max(1, round(MASKED_FEATURES * row.shape[1])), ()))] = 0.0
    return frames


def posteriors(
    projector: Projector, readout: Readout, frames: Tensor, lengths: Tensor, precision: Precision = "bfloat16"
) -> tuple[Tensor, Tensor, Tensor]:
    """(speech embeddings (B, T, E), log-probabilities (B, T, 1 + V), tone (B, A, E)) of frames (B, T', D)."""
    with torch.autocast(frames.device.type, dtype=torch.bfloat16, enabled=precision == "bfloat16"):
        speech, blank, tone, _ = projector(frames, lengths)
        return speech, readout.log_probs(speech, blank), tone


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """CTC loss per target token of (B, T, 1 + V) log-probabilities, `lengths` (B,) of them in each row.

    `targets` are read-out classes; an empty one teaches blank. A text too long for its frames costs nothing.
    """
    loss = torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        torch.nn.utils.rnn.pad_sequence(list(targets), batch_first=True).to(log_probs.device),
        lengths,
        torch.tensor([len(t) for t in targets]),
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )
    return loss / max(1, sum(len(t) for t in targets))


class Aligner:
    """Batches of clips with their texts, and the CTC loss of each batch."""

    def __init__(
        self,
        projector: Projector,
        readout: Readout,
        tokenizer: Tokenizer,
        examples: Sequence[Example],
        clips: Sequence[Heard],
        stage: AlignStage,
        *,
        seed: int,
    ) -> None:
        said = {
            i: spoken_form(e.text or "") for i, e in enumerate(examples) if (e.text and e.lang == "en") or e.is_silent
        }
        self.clips = [clip for clip in clips if clip.example in said]
        self._targets = {
            i: torch.tensor(
                readout.classes(tokenizer.encode(text, add_special_tokens=False).ids),
                dtype=torch.long,
            )
            for i, text in said.items()
        }
        self._weights = None
        if stage.corpora:
            self._weights = [stage.corpora.get(examples[clip.example].source, 1.0) for clip in self.clips]
        self._projector, self._readout = projector, readout
        self._examples, self._size, self._seed = examples, stage.frames_per_batch, seed
        self._epochs: dict[int, list[list[int]]] = {}
        self.per_epoch = len(self._batches(0))

    def _batches(self, epoch: int) -> list[list[int]]:
        if epoch not in self._epochs:
            self._epochs.clear()
            size, weights = self._size, self._weights
            self._epochs[epoch] = batches(
                self.clips, frames_per_batch=size, seed=self._seed, epoch=epoch, weights=weights
            )
        return self._epochs[epoch]

    def _drawn(self, batch: int) -> list[Heard]:
        epoch = self._batches(batch // self.per_epoch)
        return [self.clips[i] for i in epoch[batch % self.per_epoch % len(epoch)]]

    def losses(self, batch: int) -> dict[str, Tensor]:
        """`ctc` of one batch."""
        drawn = self._drawn(batch)
        frames, lengths = stretched(*padded_frames(drawn))
        device = self._projector.log_scale.device
        frames, lengths = masked(frames, lengths).to(device), lengths.to(device)
        _, log_probs, _ = posteriors(self._projector, self._readout, frames, lengths)
        sizes = -(-lengths // self._projector.downsampling)
        return {"ctc": ctc_loss(log_probs, sizes, [self._targets[clip.example] for clip in drawn])}

    def describe(self, batch: int) -> str:
        """The batch's files, for a person who looks for the odd one."""
        names = sorted({self._examples[clip.example].path.name for clip in self._drawn(batch)})
        return f"batch {batch} of seed {self._seed} ({', '.join(names)})"
