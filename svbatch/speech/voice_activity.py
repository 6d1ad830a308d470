"""Where somebody speaks: silero-vad's probabilities, and the spans that they make.

The graph (`silero_vad_16k_sequence.onnx`, MIT) takes any number of chunks in one call: all but its small LSTM is
computed for every chunk at once, so a long recording keeps all cores busy. What the LSTM remembers is handed from call
to call, so how a recording is divided into calls changes no probability; each recording starts from nothing.
"""

import numpy as np
from numpy.typing import NDArray

from svbatch.onnx import OnnxSession

CHUNK_SAMPLES = 512  # one probability each 32 ms
CONTEXT_SAMPLES = 64  # of the chunk before, given along with each
MEMORY = 128  # width of the LSTM
CHUNKS_PER_CALL = 2048  # 65 s; a call takes about 20 MB

# Chosen on training recordings: a missed word is worse than a heard noise.
SPEECH_BEGINS, SPEECH_ENDS = 0.4, 0.25


def speech_spans(waveform: NDArray[np.float32], session: OnnxSession) -> list[tuple[int, int]]:
    """The spans [start, end) of a waveform (S,) in which somebody speaks, in samples and time order."""
    spans = spans_of(speech_probabilities(waveform, session))
    return [(start * CHUNK_SAMPLES, min(end * CHUNK_SAMPLES, waveform.size)) for start, end in spans]


def spans_of(probabilities: NDArray[np.float32]) -> list[tuple[int, int]]:
    """Speech as spans [start, end) of chunks: it begins where the probability reaches SPEECH_BEGINS, and goes on until
    it falls below SPEECH_ENDS."""
    possible = np.r_[False, probabilities >= SPEECH_ENDS, False]
    edges = np.flatnonzero(possible[1:] != possible[:-1]).tolist()
    surely = probabilities >= SPEECH_BEGINS
    begun = [(start + int(surely[start:end].argmax()), end) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    return [(start, end) for start, end in begun if surely[start]]


def speech_probabilities(waveform: NDArray[np.float32], session: OnnxSession) -> NDArray[np.float32]:
    """The probability that somebody speaks in each 32 ms of a waveform (S,): (ceil(S / 512),)."""
    num_chunks = -(-waveform.size // CHUNK_SAMPLES)
    padded = np.zeros(CONTEXT_SAMPLES + max(num_chunks, 1) * CHUNK_SAMPLES, np.float32)
    padded[CONTEXT_SAMPLES : CONTEXT_SAMPLES + waveform.size] = waveform
    windows = np.lib.stride_tricks.sliding_window_view(padded, CONTEXT_SAMPLES + CHUNK_SAMPLES)[::CHUNK_SAMPLES]
    hidden = cell = np.zeros((1, 1, MEMORY), np.float32)
    probabilities = [np.zeros(0, np.float32)]
    for start in range(0, num_chunks, CHUNKS_PER_CALL):
        found = session.run({"input": windows[start : start + CHUNKS_PER_CALL], "h": hidden, "c": cell})
        probabilities.append(found["speech_probs"])
        hidden, cell = found["hn"], found["cn"]
    return np.concatenate(probabilities)
