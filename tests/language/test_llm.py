import json

import pytest
import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from transformers import (
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

from svbatch.errors import BundleError
from svbatch.language.decoder_only import DecoderOnly
from svbatch.language.scoring import score_labels
from svbatch.language.weights import (
    ADAPTER_WEIGHTS,
    add_adapter,
    expand_gguf,
    load_base_model,
    load_language_model,
    write_adapter,
)

INSTRUCTION = [11, 12]
LABELS = [[20, 2], [21, 22, 2]]


@pytest.fixture(scope="module")
def folder(build_llama, tmp_path_factory):
    path = tmp_path_factory.mktemp("llm")
    build_llama().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def trained(folder):
    """The model with a LoRA adapter whose weights are not nothing."""
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj", "down_proj"], task_type="CAUSAL_LM")
    model = add_adapter(load_base_model(folder, torch.float32), config)
    generator = torch.Generator().manual_seed(5)
    for name, weight in model.named_parameters():
        if "lora_" in name:
            weight.data = (torch.randn(weight.shape, generator=generator) * 0.3).half().float()
    return model.eval()


def test_a_loaded_model_scores_as_the_one_that_was_saved(llm, folder, segments):
    loaded = load_language_model(folder, torch.float32)
    expected = score_labels(llm, llm.read(segments), INSTRUCTION, LABELS)
    assert torch.equal(score_labels(loaded, loaded.read(segments), INSTRUCTION, LABELS), expected)
    assert (loaded.width, loaded.vocab_size, loaded.max_positions) == (64, 300, 1024)
    assert not any(weight.requires_grad for weight in loaded.model.parameters())


def test_a_model_is_loaded_in_the_precision_asked_for(folder):
    loaded = load_language_model(folder, torch.bfloat16)
    assert loaded.dtype == torch.bfloat16
    assert loaded.embed(torch.tensor([[1, 2]])).shape == (1, 2, 64)
    assert {weight.dtype for weight in loaded.model.parameters()} == {torch.bfloat16}


def test_a_merged_adapter_gives_the_logits_of_the_trained_model(folder, trained, segments, tmp_path):
    write_adapter(trained, tmp_path)
    llm = load_language_model(folder, torch.float32, adapter_dir=tmp_path)
    scores = score_labels(llm, llm.read(segments[:1]), INSTRUCTION, [[token] for token in range(300)])
    with torch.inference_mode():
        instruction = trained.get_input_embeddings()(torch.tensor(INSTRUCTION))
        logits = trained(inputs_embeds=torch.cat([segments[0], instruction])[None]).logits[0, -1]
    torch.testing.assert_close(scores[0], logits.log_softmax(-1), atol=1e-4, rtol=0)
    assert not any("lora" in name for name, _ in llm.model.named_parameters())


def test_an_adapter_is_written_as_half_precision_tensors_and_plain_json(trained, tmp_path):
    write_adapter(trained, tmp_path)
    assert {weight.dtype for weight in load_file(tmp_path / ADAPTER_WEIGHTS).values()} == {torch.float16}
    config = json.loads((tmp_path / "adapter.json").read_text(encoding="utf-8"))
    assert (config["r"], config["target_modules"]) == (4, ["down_proj", "q_proj", "v_proj"])


def test_an_adapter_of_another_llm_is_refused_by_the_tensor_that_does_not_fit(folder, trained, tmp_path):
    write_adapter(trained, tmp_path)
    weights = load_file(tmp_path / ADAPTER_WEIGHTS)
    weights["base_model.model.model.layers.9.self_attn.q_proj.lora_A.weight"] = torch.zeros(4, 64)
    save_file(weights, tmp_path / ADAPTER_WEIGHTS)
    with pytest.raises(BundleError, match=r"1 tensors are missing or fit nothing .*layers\.9\."):
        load_language_model(folder, torch.float32, adapter_dir=tmp_path)


@pytest.mark.parametrize(
    ("config_type", "model_type"),
    [(Qwen2Config, Qwen2ForCausalLM), (Qwen3Config, Qwen3ForCausalLM), (SmolLM3Config, SmolLM3ForCausalLM)],
)
def test_other_decoders_with_full_attention_score_as_a_plain_forward_pass(config_type, model_type, segments):
    torch.manual_seed(0)
    config = config_type(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.2,
        tie_word_embeddings=False,
        **({"pad_token_id": 0, "no_rope_layers": [1, 0]} if config_type is SmolLM3Config else {}),
    )
    model = model_type(config).eval()
    instruction = model.get_input_embeddings()(torch.tensor([11, 12, 21]))
    with torch.inference_mode():
        plain = model(inputs_embeds=torch.cat([segments[0], instruction])[None]).logits[0, -2:].log_softmax(-1)
    llm = DecoderOnly(model)
    score = score_labels(llm, llm.read(segments), INSTRUCTION, [[21, 22]])[0, 0]
    torch.testing.assert_close(score, plain[0, 21] + plain[1, 22], atol=1e-4, rtol=0)


def test_an_llm_with_sliding_windows_is_refused_with_kinds_that_work():
    config = MistralConfig(
        vocab_size=30, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    with pytest.raises(BundleError, match=r"mistral model with sliding_window.*Llama, Qwen2, Qwen3"):
        DecoderOnly(MistralForCausalLM(config))


def test_a_gguf_that_is_expanded_already_is_left_alone(tmp_path):
    (tmp_path / "llm").mkdir()
    expand_gguf(tmp_path / "no-such.gguf", tmp_path / "llm", torch.float32)
    assert list((tmp_path / "llm").iterdir()) == []


def test_a_failed_expansion_leaves_nothing_behind(tmp_path):
    gguf = tmp_path / "broken.gguf"
    gguf.write_bytes(b"GGUF but no more")
    with pytest.raises(Exception, match=r"."):
        expand_gguf(gguf, tmp_path / "cache" / "llm", torch.float32)
    assert list((tmp_path / "cache").iterdir()) == []
