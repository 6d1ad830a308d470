"""Spans of sound as everything that questions need of them: one pass of encoder, projector and recogniser."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from svbatch.model import Model
from svbatch.speech.alignment import Word, word_times
from svbatch.speech.encoder import encode, num_frames
from svbatch.speech.projector import num_embeddings
from svbatch.speech.readout import BLANK, spoken_form
from svbatch.speech.recogniser import Transcript
from svbatch.speech.spotting import Spotted, spot
from svbatch.timing import part

# A read-out with few tokens for the span's length is doubted by the recogniser too; both limits were chosen on training
# recordings. Of 175 noises there the read-out alone finds 171 empty, the rule 172; of 230 spans of speech 1 and 5.
SPARSE_EMBEDDINGS = 12
MAX_DOUBT = 1.5
EMBEDDING_SAMPLES = 1280  # 12.5 speech embeddings a second
WINDOWS_AT_ONCE = 8  # more are no faster on a CPU, and each takes 70 MB


@dataclass(frozen=True)
class Hearing:
    """One span heard; `start_s` is where it starts in its recording.

    `speech` (K, E) are the embeddings that the LLM is given, out of `embeddings` (T, E), with the tone before them.
    `readings` are what the read-out made of them, None where the bundle has none. `transcript` is None where none was
    wanted or possible. `voice` (N,) are the log-probabilities of the labels that are read from the voice, task after
    task, None where the bundle reads none.
    """

    start_s: float
    speech: Tensor
    embeddings: Tensor
    readings: "Readings | None"
    transcript: Transcript | None
    voice: Tensor | None = None

    @property
    def read(self) -> list[int]:
        """Token ids of the read-out; none without one."""
        return self.readings.ids if self.readings else []

    @property
    def has_speech(self) -> bool:
        """Whether anything is said: the read-out has tokens, and the recogniser agrees where they are few."""
        if self.readings is None:  # the sound was loud enough, and nothing else can tell
            return self.transcript is None or bool(self.transcript.text)
        if self.transcript is None:
            return bool(self.read)
        doubt = 2 * (self.transcript.no_speech_probability or 0.0) - self.transcript.avg_logprob
        is_sparse = len(self.read) * SPARSE_EMBEDDINGS < len(self.embeddings)
        return bool(self.read) and bool(self.transcript.text) and not (is_sparse and doubt > MAX_DOUBT)

    @property
    def text(self) -> str:
        """What the recogniser wrote; empty if nothing is said."""
        return self.transcript.text if self.transcript is not None and self.has_speech else ""


@dataclass(frozen=True)
class Readings:
    """The read-out of T embeddings: token ids, blank logits (T,), and of its classes log(sum(exp(logits))) and the
    highest log-probability, (T,) each."""

    ids: list[int]
    blank: Tensor
    normaliser: Tensor
    highest: Tensor


@dataclass(frozen=True)
class Span:
    """A piece of a recording: `waveform` (S,) of up to 30 s at 16 kHz, which starts at `start_s` of its recording.
    `transcribed`: whether its words are wanted, or only its sound."""

    waveform: NDArray[np.float32]
    start_s: float
    transcribed: bool


def hear(spans: Sequence[Span], model: Model) -> list[Hearing]:
    """What is heard in each span, in their order. The recogniser is asked only where the read-out found a word."""
    parts = [_sound(spans[start : start + WINDOWS_AT_ONCE], model) for start in range(0, len(spans), WINDOWS_AT_ONCE)]
    frames = np.concatenate([frames for frames, _ in parts])
    hearings = [hearing for _, some in parts for hearing in some]
    wanted = [i for i, span in enumerate(spans) if span.transcribed and hearings[i].has_speech]
    if model.recogniser is not None and wanted:
        with part("recogniser"):
            transcripts = model.recogniser.transcribe(torch.from_numpy(frames[wanted]))
        for i, transcript in zip(wanted, transcripts, strict=True):
            hearings[i] = replace(hearings[i], transcript=transcript)
    return hearings


def _sound(spans: Sequence[Span], model: Model) -> tuple[NDArray[np.float32], list[Hearing]]:
    """Frames (B, 1500, D) of the spans' windows, and hearings without transcripts."""
    with part("encoder"):
        frames = encode(model.encoder, [span.waveform for span in spans])
    with part("projector"):
        return frames, _read(frames, spans, model)


