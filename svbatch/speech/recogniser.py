"""The recogniser: Whisper's own frozen decoder reads the frames that the encoder gave and writes the transcript.

Covered: greedy decoding of English-only Whispers, in batches, without time stamps. Not covered: multilingual
models, beams, a second try at a higher temperature (what Whisper itself does when a text looks wrong).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from svbatch.errors import BundleError
from svbatch.speech.whisper import MULTILINGUAL_VOCABULARY

START = ("<|startoftranscript|>",)
WITHOUT_TIMES = ("<|notimestamps|>",)
END = ("<|endoftext|>",)
NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # renamed in openai/whisper; files have either

LOOP_REPEATS = 4  # an n-gram this often in a row is a loop ...
LOOP_TOKENS = 16  # ... if that makes so many tokens: "no, no, no, no" is speech

FinishReason = Literal["stop", "length", "loop"]


@dataclass(frozen=True)
class Transcript:
    """What the recogniser wrote of one window.

    `ids` are the text's tokens, without special ones; `sum_logprob` (natural logarithm) is over these and, if it
    finished with "stop", the end. With "length" it was cut at the limit; with "loop" a phrase was repeated without
    end, and the text goes up to where it had been said once. `no_speech_probability` is Whisper's own, at the start.
    """

    text: str
    ids: list[int]
    sum_logprob: float
    finish_reason: FinishReason
    no_speech_probability: float

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def avg_logprob(self) -> float:
        """Per decoded token, the end included; 0 if nothing was decoded."""
        num_decoded = self.num_tokens + (self.finish_reason == "stop")
        return self.sum_logprob / num_decoded if num_decoded else 0.0


class Recogniser:
    """A frozen Whisper decoder, its tokenizer and the ids that it must not write."""

    def __init__(
        self, decoder: WhisperDecoder, tokenizer_path: Path, *, dtype: torch.dtype = torch.float32
    ) -> None:
        """Takes `decoder` over: it is turned into `dtype` in place. BundleError if the two do not fit."""
        num_ids = decoder.embed_tokens.num_embeddings
        if num_ids >= MULTILINGUAL_VOCABULARY:
            raise BundleError(
                f"{tokenizer_path}: the Whisper beside it is multilingual; take an English-only one"
            )
        self.tokenizer = _load_tokenizer(tokenizer_path)
        if self.tokenizer.get_vocab_size() > num_ids:
            raise BundleError(
                f"{tokenizer_path}: {self.tokenizer.get_vocab_size()} tokens, but the decoder beside it has {num_ids}; "
                "take the tokenizer of the same model"
            )
        self._decoder = decoder.to(dtype)
        self._prompt = [self._special_id(START), self._special_id(WITHOUT_TIMES)]
        self._end_id = self._special_id(END)
        self._no_speech_id = self._special_id(NO_SPEECH)
        self._max_tokens = decoder.config.max_target_positions // 2  # as in openai/whisper: 224 of 448
        special = range(self._end_id + 1, num_ids)
        self._never = self._mask([*non_speech_ids(self.tokenizer), *special], num_ids)
        self._not_first = self._mask([self._end_id, *_encode(self.tokenizer, " ")], num_ids)

    @torch.inference_mode()
    def transcribe(self, frames: Tensor) -> list[Transcript]:
        """A transcript for each row of `frames` (B, 1500, D), of any float dtype: the encoder's, on 30 s windows.

        No row depends on another: alone or in a batch, its log-probabilities agree to 1e-4 in float32.
        """
        weight = self._decoder.embed_tokens.weight
        heard = frames.to(weight)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        states = self._step(torch.tensor([self._prompt] * len(heard), device=weight.device), heard, cache)
        at_start = self._logits(states[:, 0]).softmax(-1)[:, self._no_speech_id].tolist()
        hypotheses = [_Hypothesis() for _ in at_start]
        running = list(range(len(hypotheses)))
        logits = self._logits(states[:, -1]) + self._never + self._not_first
        while running:
            logprobs, ids = (
                (logits.max(-1).values - logits.logsumexp(-1)).tolist(),
                logits.argmax(-1).tolist(),
            )
            for i, row in enumerate(running):
                hypotheses[row].add(ids[i], logprobs[i], self._end_id, self._max_tokens)
            kept = [i for i, row in enumerate(running) if hypotheses[row].finish_reason is None]
            order = _keep_rows(cache, kept)
            running = [running[i] for i in order]
            if running:
                last = torch.tensor([[ids[i]] for i in order], device=weight.device)
                logits = self._logits(self._step(last, heard[: len(order)], cache)[:, -1]) + self._never
        return [
            Transcript(
                text=self.tokenizer.decode(hypothesis.ids).strip(),
                ids=hypothesis.ids,
                sum_logprob=sum(hypothesis.logprobs),
                finish_reason=hypothesis.finish_reason or "length",
                no_speech_probability=no_speech,
            )
            for hypothesis, no_speech in zip(hypotheses, at_start, strict=True)
        ]

    def _step(self, ids: Tensor, heard: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """The decoder's states (B, L, D) after ids (B, L), which join the cache; `heard` is read only on the first."""
        output = self._decoder(
            input_ids=ids, encoder_hidden_states=heard, past_key_values=cache, use_cache=True
        )
        states: Tensor = output.last_hidden_state
        return states

    def _logits(self, states: Tensor) -> Tensor:
        """(B, D) -> (B, ids) float32, by the token embeddings, as Whisper ties them."""
        return torch.nn.functional.linear(states, self._decoder.embed_tokens.weight).float()

    def _mask(self, ids: Sequence[int], num_ids: int) -> Tensor:
        mask = torch.zeros(num_ids, device=self._decoder.embed_tokens.weight.device)
        mask[list(ids)] = -torch.inf
        return mask

    def _special_id(self, names: Sequence[str]) -> int:
        for name in names:
            token_id: int | None = self.tokenizer.token_to_id(name)
            if token_id is not None:
                return token_id
        raise BundleError(
            f"the recogniser's tokenizer has no {' or '.join(names)}; take that of an English Whisper"
        )


