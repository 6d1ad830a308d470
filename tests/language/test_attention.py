import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from svbatch.language.attention import additive_mask, attention
from svbatch.language.new_tokens import NewTokens


def test_a_new_token_sees_its_rows_positions_and_its_own_branch():
    visible = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    mask = additive_mask(torch.tensor([1, 3]), NewTokens.alike(2, torch.zeros(3), visible), 6, torch.float32)
    seen = (mask == 0).int().tolist()
    assert seen == [
        [[[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]]],
        [[[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]],
    ]
    assert set(mask.unique().tolist()) == {0.0, -torch.inf}


@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("block_scores", [100, 3_000_000])
@pytest.mark.parametrize("num_tokens", [1, 5, 64, 65, 150])
def test_attention_in_groups_equals_attention_over_repeated_keys(monkeypatch, num_tokens, block_scores, is_causal):
    monkeypatch.setattr("svbatch.language.attention.BLOCK_SCORES", block_scores)
    generator = torch.Generator().manual_seed(0)
    slots = num_tokens if is_causal else num_tokens + 4
    query = torch.randn(3, 6, num_tokens, 8, generator=generator)
    key, value = (torch.randn(3, 2, slots, 8, generator=generator) for _ in range(2))
    visible = torch.ones(num_tokens, num_tokens, dtype=torch.bool).tril()
    new = NewTokens.alike(3, torch.arange(num_tokens), visible)
    mask = None if is_causal else additive_mask(torch.tensor([4, 1, 2]), new, slots, torch.float32)
    before = [0, 0, 0] if is_causal else [4, 1, 2]
    found = attention(query, key, value, mask, new.counts, before, scaling=0.5)
    repeated = [part.repeat_interleave(3, dim=1) for part in (key, value)]
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask, is_causal=is_causal, scale=0.5)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("is_causal", [True, False])
def test_rows_of_any_lengths_are_given_what_each_is_given_alone(is_causal):
    generator = torch.Generator().manual_seed(0)
    counts = [150, 9, 70, 1, 64, 130, 65]
    before = [0] * len(counts) if is_causal else [4, 90, 1, 300, 2, 0, 64]
    slots = 150 if is_causal else 320
    query = torch.randn(len(counts), 6, 150, 8, generator=generator)
    key, value = (torch.randn(len(counts), 2, slots, 8, generator=generator) for _ in range(2))
    new = NewTokens.lines(counts, torch.device("cpu"))
    mask = None if is_causal else additive_mask(torch.tensor(before), new, slots, torch.float32)
    found = attention(query, key, value, mask, new.counts, before, scaling=0.5)
    for row, (count, first) in enumerate(zip(counts, before, strict=True)):
        end = first + count
        sees = torch.ones(count, end, dtype=torch.bool).tril(first)
        of_groups = [part[row, :, :end].repeat_interleave(3, dim=0) for part in (key, value)]
        alone = scaled_dot_product_attention(query[row, :, :count], *of_groups, attn_mask=sees, scale=0.5)
        torch.testing.assert_close(found[row, :count], alone.transpose(0, 1), atol=2e-6, rtol=1e-6)
