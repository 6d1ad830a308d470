"""The conventional system of tasks that hear the sound alone: a small classifier on the frozen encoder's frames.

SpeechVerse 4.1.2: feed-forward, two GRU layers, mean over time, two feed-forward layers, softmax; one for each task.
Sizes and training are ours: the paper does not say. Its training data are tests too (svbatch.training.benchmarks),
made from a manifest of training recordings, so speakers are mixed and silence is made alike on both sides.
"""

import hashlib
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

from svbatch.model import Model
from svbatch.speech.encoder import WINDOW_SAMPLES, encode, num_frames
from svbatch.tasks.answers import label_answers
from svbatch.tasks.task import Task
from svbatch.training.answering import Answered, Batch, answered, of_recording
from svbatch.training.benchmark import Benchmark
from svbatch.training.progress import with_progress

log = logging.getLogger(__name__)
SYSTEM = "classifier"
WIDTH, HIDDEN = 128, 64
BATCH = 16
EPOCHS = 20
LEARNING_RATE = 1e-3
MAX_FRAMES = 500  # of a training recording: 10 s
EVERY_HELD_OUT = 8  # one speaker in so many chooses the epoch
RULE = 1  # of how a classifier is trained; another rule, another file
Frames = NDArray[np.float16]


class FrameClassifier(nn.Module):
    """Frames (B, T, D) with lengths (B,) -> logits (B, C)."""

    def __init__(self, width: int, num_labels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, WIDTH), nn.ReLU(), nn.Dropout(0.2))
        self.gru = nn.GRU(WIDTH, WIDTH, num_layers=2, batch_first=True)
        self.last = nn.Sequential(nn.Linear(WIDTH, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, num_labels))

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        hidden, _ = self.gru(self.first(frames))
        mask = torch.arange(frames.shape[1])[None] < lengths[:, None]
        mean = (hidden * mask[:, :, None]).sum(dim=1) / lengths[:, None]
        logits: Tensor = self.last(mean)
        return logits


def classifiable(test: Benchmark) -> bool:
    """Whether a classifier stands beside a test: one label, told by the sound (or the paper has one: sentiment)."""
    return test.task.answer == "label" and ("transcript" not in test.task.hears or test.name == "sentiment")


def load_classifiers(
    tests: Sequence[Benchmark], training: Sequence[Benchmark], model: Model, encoder_id: str, cache: Path
) -> dict[str, FrameClassifier]:
    """A classifier by test, trained on the test of the same task among `training`, or read if it was before. A test
    whose task is not there, or with other labels, has none."""
    found = {}
    for test in filter(classifiable, tests):
        same = [other for other in training if other.task.definition == test.task.definition]
        if not same or len({item.truth for item in same[0].items}) < 2:
            log.warning("%s: the manifest of --classifiers has no labels for it; it has no classifier", test.name)
            continue
        found[test.name] = _load(same[0], model, encoder_id, cache)
    return found


def classifier_answers(batch: Batch, classifiers: Mapping[str, FrameClassifier], model: Model) -> Iterator[Answered]:
    """What the classifiers answer, heard as the LLM hears: by segment, or by window."""
    for test, items in batch.questions:
        if test.name not in classifiers:
            continue
        for item in items:
            name = test.items[item].recording
            rows = batch.rows(test.task, name)
            spans = [batch.places[row][1] for row in rows]
            sounds = [batch.waveforms[name][span.start : span.end] for span in spans]
            frames = [_frames(sound, model) for sound in sounds]
            with torch.inference_mode():
                answers = [_answer(test.task, _logits(classifiers[test.name], [one])[0]) for one in frames]
            parts = [(answer, span.num_samples) for answer, span in zip(answers, spans, strict=True)]
            yield answered(test, SYSTEM, 0, item, test.task, of_recording(test.task, parts))