class _Hypothesis:
    """One row while it is decoded."""

    def __init__(self) -> None:
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.finish_reason: FinishReason | None = None

    def add(self, token_id: int, logprob: float, end_id: int, max_tokens: int) -> None:
        """Takes the next token, and finishes if it is the end, the last that there is room for, or shows a loop."""
        self.logprobs.append(logprob)
        if token_id == end_id:
            self.finish_reason = "stop"
            return
        self.ids.append(token_id)
        num_kept = find_loop(self.ids)
        if num_kept is not None:
            self.finish_reason = "loop"
            del self.ids[num_kept:], self.logprobs[num_kept:]
        elif len(self.ids) == max_tokens:
            self.finish_reason = "length"


def find_loop(ids: Sequence[int]) -> int | None:
    """Up to where `ids` go once the repetitions at their end are dropped, the phrase kept once; None without a loop."""
    for n in range(1, len(ids) // LOOP_REPEATS + 1):
        num_repeated = n * max(LOOP_REPEATS, -(-LOOP_TOKENS // n))
        if len(ids) >= num_repeated and ids[-num_repeated + n :] == ids[-num_repeated:-n]:
            return len(ids) - num_repeated + n
    return None


def non_speech_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids of symbols that stand in subtitles but are not said, which Whisper is kept from writing.

    The rule and the symbols are those of openai/whisper, whisper/tokenizer.py, `non_speech_tokens`: brackets,
    speaker dashes and quotes if they are one token; musical notes by their first token, which all of them share.
    """
    symbols = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』']
    symbols += "<< >> <<< >>> -- --- -( -[ (' (\" (( )) ((( ))) [[ ]] {{ }} ♪♪ ♪♪♪".split()
    notes = [*"♩♪♫♬♭♮♯"]
    ids = {_encode(tokenizer, " -")[0], _encode(tokenizer, " '")[0]}  # allowed inside a word, not before one
    for symbol in symbols + notes:
        for encoded in (_encode(tokenizer, symbol), _encode(tokenizer, f" {symbol}")):
            if len(encoded) == 1 or symbol in notes:
                ids.add(encoded[0])
    return ids


def _keep_rows(cache: EncoderDecoderCache, kept: Sequence[int]) -> list[int]:
    """Drops all rows but those `kept` (ascending); returns which old row each new one is.

    The last rows move into the gaps, so a row of cross-attention (18 MB in tiny.en) is copied at most once per gap.
    """
    gaps = sorted(set(range(len(kept))) - set(kept))
    order = list(range(len(kept)))
    moved = [row for row in kept if row >= len(kept)]
    for gap, row in zip(gaps, moved, strict=True):
        order[gap] = row
    for layer in (*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers):
        for tensor in (layer.keys, layer.values):
            tensor[gaps] = tensor[moved]
        layer.keys, layer.values = layer.keys[: len(kept)], layer.values[: len(kept)]
    return order


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises nothing narrower
        raise BundleError(
            f"{path}: not a tokenizer that can be read: {error}; fetch the bundle again"
        ) from error


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
