import pytest
import torch

from svbatch.errors import TaskError
from svbatch.language.scoring import score_labels


def test_a_prefix_holds_the_keys_and_values_of_a_plain_forward_pass(llm, judge, segments):
    prefix = llm.read(segments)
    assert prefix.batch_size == 7
    assert prefix.lengths.tolist() == [len(rows) for rows in segments]
    for row, embeddings in enumerate(segments):
        with torch.inference_mode():
            plain = judge.model(inputs_embeds=embeddings[None], use_cache=True).past_key_values
        for (keys, values), layer in zip(prefix.cache, plain.layers, strict=True):
            torch.testing.assert_close(keys[row, :, : len(embeddings)], layer.keys[0], atol=1e-5, rtol=0)
            torch.testing.assert_close(values[row, :, : len(embeddings)], layer.values[0], atol=1e-5, rtol=0)


def test_inputs_of_another_precision_are_taken(llm, segments):
    prefix = llm.read([rows.half() for rows in segments])
    assert {part.dtype for pair in prefix.cache for part in pair} == {torch.float32}


def test_a_prefix_past_the_context_is_refused_with_both_numbers(llm):
    with pytest.raises(TaskError, match="1025 positions and the LLM holds 1024"):
        llm.read([torch.zeros(1025, 64)])


def test_what_is_read_on_counts_as_if_it_had_been_read_at_once(llm, segments):
    words = [[40 + row] * (1 + row) for row in range(len(segments))]
    at_once = [torch.cat([rows, llm.embed(torch.tensor(ids))]) for rows, ids in zip(segments, words, strict=True)]
    expected = score_labels(llm, llm.read(at_once), [11, 12], [[20, 2], [21, 22, 2]])
    prefix = llm.read_on(llm.read(segments), words)
    torch.testing.assert_close(score_labels(llm, prefix, [11, 12], [[20, 2], [21, 22, 2]]), expected, atol=1e-4, rtol=0)


def test_a_prefix_read_in_several_passes_is_the_one_read_in_one(llm, segments, monkeypatch):
    expected = score_labels(llm, llm.read(segments), [11, 12], [[20, 2], [21, 22, 2]])
    monkeypatch.setattr("svbatch.language.decoder_only.POSITIONS_AT_ONCE", 80)
    found = score_labels(llm, llm.read(segments), [11, 12], [[20, 2], [21, 22, 2]])
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
