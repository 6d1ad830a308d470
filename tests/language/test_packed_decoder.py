import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm

from svbatch.language.packed_decoder import PackedGate, PackedNorm, pack_decoder
from svbatch.packed_linear import PackedLinear

needs_bfloat16 = pytest.mark.skipif(
    not torch.ops.mkldnn._is_mkldnn_bf16_supported(), reason="this processor does not multiply bfloat16 by oneDNN"
)

SIZES = {
    "hidden_size": 96,
    "intermediate_size": 200,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 50,
}


def llama(**changes):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES, **changes)).to(torch.bfloat16).eval().requires_grad_(False)


def kinds(module):
    return [type(part) for part in module.modules()]


@needs_bfloat16
@pytest.mark.parametrize("tokens", [1, 7, 300])
def test_a_packed_norm_and_gate_are_as_near_to_float32_as_the_layers_they_replace(tokens):
    layer = llama().model.layers[0]
    layer.input_layernorm.weight += torch.rand(96)
    states = 3 * torch.randn(1, tokens, 96, dtype=torch.bfloat16)
    for part, kind in ((layer.input_layernorm, PackedNorm), (layer.mlp, PackedGate)):
        with torch.inference_mode():
            plain, ours = part(states), kind(part)(states)
            exact = part.float()(states.float())
        part.to(torch.bfloat16)
        before = states.clone()
        assert (ours - exact).abs().max() <= 1.05 * (plain - exact).abs().max()
        assert torch.equal(states, before)


@needs_bfloat16
@pytest.mark.parametrize(
    "model",
    [llama(), Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=24)).to(torch.bfloat16).eval().requires_grad_(False)],
    ids=["llama", "qwen3"],
)
def test_a_whole_decoder_is_packed_and_gives_what_it_gave(model):
    ids = torch.arange(40)[None]
    with torch.inference_mode():
        before = model.model(ids).last_hidden_state.float()
        pack_decoder(model.model)
        after = model.model(ids).last_hidden_state.float()
    assert {PackedNorm, PackedGate, PackedLinear} <= set(kinds(model.model))
    assert not [kind for kind in kinds(model.model) if kind is torch.nn.Linear or kind.__name__.endswith("RMSNorm")]
    assert (after - before).abs().mean() < 0.02 * before.abs().mean()


@needs_bfloat16
def test_what_is_of_another_kind_is_left_or_packed_as_linear_layers():
    with_bias = llama(mlp_bias=True)
    pack_decoder(with_bias.model)
    assert PackedGate not in kinds(with_bias.model)
    assert PackedLinear in kinds(with_bias.model)

    by_gelu = llama(hidden_act="gelu")
    pack_decoder(by_gelu.model)
    assert PackedGate not in kinds(by_gelu.model)

    other = torch.nn.Sequential(GemmaRMSNorm(8)).to(torch.bfloat16)
    pack_decoder(other)
    assert type(other[0]) is GemmaRMSNorm
