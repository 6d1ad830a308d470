"""The recogniser on a tiny Whisper decoder of random weights and a tokenizer of single bytes."""

import json
import os
from pathlib import Path

import pytest
import soundfile
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import WhisperConfig, WhisperFeatureExtractor
from transformers.models.whisper.configuration_whisper import NON_SPEECH_TOKENS
from transformers.models.whisper.english_normalizer import EnglishTextNormalizer
from transformers.models.whisper.modeling_whisper import WhisperDecoder

from svbatch.errors import BundleError
from svbatch.speech.recogniser import Recogniser, Transcript, find_loop, non_speech_ids
from svbatch.speech.whisper import load_whisper

SPECIAL = ["<|endoftext|>", "<|startoftranscript|>", "<|nocaptions|>", "<|notimestamps|>"]
MAX_TOKENS = 60


@pytest.fixture(scope="module")
def tokenizer_path(tmp_path_factory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer") / "tokenizer.json", SPECIAL)


def write_tokenizer(path: Path, special: list[str]) -> Path:
    """Every byte is a token; the merges keep a lone space from being the first token of a symbol."""
    merges = [("Ġ", "-"), ("Ġ", "'"), ("â", "Ļ"), ("Ġ", "âĻ")]
    tokens = sorted(pre_tokenizers.ByteLevel.alphabet()) + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(path))
    return path


def random_decoder(*, std: float = 0.3, num_ids: int = 264) -> WhisperDecoder:
    """With this `std` what is written follows from the frames, and some rows end early; a small one loops."""
    torch.manual_seed(7)
    config = WhisperConfig(
        vocab_size=num_ids, d_model=64, decoder_layers=2, decoder_attention_heads=2, decoder_ffn_dim=128,
        max_target_positions=2 * MAX_TOKENS, bos_token_id=None, eos_token_id=None, pad_token_id=None,
    )  # fmt: skip
    decoder = WhisperDecoder(config).eval().requires_grad_(False)
    for parameter in decoder.parameters():
        if parameter.dim() > 1:
            parameter.normal_(std=std)
    return decoder


