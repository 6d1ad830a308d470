"""The paper's two models at a size for tests: random weights in transformers' format, and speech-like sound."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from click.testing import CliRunner
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
    Wav2Vec2BertConfig,
    Wav2Vec2BertModel,
    Wav2Vec2FeatureExtractor,
    WavLMConfig,
    WavLMModel,
)

from svbatch.cli import main

SPECIAL = ["<pad>", "</s>", "<unk>"]
TEXTS = [
    "the rain in the train",
    "bring me the red envelope",
    "a doctor and a lawyer",
    "refund the invoice",
    "good day",
]
STAGES = [
    {"name": "asr_projector", "questions": {"asr": 1.0}, "learning_rate": {"projector": 1e-3}},
    {"name": "tasks", "questions": {"asr": 0.5, "keyword_search": 1.0, "emotion": 0.5, "speaker_count": 0.3},
     "learning_rate": {"projector": 1e-3, "adapter": 1e-3}},
]  # fmt: skip


@dataclass(frozen=True)
class Paper:
    """A recipe of the paper's shape, with the folder that holds its manifests."""

    recipe: Path
    data: Path


def t5_tokenizer() -> Tokenizer:
    """Every byte is a token, and T5's control tokens come first."""
    tokens = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    return tokenizer


def tiny_wavlm() -> tuple[PreTrainedModel, dict]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
             "conv_dim": [16] * 7, "num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 2,
             "feat_extract_norm": "layer", "do_stable_layer_norm": True}  # fmt: skip
    return WavLMModel(WavLMConfig(**sizes)), {"model_type": "wavlm", **sizes}


def tiny_conformer() -> tuple[PreTrainedModel, dict]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 48,
             "feature_projection_input_dim": 320}  # fmt: skip
    return Wav2Vec2BertModel(Wav2Vec2BertConfig(**sizes)), {"model_type": "wav2vec2-bert", **sizes}


def write_t5(folder: Path) -> dict:
    sizes = {"vocab_size": 280, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 2,
             "num_heads": 4, "feed_forward_proj": "gated-gelu"}  # fmt: skip
    config = T5Config(**sizes, decoder_start_token_id=0, eos_token_id=1, pad_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(folder)
    t5_tokenizer().save(str(folder / "tokenizer.json"))
    return {"model_type": "t5", **sizes}


@pytest.fixture(scope="session")
def spoken(bursts, tmp_path_factory) -> Path:
    """A folder with train.jsonl: sounds of ten speakers, and some silence."""
    folder = tmp_path_factory.mktemp("spoken")
    rows = []
    for number in range(30):
        seconds = 0.6 + 0.05 * number
        soundfile.write(folder / f"{number}.wav", bursts(seconds, seed=number), 16_000)
        rows.append({"audio": f"{number}.wav", "text": TEXTS[number % 5], "speaker": f"s{number % 10}", "lang": "en",
                     "emotion": ["happy", "sad", "angry"][number % 3], "source": f"corpus{number % 2}"})  # fmt: skip
    soundfile.write(folder / "noise.wav", np.random.default_rng(0).normal(size=16_000) * 0.01, 16_000)
    rows.append({"audio": "noise.wav", "speech": False})
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def trained(exporting, tmp_path) -> Callable[[dict, Path, Path], Path]:
    """trained(recipe, data, cache): the folder of what `svbatch train` has made by it."""

    def train(recipe: dict, data: Path, cache: Path) -> Path:
        path, output = tmp_path / "recipe.yaml", tmp_path / "out"
        path.write_text(yaml.safe_dump(recipe))
        options = ["--data", str(data), "--output", str(output), "--cache", str(cache)]
        with exporting():
            done = CliRunner().invoke(main, ["train", str(path), *options], catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return output

    return train


def write_recipe(folder: Path, kind: str, **changes: object) -> Path:
    """A recipe beside the tiny model of its encoder and its LLM; `kind` is wavlm or bestrq."""
    torch.manual_seed(0)
    encoder, encoder_sizes = tiny_wavlm() if kind == "wavlm" else tiny_conformer()
    encoder.save_pretrained(folder / "encoder")
    if kind == "wavlm":
        Wav2Vec2FeatureExtractor(do_normalize=True).save_pretrained(folder / "encoder")
    llm_sizes = write_t5(folder / "llm")
    stages = [
        {key: value for key, value in stage.items() if key != "learning_rate"}
        | {"tokens_per_batch": 300, "micro_batches": 2}
        | {"schedule": {"steps": 10, "warmup_steps": 2, "learning_rate": stage["learning_rate"]}}
        for stage in STAGES
    ]
    recipe = {
        "name": f"tiny_{kind}",
        "encoder": {"source": "encoder", "licence": "CC0-1.0", "config": encoder_sizes,
                    "layers": "last" if kind == "wavlm" else "mix"},
        "llm": {"source": "llm", "licence": "CC0-1.0", "config": llm_sizes},
        "seed": 0,
        "manifests": ["train.jsonl"],
        "held_out_every": 5,
        "frame_passes": 1,
        "projector": {"kind": "paper", "strides": [2, 2] if kind == "wavlm" else [2, 1]},
        "adapter": {"rank": 2, "alpha": 4, "targets": ["q", "v"]},
        "precision": "float32",
        "stages": stages,
    } | changes  # fmt: skip
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


@pytest.fixture(scope="session")
def paper_recipe() -> Callable[..., Path]:
    """paper_recipe(folder, "wavlm", **changes): writes the tiny model's parts and its recipe into the folder."""
    return write_recipe


@pytest.fixture(scope="session", params=[pytest.param("wavlm", marks=pytest.mark.slow), "bestrq"])
def paper(request, spoken, tmp_path_factory) -> Paper:
    """The second also in bfloat16, with gradient checkpointing, and validated."""
    changes = {} if request.param == "wavlm" else {"precision": "bfloat16", "gradient_checkpointing": True}
    path = write_recipe(tmp_path_factory.mktemp(request.param), request.param, **changes)
    if request.param == "bestrq":
        recipe = yaml.safe_load(path.read_text())
        recipe["stages"][1]["stop"] = {"every": 5, "patience": 2}
        path.write_text(yaml.safe_dump(recipe))
    return Paper(path, spoken)
