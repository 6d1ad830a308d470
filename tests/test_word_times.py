"""Word times of the shipped bundle beside known onsets. Slow: needs espeak-ng, and SVBATCH_TEST_DATA for the joins.

The rival is what other tools do with the same recogniser: dynamic time warping over its decoder's cross-attention
(the heads that OpenAI lists for tiny.en), median-filtered and normalised as in openai/whisper's timing.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soxr
import torch

from svbatch.hear import Span, hear, timed_words
from svbatch.model import Model
from svbatch.speech.encoder import encode, num_frames
from svbatch.training.data import read_manifest, read_waveform
from svbatch.training.synthesise import read_sentences
from svbatch.training.voices import choose_voices, missing_packages, speak_with_word_times

pytestmark = pytest.mark.slow
TOLERANCE_S = 0.1
HEADS = [(1, 0), (2, 0), (2, 5), (3, 0), (3, 1), (3, 2), (3, 3), (3, 4)]
SENTENCES = Path(__file__).parents[1] / "jobs" / "train" / "sentences"
VOICES = ["en-us+f3", "en-us+m2", "en+f4", "en+m5", "en-gb-scotland+m1", "en-us"]


@dataclass
class Spoken:
    """A waveform at 16 kHz with its words; the start in seconds of each, None where it is not known."""

    waveform: np.ndarray
    words: list[str]
    starts: list[float | None]


@pytest.fixture(scope="module")
def synthesised() -> list[Spoken]:
    if missing := missing_packages(choose_voices(["espeak-ng"])):
        pytest.skip(f"needs Debian's {', '.join(missing)}")
    plain = [text for text, _ in read_sentences(sorted(SENTENCES.glob("*.txt")))]
    spoken = []
    for i, text in enumerate(plain[:: max(1, len(plain) // 72)][:72]):
        samples, rate_hz, words = speak_with_word_times(text, VOICES[i % len(VOICES)], rate=0.9 + 0.05 * (i % 5))
        waveform = soxr.resample(samples, rate_hz, 16_000).astype(np.float32)
        spoken.append(Spoken(waveform, [word for word, _ in words], [start for _, start in words]))
    return spoken


@pytest.fixture(scope="module")
def joins(held_out_data) -> list[Spoken]:
    """Dev clips in threes: the first word of the second and third starts where its clip grows loud."""
    examples = [e for e in read_manifest(held_out_data / "dev.jsonl") if e.source == "librispeech_devclean" and e.text]
    random = np.random.default_rng(0)
    clips = [(read_waveform(e.path), (e.text or "").split()) for e in examples]
    short = [i for i, (waveform, _) in enumerate(clips) if len(waveform) < 9.5 * 16_000]
    made = []
    for _ in range(100):
        waveform, words, starts = np.zeros(0, np.float32), list[str](), list[float | None]()
        for i in random.choice(short, 3, replace=False):
            clip, text = clips[i]
            onset = _onset(clip)
            starts += [(len(waveform) + onset) / 16_000 if len(waveform) else None, *[None] * (len(text) - 1)]
            words += text
            waveform = np.concatenate([waveform, clip])
        made.append(Spoken(waveform, words, starts))
    return made


def _onset(waveform: np.ndarray) -> int:
    """The sample at which 10 ms of sound first rise to within 30 dB of the loudest."""
    power = (waveform[: len(waveform) // 160 * 160].reshape(-1, 160) ** 2).mean(axis=1)
    return 160 * int(np.argmax(power > power.max() / 1000))


def within(spoken: Sequence[Spoken], starts: Sequence[Sequence[float]]) -> float:
    """Share of the known words whose start is within TOLERANCE_S."""
    errors = [
        abs(found - known)
        for one, own in zip(spoken, starts, strict=True)
        for known, found in zip(one.starts, own, strict=True)
        if known is not None
    ]
    assert len(errors) > 150
    return float(np.mean(np.array(errors) <= TOLERANCE_S))


def by_read_out(spoken: Sequence[Spoken], model: Model) -> list[list[float]]:
    with torch.inference_mode():
        hearings = [hear([Span(one.waveform, 0.0, transcribed=False)], model)[0] for one in spoken]
        texts = [" ".join(one.words) for one in spoken]
        return [[w.start for w in timed_words(text, h, model)] for text, h in zip(texts, hearings, strict=True)]


def by_cross_attention(spoken: Sequence[Spoken], model: Model) -> list[list[float]]:
    recogniser = model.recogniser
    assert recogniser is not None
    decoder, tokenizer = recogniser._decoder, recogniser._tokenizer
    starts = []
    for one in spoken:
        pieces = [tokenizer.encode(f" {word}", add_special_tokens=False).ids for word in one.words]
        ids = [*recogniser._prompt, *(i for piece in pieces for i in piece), recogniser._end_id]
        frames = torch.from_numpy(encode(model.encoder, [one.waveform]))
        with torch.inference_mode():
            out = decoder(torch.tensor([ids]), encoder_hidden_states=frames, output_attentions=True, use_cache=False)
        heads = torch.stack([out.cross_attentions[layer][0, head] for layer, head in HEADS])
        weights = heads[:, :, : num_frames(len(one.waveform))]
        weights = weights / weights.sum(-1, keepdim=True)  # as if the padding had not been attended to
        scaled = ((weights - weights.mean(1, keepdim=True)) / weights.std(1, keepdim=True)).numpy()
        padded = np.pad(scaled, ((0, 0), (0, 0), (3, 3)), mode="reflect")
        filtered = np.median(np.lib.stride_tricks.sliding_window_view(padded, 7, axis=2), axis=3)
        matrix = filtered.mean(axis=0)[len(recogniser._prompt) - 1 : -1]  # each row is where the next token is found
        first = _first_frames(-matrix)
        places = np.cumsum([0, *map(len, pieces)])[:-1]
        starts.append([first[place] * 0.02 for place in places])
    return starts


def _first_frames(cost: np.ndarray) -> np.ndarray:
    """Dynamic time warping of N tokens to T frames: the first frame of each token on the cheapest path."""
    tokens, frames = cost.shape
    total = np.full((tokens + 1, frames + 1), np.inf)
    total[0, 0] = 0.0
    for i in range(1, tokens + 1):
        for j in range(1, frames + 1):
            total[i, j] = cost[i - 1, j - 1] + min(total[i - 1, j - 1], total[i - 1, j], total[i, j - 1])
    first = np.zeros(tokens, dtype=int)
    i, j = tokens, frames
    while i > 0 and j > 0:
        first[i - 1] = j - 1
        step = int(np.argmin([total[i - 1, j - 1], total[i - 1, j], total[i, j - 1]]))
        i, j = i - (step < 2), j - (step != 1)
    return first


@pytest.mark.parametrize("kind", ["synthesised", "joins"])
def test_four_words_in_five_start_within_100_ms_and_no_fewer_than_by_cross_attention(kind, request, mini) -> None:
    spoken = request.getfixturevalue(kind)
    ours = within(spoken, by_read_out(spoken, mini))
    theirs = within(spoken, by_cross_attention(spoken, mini))
    print(f"{kind}: read-out {ours:.1%}, cross-attention {theirs:.1%}")
    assert ours >= 0.8
    assert ours >= theirs
