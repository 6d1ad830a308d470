import pytest
import torch
from torch import nn

from svbatch.packed_linear import PackedLinear, pack, packed

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bfloat16 by oneDNN"
)


@needs_bfloat16
@pytest.mark.parametrize("tokens", [1, 2, 7, 64, 300])
@pytest.mark.parametrize("has_bias", [True, False])
def test_a_packed_layer_gives_the_same_numbers_bit_by_bit(tokens, has_bias):
    torch.manual_seed(tokens)
    linear = nn.Linear(96, 200, bias=has_bias, dtype=torch.bfloat16)
    states = torch.randn(1, tokens, 96, dtype=torch.bfloat16)
    with torch.inference_mode():
        assert isinstance(packed(linear), PackedLinear)
        assert torch.equal(packed(linear)(states), linear(states))


@needs_bfloat16
def test_every_linear_layer_inside_is_packed_and_no_other_is_touched():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.ReLU(), nn.Linear(4, 4)), nn.LayerNorm(4))
    pack(model.to(torch.bfloat16))
    kinds = [type(part).__name__ for part in model.modules() if not list(part.children())]
    assert kinds == ["PackedLinear", "ReLU", "PackedLinear", "LayerNorm"]


def test_float32_stays_as_it_is():
    model = nn.Sequential(nn.Linear(4, 4))
    pack(model)
    assert type(model[0]) is nn.Linear
    assert packed(model[0]) is model[0]