def trained(frames: Sequence[Frames], labels: Sequence[int], held_out: Sequence[bool], *, seed: int) -> FrameClassifier:
    """A classifier of frames (T, D) each, at the epoch with the lowest loss on those held out.

    Every class weighs the same, however many recordings it has.
    """
    torch.manual_seed(seed)
    random = np.random.default_rng(seed)
    num_labels = max(labels) + 1
    classifier = FrameClassifier(frames[0].shape[1], num_labels)
    own = [i for i, is_out in enumerate(held_out) if not is_out]
    judges = [i for i, is_out in enumerate(held_out) if is_out] or own
    counts = np.bincount([labels[i] for i in own], minlength=num_labels)
    weight = torch.tensor(len(own) / np.maximum(counts, 1) / num_labels, dtype=torch.float32)
    optimiser = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE, weight_decay=0.01)
    best, best_loss = {k: v.clone() for k, v in classifier.state_dict().items()}, float("inf")
    for _ in with_progress(range(EPOCHS), "classifier"):
        classifier.train()
        order = random.permutation(own)
        for start in range(0, len(order), BATCH):
            some = [int(i) for i in order[start : start + BATCH]]
            logits = _logits(classifier, [_crop(frames[i], random) for i in some])
            optimiser.zero_grad()
            cross_entropy(logits, torch.tensor([labels[i] for i in some]), weight).backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(classifier.parameters(), 1.0)
            optimiser.step()
        classifier.eval()
        with torch.inference_mode():
            judged = torch.cat([_logits(classifier, [frames[i][:MAX_FRAMES]]) for i in judges])
            loss = float(cross_entropy(judged, torch.tensor([labels[i] for i in judges]), weight))
        if loss < best_loss:
            best, best_loss = {k: v.clone() for k, v in classifier.state_dict().items()}, loss
    classifier.load_state_dict(best)
    return classifier.eval()


def _load(training: Benchmark, model: Model, encoder_id: str, cache: Path) -> FrameClassifier:
    labels = training.task.label_names
    what = [RULE, encoder_id, labels, [[item.recording, item.truth] for item in training.items]]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
    path = cache / "classifiers" / f"{training.name}-{key}.safetensors"
    if path.exists():
        weights = load_file(path)
        classifier = FrameClassifier(len(weights["first.0.weight"]), len(weights["last.2.bias"]))
        classifier.load_state_dict(weights)
        return classifier.eval()
    frames = [_frames(item.load()[:WINDOW_SAMPLES], model) for item in with_progress(training.items, training.name)]
    order: dict[str, int] = {}
    speakers = [item.speaker or item.recording for item in training.items]
    for speaker in speakers:
        order.setdefault(speaker, len(order))
    held_out = [order[speaker] % EVERY_HELD_OUT == EVERY_HELD_OUT - 1 for speaker in speakers]
    classifier = trained(frames, [labels.index(item.truth) for item in training.items], held_out, seed=0)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    save_file(classifier.state_dict(), part)
    part.rename(path)
    return classifier


def _frames(waveform: NDArray[np.float32], model: Model) -> Frames:
    return encode(model.encoder, [waveform])[0, : num_frames(len(waveform))].astype(np.float16)


def _crop(frames: Frames, random: np.random.Generator) -> Frames:
    start = int(random.integers(max(1, len(frames) - MAX_FRAMES + 1)))
    return frames[start : start + MAX_FRAMES]


def _logits(classifier: FrameClassifier, frames: Sequence[Frames]) -> Tensor:
    rows = [torch.from_numpy(one.astype(np.float32)) for one in frames]
    logits: Tensor = classifier(pad_sequence(rows, batch_first=True), torch.tensor([len(row) for row in rows]))
    return logits


def _answer(task: Task, logits: Tensor) -> dict[str, object]:
    """As a label's answer of a run."""
    labels = task.label_names[: len(logits)]
    [answer] = label_answers(logits[None].numpy(), labels)
    return answer
