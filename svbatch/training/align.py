"""Stage 1, align: the projector learns to land near the LLM's token embeddings, by CTC and without the LLM's layers."""

import re
from collections.abc import Sequence

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor

from svbatch.speech.projector import Projector
from svbatch.speech.readout import BLANK, Readout
from svbatch.training.frames import Clip

MAX_MASKED_FRAMES = 20
MASKED_FEATURES = 48


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


def batches(clips: Sequence[Clip], *, frames_per_batch: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices into `clips`, neighbours in length together, batches in an order drawn for the epoch."""
    random = np.random.default_rng([seed, epoch])
    noisy = np.array([clip.length for clip in clips]) * random.uniform(0.9, 1.1, len(clips))
    result: list[list[int]] = [[]]
    longest = 0
    for index in np.argsort(noisy):
        longest = max(longest, clips[index].length)
        if result[-1] and longest * (len(result[-1]) + 1) > frames_per_batch:
            result.append([])
            longest = clips[index].length
        result[-1].append(int(index))
    return [result[i] for i in random.permutation(len(result))]


def padded_frames(clips: Sequence[Clip]) -> tuple[Tensor, Tensor]:
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
        row[:, first : first + int(torch.randint(0, MASKED_FEATURES, ()))] = 0.0
    return frames


def posteriors(projector: Projector, readout: Readout, frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(speech embeddings (B, T, E), log-probabilities (B, T, 1 + V)) of (B, 4 T, D) frames."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        speech, blank = projector(frames, lengths)
        return speech, readout.log_probs(speech, blank)


def ctc_loss(log_probs: Tensor, lengths: Tensor, targets: Sequence[Tensor]) -> Tensor:
    """CTC loss per target token of (B, T, 1 + V) log-probabilities, where `lengths` (B,) count frames.

    `targets` are read-out classes; an empty one teaches blank. A text too long for its frames costs nothing.
    """
    loss = torch.nn.functional.ctc_loss(
        log_probs.transpose(0, 1),
        torch.nn.utils.rnn.pad_sequence(list(targets), batch_first=True),
        (lengths + 3) // 4,
        torch.tensor([len(t) for t in targets]),
        blank=BLANK,
        reduction="sum",
        zero_infinity=True,
    )
    return loss / max(1, sum(len(t) for t in targets))
