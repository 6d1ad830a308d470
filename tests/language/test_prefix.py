import pytest
import torch

from svbatch.errors import TaskError


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
