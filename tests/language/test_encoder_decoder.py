import pytest
import torch
from torch import Tensor
from transformers import T5Config, T5ForConditionalGeneration

from svbatch.errors import BundleError, TaskError
from svbatch.language.decoding import Question, greedy
from svbatch.language.encoder_decoder import EncoderDecoder
from svbatch.language.scoring import score_labels, score_many
from svbatch.language.weights import load_language_model

END = 1
INSTRUCTION = [11, 12, 13]
LABELS = [[20, END], [20, 21, END], [20, 21, 22, END], [23, END], [24, 25, 26, END]]


def tiny_t5(*, is_first_version: bool) -> T5ForConditionalGeneration:
    """Of T5's first version (tied, scaled output) or of 1.1 and Flan-T5 (gated, output layer of its own)."""
    torch.manual_seed(3)
    config = T5Config(
        vocab_size=300,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=20,
        feed_forward_proj="relu" if is_first_version else "gated-gelu",
        tie_word_embeddings=is_first_version,
        scale_decoder_outputs=is_first_version,
        initializer_factor=1.0,
        decoder_start_token_id=0,
        eos_token_id=END,
        pad_token_id=0,
    )
    return T5ForConditionalGeneration(config).eval()


@pytest.fixture(scope="module", params=[True, False], ids=["first", "1.1"])
def model(request) -> T5ForConditionalGeneration:
    return tiny_t5(is_first_version=request.param)


@pytest.fixture(scope="module")
def t5(model) -> EncoderDecoder:
    return EncoderDecoder(model)


def plain(model: T5ForConditionalGeneration, prefix: Tensor, instruction: list[int], said: list[int]) -> Tensor:
    """Log-probabilities of every next token after each of `said`, by transformers' own forward pass of one prompt."""
    with torch.inference_mode():
        embedded = model.get_input_embeddings()(torch.tensor(instruction))
        logits = model(
            inputs_embeds=torch.cat([prefix, embedded])[None], decoder_input_ids=torch.tensor([[0, *said]])
        ).logits
    return logits[0].log_softmax(-1)


def test_label_scores_are_sums_over_a_plain_forward_pass_of_each(t5, model, segments):
    scores = score_labels(t5, t5.read(segments), INSTRUCTION, LABELS)
    for row, prefix in enumerate(segments):
        for column, label in enumerate(LABELS):
            expected = sum(float(p[t]) for p, t in zip(plain(model, prefix, INSTRUCTION, label), label, strict=False))
            assert float(scores[row, column]) == pytest.approx(expected, abs=1e-3)


def test_several_questions_are_scored_as_each_alone_and_in_any_batch(t5, segments):
    questions = [(INSTRUCTION, LABELS), ([30, 31], [[5, END], [6, END]])]
    together = score_many(t5, t5.read(segments), questions)
    for question, scores in zip(questions, together, strict=True):
        alone = torch.cat([score_labels(t5, t5.read([rows]), *question) for rows in segments])
        torch.testing.assert_close(scores, alone, atol=1e-4, rtol=0)


def test_greedy_answers_are_those_of_plain_forward_passes_with_and_without_a_draft(t5, model, segments):
    segments = [20 * rows for rows in segments]  # far apart, so that answers differ
    [found] = greedy(t5, t5.read(segments), [Question(INSTRUCTION, 12)], end_id=END)
    for prefix, answer in zip(segments, found, strict=True):
        said: list[int] = []
        while len(said) < 12 and END not in said:
            said.append(int(plain(model, prefix, INSTRUCTION, said)[-1].argmax()))
        assert answer.ids == [token for token in said if token != END]
    if not model.config.tie_word_embeddings:  # a tied random one repeats its first token
        assert len({tuple(answer.ids) for answer in found}) > 1
    drafts = [[*answer.ids[:4], 9, *answer.ids[4:]] for answer in found]
    [drafted] = greedy(t5, t5.read(segments), [Question(INSTRUCTION, 12, drafts=drafts)], end_id=END)
    assert [answer.ids for answer in drafted] == [answer.ids for answer in found]
    assert [a.sum_logprob for a in drafted] == pytest.approx([a.sum_logprob for a in found], abs=1e-3)


def test_questions_asked_together_are_answered_as_each_alone(t5, segments):
    segments = [20 * rows for rows in segments]
    questions = [Question(INSTRUCTION, 12), Question([30, 31, 32, 33, 34, 35, 36], 9)]
    together = greedy(t5, t5.read(segments), questions, end_id=END)
    for question, found in zip(questions, together, strict=True):
        [alone] = greedy(t5, t5.read(segments), [question], end_id=END)
        assert [answer.ids for answer in found] == [answer.ids for answer in alone]
        assert [a.sum_logprob for a in found] == pytest.approx([a.sum_logprob for a in alone], abs=1e-3)


def test_what_is_read_on_counts_as_if_it_had_been_read_at_once(t5, segments):
    words = [[40 + row] * (1 + row) for row in range(len(segments))]
    at_once = [torch.cat([rows, t5.embed(torch.tensor(ids))]) for rows, ids in zip(segments, words, strict=True)]
    expected = score_labels(t5, t5.read(at_once), INSTRUCTION, LABELS)
    prefix = t5.read_on(t5.read(segments), words)
    torch.testing.assert_close(score_labels(t5, prefix, INSTRUCTION, LABELS), expected, atol=1e-4, rtol=0)
    some = prefix.select(torch.tensor([4, 1]))
    torch.testing.assert_close(score_labels(t5, some, INSTRUCTION, LABELS), expected[[4, 1]], atol=1e-4, rtol=0)


def test_a_folder_with_a_t5_is_loaded_as_one(model, t5, segments, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = load_language_model(tmp_path, torch.float32)
    assert isinstance(loaded, EncoderDecoder)
    expected = score_labels(t5, t5.read(segments), INSTRUCTION, LABELS)
    torch.testing.assert_close(score_labels(loaded, loaded.read(segments), INSTRUCTION, LABELS), expected)


def test_too_long_a_prompt_is_refused(t5):
    with pytest.raises(TaskError, match="2052 positions and the LLM holds 2048"):
        t5.ask(t5.read([torch.zeros(2049, 64)]), INSTRUCTION)


def test_another_encoder_decoder_is_refused(build_llama):
    with pytest.raises(BundleError, match="llama model; name one of the T5 family"):
        EncoderDecoder(build_llama())
