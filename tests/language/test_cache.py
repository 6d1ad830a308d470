import torch
from torch.nn.functional import scaled_dot_product_attention

from svbatch.language.cache import KeyValueCache, additive_mask, grouped_attention


def test_a_new_token_sees_its_rows_positions_and_its_own_branch():
    visible = torch.tensor([[True, False, False], [True, True, False], [True, False, True]])
    mask = additive_mask(torch.tensor([1, 3]), visible, torch.float32)
    seen = (mask == 0).int().tolist()
    assert seen == [
        [[[1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 0], [1, 1, 0, 1, 0, 0]]],
        [[[1, 1, 1, 1, 0, 0], [1, 1, 1, 1, 1, 0], [1, 1, 1, 1, 0, 1]]],
    ]
    assert set(mask.unique().tolist()) == {0.0, -torch.inf}


def test_grouped_attention_equals_attention_over_repeated_keys():
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 6, 5, 8, generator=generator)
    key, value = (torch.randn(3, 2, 9, 8, generator=generator) for _ in range(2))
    mask = additive_mask(torch.tensor([4, 1, 2]), torch.ones(5, 5, dtype=torch.bool).tril(), torch.float32)
    found, _ = grouped_attention(torch.nn.Identity(), query, key, value, mask.repeat(1, 1, 3, 1), scaling=0.5)
    repeated = [part.repeat_interleave(3, dim=1) for part in (key, value)]
    expected = scaled_dot_product_attention(query, *repeated, attn_mask=mask, scale=0.5)
    torch.testing.assert_close(found, expected.transpose(1, 2), atol=1e-6, rtol=0)


def test_each_row_is_written_behind_its_own_end_and_grows_as_needed():
    cache = KeyValueCache([(torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 3, 1))])
    new = torch.tensor([[5.0, 6.0], [7.0, 8.0]]).view(2, 1, 2, 1)
    cache.aim(torch.tensor([0, 3]), 2)
    keys, values = cache.update(new, -new, 0)
    assert keys.flatten(1).tolist() == [[5, 6, 0, 0, 0], [0, 0, 0, 7, 8]]
    assert torch.equal(values, -keys)
    assert cache.capacity == 64


def test_selected_rows_are_a_copy_in_the_order_asked_for():
    keys = torch.arange(3.0).view(3, 1, 1, 1)
    cache = KeyValueCache([(keys, keys.clone())])
    some = cache.select(torch.tensor([2, 0]))
    some.aim(torch.tensor([0, 0]), 1)
    some.update(torch.full((2, 1, 1, 1), 9.0), torch.full((2, 1, 1, 1), 9.0), 0)
    assert [part.flatten().tolist() for part in next(iter(some))] == [[9, 9], [9, 9]]
    assert keys.flatten().tolist() == [0, 1, 2]