def _read(frames: NDArray[np.float32], spans: Sequence[Span], model: Model) -> list[Hearing]:
    """Hearings without transcripts, from the frames (B, 1500, D) of the spans' windows."""
    lengths = [num_frames(len(span.waveform), model.frame_samples) for span in spans]
    sound = np.zeros_like(frames[:, : max(lengths)])
    for row, source, length in zip(sound, frames, lengths, strict=True):
        row[:length] = source[:length]
    projected = model.projector.run({"frames": sound, "lengths": np.array(lengths, dtype=np.int64)})
    hearings = []
    for i, (span, length) in enumerate(zip(spans, lengths, strict=True)):
        size = num_embeddings(length, EMBEDDING_SAMPLES // model.frame_samples)
        embeddings = torch.from_numpy(projected["embeddings"][i, :size])
        if model.readout is None:
            hearings.append(Hearing(span.start_s, embeddings, embeddings, readings=None, transcript=None))
            continue
        blank = torch.from_numpy(projected["blank"][i, :size])
        log_probs = model.readout.log_probs(embeddings[None], blank[None])[0]
        readings = Readings(
            ids=model.readout.greedy(log_probs),
            blank=blank,
            normaliser=blank - log_probs[:, BLANK],
            highest=log_probs.max(dim=1).values,
        )
        spoken = model.readout.spoken(embeddings, log_probs)
        if "tone" in projected:
            spoken = torch.cat([torch.from_numpy(projected["tone"][i]), spoken])
        voice = torch.from_numpy(projected["labels"][i]) if "labels" in projected else None
        hearings.append(Hearing(span.start_s, spoken, embeddings, readings, transcript=None, voice=voice))
    return hearings


def log_probs_of(hearing: Hearing, model: Model) -> Tensor:
    """The read-out's log-probabilities of a hearing, (T, 1 + V); the bundle has a read-out."""
    assert model.readout is not None
    assert hearing.readings is not None
    return model.readout.log_probs(hearing.embeddings[None], hearing.readings.blank[None])[0]


def spotted_words(words: Sequence[str], hearings: Sequence[Hearing], model: Model) -> list[list[Spotted | None]]:
    """Where in each hearing each of `words` is likeliest, and how likely; starts in seconds of the recording. None each
    without a read-out."""
    if model.readout is None or not hearings:
        return [[None] * len(words) for _ in hearings]
    with part("alignment"):
        classes, log_probs = zip(*(_posteriors(words, hearing, model) for hearing in hearings), strict=True)
        highest = [hearing.readings.highest.numpy() for hearing in hearings if hearing.readings is not None]
        found = spot(classes[0], log_probs, highest)
    return [
        [s and replace(s, start=s.start + hearing.start_s) for s in own]
        for own, hearing in zip(found, hearings, strict=True)
    ]


def timed_words(text: str, hearing: Hearing, model: Model) -> list[Word]:
    """The words of `text` with times in seconds of the recording, by forced alignment to the read-out; none without."""
    if hearing.readings is None:
        return []
    words = text.split()
    with part("alignment"):
        timed = word_times(words, *_posteriors(words, hearing, model))
    return [Word(w.word, w.start + hearing.start_s, w.end + hearing.start_s) for w in timed]


def text_logprob(text: str, hearing: Hearing, model: Model) -> float:
    """log p of `text` by the read-out's CTC over the whole hearing, which has one; -inf where it cannot be written."""
    with part("alignment"):
        words, log_probs = _posteriors(text.split(), hearing, model)
        targets = torch.tensor([[label for word in words for label in word]], dtype=torch.int64)
        lengths = torch.tensor([len(log_probs)]), torch.tensor([targets.shape[1]])
        loss = torch.nn.functional.ctc_loss(torch.from_numpy(log_probs)[:, None], targets, *lengths, reduction="sum")
    return -float(loss)


def _posteriors(words: Sequence[str], hearing: Hearing, model: Model) -> tuple[list[list[int]], NDArray[np.float32]]:
    """The read-out's classes of each of `words`, and the log-probabilities of just these, (T, 1 + classes)."""
    assert model.readout is not None
    assert hearing.readings is not None
    ids = [model.tokenizer.encode(spoken_form(word), add_special_tokens=False).ids for word in words]
    classes = [model.readout.classes(i) for i in ids]
    used = sorted({c for word in classes for c in word})
    place = {c: 1 + i for i, c in enumerate(used)}
    log_probs = model.readout.some_log_probs(
        hearing.embeddings, hearing.readings.blank, hearing.readings.normaliser, used
    )
    return [[place[c] for c in word] for word in classes], log_probs.numpy()
