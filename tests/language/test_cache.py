import torch
from hypothesis import given
from hypothesis import strategies as st

from svbatch.language.cache import KeyValueCache, closed_up
from svbatch.language.new_tokens import NewTokens


def lines(*counts: int) -> NewTokens:
    return NewTokens.lines(counts, torch.device("cpu"))


def test_each_row_is_written_behind_its_own_end_and_grows_as_needed():
    cache = KeyValueCache([(torch.zeros(2, 1, 3, 1), torch.zeros(2, 1, 3, 1))])
    new = torch.tensor([5.0, 6.0, 7.0, 8.0]).view(1, 1, 4, 1)
    cache.aim(torch.tensor([0, 3]), lines(2, 2))
    keys, values = cache.update(new, -new, 0)
    assert keys[:, :, :5].flatten(1).tolist() == [[5, 6, 0, 0, 0], [0, 0, 0, 7, 8]]
    assert torch.equal(values, -keys)
    assert cache.capacity == 64
    cache.aim(torch.tensor([0, 64]), lines(1, 1))
    assert cache.capacity == 128
    cache.aim(torch.tensor([5, 3]), lines(1, 1))
    keys, _ = cache.update(new[:, :, ::2], new[:, :, ::2], 0)
    assert keys[:, 0, :6, 0].tolist() == [[5, 6, 0, 0, 0, 5], [0, 0, 0, 7, 8, 0]]


def test_what_is_written_to_a_part_is_in_the_whole():
    cache = KeyValueCache([(torch.zeros(3, 1, 64, 1), torch.zeros(3, 1, 64, 1))])
    part = cache.part(slice(1, 3))
    part.aim(torch.tensor([0, 2]), lines(1, 1))
    part.update(torch.full((1, 1, 2, 1), 9.0), torch.full((1, 1, 2, 1), 8.0), 0)
    keys, values = next(iter(cache))
    assert keys[:, 0, :3, 0].tolist() == [[0, 0, 0], [9, 0, 0], [0, 0, 9]]
    assert values.sum() == 16


def test_selected_rows_are_a_copy_in_the_order_asked_for():
    keys = torch.arange(3.0).view(3, 1, 1, 1)
    cache = KeyValueCache([(keys, keys.clone())])
    some = cache.select(torch.tensor([2, 0]))
    some.aim(torch.tensor([0, 0]), lines(1, 1))
    some.update(torch.full((1, 1, 2, 1), 9.0), torch.full((1, 1, 2, 1), 9.0), 0)
    assert [part[:, :, 0].flatten().tolist() for part in next(iter(some))] == [[9, 9], [9, 9]]
    assert keys.flatten().tolist() == [0, 1, 2]


@given(kept=st.lists(st.booleans(), min_size=1, max_size=12))
def test_rows_that_are_kept_are_all_there_and_few_are_moved(kept):
    rows = [row for row, is_kept in enumerate(kept) if is_kept]
    order = closed_up(rows)
    assert sorted(order) == rows
    assert all(row in (place, *rows[len(set(rows) & set(range(len(rows)))) :]) for place, row in enumerate(order))
    keys = torch.arange(float(len(kept))).view(-1, 1, 1, 1)
    cache = KeyValueCache([(keys.clone(), -keys)])
    cache.keep(torch.tensor(order, dtype=torch.int64))
    assert [part.flatten().tolist() for part in next(iter(cache))] == [order, [-row for row in order]]
