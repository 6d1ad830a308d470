"""The recogniser's transcripts of training clips, for the modes that read one; kept on disk as JSON lines."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from svbatch.onnx import OnnxSession
from svbatch.speech.encoder import encode
from svbatch.speech.recogniser import Recogniser
from svbatch.training.data import Example, fits, waveform_of
from svbatch.training.json_lines import whole_lines
from svbatch.training.progress import with_progress

BATCH = 8
WORDED = {"intent", "keywords", "question", "sentiment", "slots", "translation"}
"""Labels of tasks that are told by the words."""


def recognised(
    examples: Sequence[Example],
    indices: Sequence[int],
    encoder: OnnxSession,
    recogniser: Recogniser,
    cache: Path,
) -> dict[int, str]:
    """Transcript by index of example, for `indices`, each heard alone in its window as in a run.

    What stands in `cache` already is not asked again. Examples past the window are left out.
    """
    done: dict[str, str] = dict(json.loads(line) for line in whole_lines(cache))
    missing = [i for i in indices if examples[i].key not in done]
    with cache.open("a", encoding="utf-8") as file:
        for start in with_progress(range(0, len(missing), BATCH), "transcripts"):
            batch = missing[start : start + BATCH]
            sounds = [waveform_of(examples[i]) for i in batch]
            fitting = [(i, s) for i, s in zip(batch, sounds, strict=True) if fits(len(s))]
            frames = torch.from_numpy(encode(encoder, [sound for _, sound in fitting]))
            for (i, _), transcript in zip(fitting, recogniser.transcribe(frames), strict=True):
                done[examples[i].key] = transcript.text
                file.write(json.dumps([examples[i].key, transcript.text], ensure_ascii=False) + "\n")
            file.flush()
    return {i: done[examples[i].key] for i in indices if examples[i].key in done}


def chosen(examples: Sequence[Example], *, size: int, seed: int) -> list[int]:
    """Indices of `size` English examples to transcribe, drawn at random; half of them, if there are so many, answer a
    task that is told by the words."""
    english = [i for i, e in enumerate(examples) if e.lang == "en"]
    drawn = [english[i] for i in np.random.default_rng(seed).permutation(len(english))]
    worded = [i for i in drawn if not WORDED.isdisjoint(examples[i].labels)]
    others = [i for i in drawn if WORDED.isdisjoint(examples[i].labels)]
    num_worded = max(size - len(others), min(size // 2, len(worded)))
    return worded[:num_worded] + others[: size - num_worded]