@pytest.fixture(scope="module")
def frames() -> Tensor:
    return torch.randn(8, 30, 64, generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module")
def recogniser(tokenizer_path) -> Recogniser:
    return Recogniser(random_decoder(), tokenizer_path)


def plain_greedy(decoder: WhisperDecoder, tokenizer: Tokenizer, frames: Tensor) -> tuple[list[int], float, float]:
    """Ids, sum of log-probabilities and no-speech probability of one row (T, D); no cache."""
    end_id, start_id, no_speech_id, without_times_id = (tokenizer.token_to_id(name) for name in SPECIAL)
    never = [*non_speech_ids(tokenizer), start_id, no_speech_id, without_times_id]
    never += range(tokenizer.get_vocab_size(), decoder.embed_tokens.num_embeddings)
    ids: list[int] = []
    total = 0.0
    while True:
        prompt = torch.tensor([[start_id, without_times_id, *ids]])
        states = decoder(input_ids=prompt, encoder_hidden_states=frames[None], use_cache=False).last_hidden_state
        logits = states[0] @ decoder.embed_tokens.weight.T
        if not ids:
            no_speech = logits[0].softmax(-1)[no_speech_id].item()
            logits[-1, [end_id, *tokenizer.encode(" ", add_special_tokens=False).ids]] = -torch.inf
        logits[-1, never] = -torch.inf
        best = logits[-1].argmax().item()
        total += logits[-1].log_softmax(-1)[best].item()
        if best == end_id:
            return ids, total, no_speech
        ids.append(best)
        if len(ids) == MAX_TOKENS:
            return ids, total, no_speech


def assert_same(one: Transcript, other: Transcript) -> None:
    assert (one.text, one.ids, one.finish_reason) == (other.text, other.ids, other.finish_reason)
    assert one.sum_logprob == pytest.approx(other.sum_logprob, abs=1e-4)
    assert one.no_speech_probability == pytest.approx(other.no_speech_probability, abs=1e-4)


def test_a_row_alone_is_the_row_in_a_batch(recogniser, frames):
    together = recogniser.transcribe(frames)
    for row, transcript in enumerate(together):
        assert_same(recogniser.transcribe(frames[row : row + 1])[0], transcript)
    for transcript, mirrored in zip(together, reversed(recogniser.transcribe(frames.flip(0))), strict=True):
        assert_same(mirrored, transcript)


def test_each_row_is_what_plain_greedy_decoding_writes(recogniser, tokenizer_path, frames):
    decoder, tokenizer = random_decoder(), Tokenizer.from_file(str(tokenizer_path))
    transcripts = recogniser.transcribe(frames)
    assert len({transcript.num_tokens for transcript in transcripts}) > 3, "rows leave the batch one by one"
    assert {transcript.finish_reason for transcript in transcripts} == {"stop", "length"}
    for row, transcript in enumerate(transcripts):
        ids, total, no_speech = plain_greedy(decoder, tokenizer, frames[row])
        assert transcript.ids == ids
        assert transcript.text == tokenizer.decode(ids).strip()
        assert transcript.finish_reason == ("length" if len(ids) == MAX_TOKENS else "stop")
        assert transcript.sum_logprob == pytest.approx(total, abs=1e-4)
        num_decoded = len(ids) + (transcript.finish_reason == "stop")
        assert transcript.avg_logprob == pytest.approx(total / num_decoded, abs=1e-4)
        assert transcript.no_speech_probability == pytest.approx(no_speech, abs=1e-6)


def test_half_precision_frames_are_heard(recogniser, frames):
    rounded = frames.half()
    for half, full in zip(recogniser.transcribe(rounded), recogniser.transcribe(rounded.float()), strict=True):
        assert_same(half, full)


def test_bfloat16_starts_as_float32_does(recogniser, tokenizer_path, frames):
    rough = Recogniser(random_decoder(), tokenizer_path, dtype=torch.bfloat16)
    for rounded, exact in zip(rough.transcribe(frames), recogniser.transcribe(frames), strict=True):
        assert rounded.no_speech_probability == pytest.approx(exact.no_speech_probability, rel=0.2, abs=1e-3)


def test_a_decoder_that_repeats_itself_is_stopped(tokenizer_path, frames):
    looping = Recogniser(random_decoder(std=0.02), tokenizer_path)
    transcript = looping.transcribe(frames[:1])[0]
    assert transcript.finish_reason == "loop"
    assert 0 < transcript.num_tokens < 10
    assert transcript.avg_logprob == transcript.sum_logprob / transcript.num_tokens


@pytest.mark.parametrize(
    ("ids", "num_kept"),
    [
        ([], None),
        ([5] * 15, None),
        ([5] * 16, 1),
        ([1, 2, 3] + [5] * 16, 4),
        ([1, 2] * 7, None),
        ([1, 2] * 8, 2),
        ([1, 2, 3, 4] * 4, 4),
        ([9, 1, 2, 3, 4, 5] + [1, 2, 3, 4, 5] * 3, 6),
        ([1, 2, 3, 4, 5] * 3 + [1, 2, 3, 4], None),
        ([*range(56)] * 4, 56),
        ([*range(224)], None),
    ],
)
def test_a_loop_is_a_phrase_four_times_in_a_row_and_sixteen_tokens(ids, num_kept):
    assert find_loop(ids) == num_kept


def test_a_tokenizer_that_does_not_fit_is_refused_by_name(tmp_path, tokenizer_path):
    (tmp_path / "broken.json").write_text("{")
    write_tokenizer(tmp_path / "plain.json", SPECIAL[:2])
    for path, num_ids, message in [
        (tmp_path / "missing.json", 264, "missing.json: not a readable tokenizer"),
        (tmp_path / "broken.json", 264, "broken.json: not a readable tokenizer"),
        (tmp_path / "plain.json", 264, "plain.json: has no token <|notimestamps|>"),
        (tokenizer_path, 263, "tokenizer.json: has 264 tokens, but its decoder knows 263"),
        (tokenizer_path, 51_865, "tokenizer.json: its Whisper is multilingual"),
    ]:
        with pytest.raises(BundleError) as error:
            Recogniser(random_decoder(num_ids=num_ids), path)
        assert message in str(error.value)
        assert "\n" not in str(error.value)


def folder(variable: str, holding: str) -> Path:
    if variable not in os.environ:
        pytest.skip(f"{variable} names no folder with {holding}")
    return Path(os.environ[variable])


@pytest.mark.slow
def test_the_symbols_never_written_are_those_of_whisper():
    path = folder("SVBATCH_TEST_WHISPER", "faster-whisper-tiny.en") / "tokenizer.json"
    tokenizer = Tokenizer.from_file(str(path))
    first_special_id = tokenizer.token_to_id("<|endoftext|>")
    assert non_speech_ids(tokenizer) == {i for i in NON_SPEECH_TOKENS if i < first_special_id}


@pytest.mark.slow
def test_six_words_in_a_hundred_of_read_speech_are_wrong_at_most():
    data, whisper = folder("SVBATCH_TEST_DATA", "dev.jsonl"), folder("SVBATCH_TEST_WHISPER", "model.bin")
    jiwer = pytest.importorskip("jiwer")
    rows = [json.loads(line) for line in (data / "dev.jsonl").read_text().splitlines()]
    rows = [row for row in rows if row["source"] == "librispeech_devclean"]
    model, extractor = load_whisper(whisper / "model.bin"), WhisperFeatureExtractor()
    encoded = []
    for row in rows:
        waveform, _ = soundfile.read(data / row["audio"], dtype="float32")
        mel = extractor(waveform, sampling_rate=16_000, return_tensors="pt").input_features
        with torch.inference_mode():
            encoded.append(model.model.encoder(mel).last_hidden_state)
    recogniser = Recogniser(model.model.decoder, whisper / "tokenizer.json")
    transcripts = [t for i in range(0, len(rows), 8) for t in recogniser.transcribe(torch.cat(encoded[i : i + 8]))]
    normalise = EnglishTextNormalizer({})
    references = [normalise(row["text"]) for row in rows]
    assert jiwer.wer(references, [normalise(transcript.text) for transcript in transcripts]) <= 0.06
