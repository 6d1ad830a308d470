"""The recogniser: Whisper's own frozen decoder reads the encoder's frames and writes the transcript.

Covered: greedy decoding of English-only Whispers, in batches, without time stamps. Not covered: multilingual
models, beams, a second try at a higher temperature (what Whisper itself does when a text looks wrong).
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer
from torch import Tensor
from transformers import DynamicCache, EncoderDecoderCache
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from svbatch.errors import BundleError
from svbatch.packed_linear import pack, packed
from svbatch.timing import count

NO_SPEECH = ("<|nospeech|>", "<|nocaptions|>")  # one token under its newer and its older name
MULTILINGUAL_VOCABULARY = 51_865  # ids; the English-only Whispers have one less

LOOP_REPEATS = 4  # a phrase so often in a row is a loop ...
LOOP_TOKENS = 16  # ... if that makes so many tokens: "no, no, no, no" is speech

FinishReason = Literal["stop", "length", "loop"]


@dataclass(frozen=True)
class Transcript:
    """What the recogniser wrote of one window.

    `ids` are the text's tokens, without special ones. `sum_logprob` (natural logarithm) is over these and,
    if it finished with "stop", the end. "length": cut at the limit. "loop": a phrase came again and again; the
    text ends after its first time. `no_speech_probability` is what Whisper itself gives before its first word; None
    where something else wrote the transcript.
    """

    text: str
    ids: list[int]
    sum_logprob: float
    finish_reason: FinishReason
    no_speech_probability: float | None

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    @property
    def avg_logprob(self) -> float:
        """Mean over what `sum_logprob` sums."""
        return self.sum_logprob / (self.num_tokens + (self.finish_reason == "stop"))


class Recogniser:
    """A frozen Whisper decoder, its tokenizer and the ids that it must not write."""

    def __init__(self, decoder: WhisperDecoder, tokenizer_path: Path, *, dtype: torch.dtype = torch.float32) -> None:
        """Takes `decoder` over: turns it into `dtype` in place, and stays on its device.

        BundleError if the tokenizer cannot be read, or is not that of this decoder and English-only.
        """
        self._tokenizer = _load_tokenizer(tokenizer_path)
        num_tokens, num_ids = self._tokenizer.get_vocab_size(), decoder.embed_tokens.num_embeddings
        if num_tokens > num_ids:
            raise BundleError(
                f"{tokenizer_path}: has {num_tokens} tokens, but its decoder knows {num_ids}; "
                "take the tokenizer of the same model"
            )
        if num_ids >= MULTILINGUAL_VOCABULARY:
            raise BundleError(f"{tokenizer_path}: its Whisper is multilingual; take an English-only one")
        special_ids = [
            _special_id(self._tokenizer, names, tokenizer_path)
            for names in (["<|startoftranscript|>"], ["<|notimestamps|>"], ["<|endoftext|>"], NO_SPEECH)
        ]
        self._prompt, self._end_id, self._no_speech_id = special_ids[:2], special_ids[2], special_ids[3]
        self._decoder = decoder
        torch.nn.Module.to(decoder, dtype)  # transformers' own `to` has no type
        # The fused kernel is no faster for a query of one position; in bfloat16 on a CPU it is ten times slower.
        decoder.set_attn_implementation("eager")
        self._precision = str(dtype).removeprefix("torch.")
        width, layers = decoder.config.d_model, decoder.config.decoder_layers
        weights = sum(p.numel() for p in decoder.layers.parameters() if p.dim() == 2)
        self._reading_operations = 2.0 * layers * 2 * width**2  # keys and values of each frame
        self._step_operations = 2.0 * (weights - layers * 2 * width**2 + decoder.embed_tokens.weight.numel())
        self._seeing_operations = 4.0 * layers * width  # of one token and one frame
        output = torch.nn.Linear(width, num_ids, bias=False, device="meta")
        output.weight = decoder.embed_tokens.weight
        self._project = packed(output)
        pack(decoder.layers)
        self._max_tokens = decoder.config.max_target_positions // 2  # as openai/whisper: 224 of 448
        never = [
            *non_speech_ids(self._tokenizer),
            *range(self._end_id + 1, num_ids),
        ]  # special ids are the last
        self._never = torch.zeros(num_ids, device=decoder.device)
        self._never[never] = -torch.inf
        self._not_first = torch.zeros(num_ids, device=decoder.device)
        self._not_first[[self._end_id, *_encode(self._tokenizer, " ")]] = -torch.inf

    @torch.inference_mode()
    def transcribe(self, frames: Tensor) -> list[Transcript]:
        """A transcript of each row of `frames` (B > 0, 1500, D or more), from 30 s windows, in any float dtype. Of a
        frame the encoder's last layer is read, which comes first.

        No row depends on another: alone or in a batch, its log-probabilities agree to 1e-4 in float32.
        """
        heard = frames[:, :, : self._decoder.config.d_model].to(self._decoder.embed_tokens.weight)
        count(self._reading_operations * heard.shape[0] * heard.shape[1], self._precision)
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        prompt = torch.tensor(self._prompt, device=heard.device).expand(len(heard), -1)
        at_start, logits = self._logits(prompt, heard, cache).unbind(1)
        no_speech = at_start.softmax(-1)[:, self._no_speech_id].tolist()
        logits = logits + self._not_first
        hypotheses = [_Hypothesis() for _ in no_speech]
        running = hypotheses
        while running:
            logits = logits + self._never
            highest, best = logits.max(-1)
            ids, logprobs = best.tolist(), (highest - logits.logsumexp(-1)).tolist()
            for hypothesis, token_id, logprob in zip(running, ids, logprobs, strict=True):
                hypothesis.add(token_id, logprob, self._end_id, self._max_tokens)
            rows = _keep_rows(cache, [row for row, it in enumerate(running) if it.finish_reason is None])
            running = [running[row] for row in rows]
            if running:
                logits = self._logits(best[rows, None], heard[: len(rows)], cache)[:, -1]
        return [
            Transcript(
                text=self._tokenizer.decode(hypothesis.ids).strip(),
                ids=hypothesis.ids,
                sum_logprob=sum(hypothesis.logprobs),
                finish_reason=hypothesis.finish_reason or "length",
                no_speech_probability=probability,
            )
            for hypothesis, probability in zip(hypotheses, no_speech, strict=True)
        ]

    def _logits(self, ids: Tensor, heard: Tensor, cache: EncoderDecoderCache) -> Tensor:
        """(B, L) ids, which join the cache -> (B, L, ids) float32; `heard` is read while that is empty."""
        count(ids.numel() * (self._step_operations + self._seeing_operations * heard.shape[1]), self._precision)
        output = self._decoder(input_ids=ids, encoder_hidden_states=heard, cache=cache, use_cache=True)
        logits: Tensor = self._project(output.last_hidden_state)
        return logits.float()


@dataclass
class _Hypothesis:
    """One row while it is decoded."""

    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    finish_reason: FinishReason | None = None

    def add(self, token_id: int, logprob: float, end_id: int, max_tokens: int) -> None:
        """Takes the next token; finishes if it is the end, closes a loop or is the last that fits."""
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
    """How many of `ids` to keep if they end in a loop, its phrase once among them; None if they do not."""
    for n in range(1, len(ids) // LOOP_REPEATS + 1):
        span = n * max(LOOP_REPEATS, -(-LOOP_TOKENS // n))
        if span <= len(ids) and ids[len(ids) - span + n :] == ids[len(ids) - span : -n]:
            return len(ids) - span + n
    return None


def non_speech_ids(tokenizer: Tokenizer) -> set[int]:
    """Ids of symbols that stand in subtitles but are not said, which Whisper is kept from writing.

    The rule and the symbols are those of openai/whisper, whisper/tokenizer.py, `non_speech_tokens`: brackets,
    dashes and the like where one token says them; musical notes by their first token, which they all share.
    """
    symbols = [*'"#()*+/:;<=>@[\\]^_`{|}~「」『』']
    symbols += ["<<", ">>", "<<<", ">>>", "--", "---", "-(", "-[", "('", '("', "((", "))", "(((", ")))"]
    symbols += ["[[", "]]", "{{", "}}", "♪♪", "♪♪♪"]
    notes = [*"♩♪♫♬♭♮♯"]
    ids = {_encode(tokenizer, " -")[0], _encode(tokenizer, " '")[0]}  # fine inside a word, not before one
    for symbol in symbols + notes:
        for encoded in (_encode(tokenizer, symbol), _encode(tokenizer, f" {symbol}")):
            if len(encoded) == 1 or symbol in notes:
                ids.add(encoded[0])
    return ids


def _keep_rows(cache: EncoderDecoderCache, kept: Sequence[int]) -> list[int]:
    """Drops all rows but those `kept` (ascending); returns which old row each new one is.

    The last rows move into the gaps, so of the cross-attention (18 MB a row in tiny.en) little is copied.
    """
    gaps = sorted(set(range(len(kept))) - set(kept))
    moved = [row for row in kept if row >= len(kept)]
    layers: list[Any] = [*cache.self_attention_cache.layers, *cache.cross_attention_cache.layers]
    for layer in layers:
        for states in (layer.keys, layer.values):
            states[gaps] = states[moved]
        layer.keys, layer.values = layer.keys[: len(kept)], layer.values[: len(kept)]
    rows = list(range(len(kept)))
    for gap, row in zip(gaps, moved, strict=True):
        rows[gap] = row
    return rows


def _load_tokenizer(path: Path) -> Tokenizer:
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # its Rust side raises nothing narrower
        raise BundleError(f"{path}: not a readable tokenizer ({error}); fetch the bundle again") from error


def _special_id(tokenizer: Tokenizer, names: Sequence[str], path: Path) -> int:
    for name in names:
        token_id: int | None = tokenizer.token_to_id(name)
        if token_id is not None:
            return token_id
    raise BundleError(f"{path}: has no token {' or '.join(names)}; take the tokenizer of a Whisper")


def _encode(tokenizer: Tokenizer, text: str) -> list[int]:
    ids: list[int] = tokenizer.encode(text, add_special_tokens=False).ids
    return ids
