import torch
from hypothesis import given
from hypothesis import strategies as st

from svbatch.language.new_tokens import NewTokens

CPU = torch.device("cpu")


@given(counts=st.lists(st.integers(1, 6), min_size=1, max_size=6))
def test_tokens_in_a_line_stand_in_their_rows_and_come_back(counts):
    new = NewTokens.lines(counts, CPU)
    states = torch.arange(1.0, 1 + sum(counts))[:, None]
    padded = new.by_row(states)
    assert padded.shape == (len(counts), max(counts), 1)
    expected = iter(states.flatten().tolist())
    for row, count in zip(padded[..., 0].tolist(), counts, strict=True):
        assert row == [next(expected) for _ in range(count)] + [0.0] * (max(counts) - count)
    assert torch.equal(new.in_line(padded), states)


def test_positions_seen_are_those_before_and_the_own_branch():
    assert NewTokens.lines([2, 1], CPU).num_seen(torch.tensor([10, 20])) == (10 + 1) + (10 + 2) + (20 + 1)
    tree = NewTokens.alike(2, torch.tensor([0, 1, 1]), torch.tensor([[1, 0, 0], [1, 1, 0], [1, 0, 1]]).bool())
    assert tree.num_seen(torch.tensor([10, 20])) == 3 * 30 + 2 * (1 + 2 + 2)
