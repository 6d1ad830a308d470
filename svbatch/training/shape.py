"""What a recipe trains, in numbers: its parts built on the meta device from their sizes, without weights."""

import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM, PreTrainedModel

from svbatch.errors import TaskError, TrainingError
from svbatch.language.weights import add_adapter
from svbatch.speech.projector import ConvolutionalProjector, Projector, ProjectorConfig
from svbatch.speech.waveform import encoder_of, frame_samples
from svbatch.tasks.task import load_task
from svbatch.training.recipe import AdapterShape, PaperShape, Recipe

COUNTED = "speaker_count"
EMBEDDING_SAMPLES = 1280  # 12.5 speech embeddings a second of 16 kHz


def parameter_counts(recipe: Recipe) -> dict[str, int]:
    """Trained and frozen parameters by part: `projector`, `adapter`, and `frozen encoder`, `frozen llm`.

    Raises TrainingError where the recipe takes its parts from a bundle, which holds them already.
    """
    if recipe.encoder is None or recipe.llm is None:
        raise TrainingError(f"recipe {recipe.name}: its parts come from the bundle {recipe.parts}; no sizes to build")
    kinds: Any = AutoModel
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # transformers' remarks on configs, which are ours
        encoder = encoder_of(kinds.from_config(sized(recipe.encoder.config)))
        llm = unfilled_llm(recipe.llm.config)
        mixed = encoder.config.num_hidden_layers if recipe.encoder.layers == "mix" else 1
        projector = make_projector(
            recipe,
            said_width=encoder.config.hidden_size * mixed,
            voice_width=encoder.config.hidden_size if recipe.voice_layer else 0,
            mixed_layers=mixed,
            samples=frame_samples(encoder.config),
            llm_width=llm.config.hidden_size,
        )
        num_frozen = llm.num_parameters()
        adapted = with_adapter(llm, recipe.adapter)
    return {
        "projector": trainable(projector),
        "adapter": trainable(adapted),
        "frozen encoder": encoder.num_parameters(),
        "frozen llm": num_frozen,
    }


def sized(config: Mapping[str, Any]) -> Any:
    """transformers' config of a recipe's sizes. Raises TrainingError for a kind that it does not know."""
    given = dict(config)
    try:
        return AutoConfig.for_model(given.pop("model_type"), **given)
    except (KeyError, ValueError) as error:
        kind = config.get("model_type")
        raise TrainingError(
            f"config: model_type {kind!r} is none of transformers'; take it from config.json"
        ) from error


def unfilled_llm(config: Mapping[str, Any]) -> PreTrainedModel:
    """An LLM of these sizes, its weights as they come."""
    whole = sized(config)
    kind: Any = AutoModelForSeq2SeqLM if whole.is_encoder_decoder else AutoModelForCausalLM
    model: PreTrainedModel = kind.from_config(whole)
    return model


def make_projector(
    recipe: Recipe, *, said_width: int, voice_width: int, mixed_layers: int, samples: int, llm_width: int
) -> Projector | ConvolutionalProjector:
    """The recipe's projector, untrained. said_width: of all mixed layers together. voice_width: of what follows
    them in a frame, for the voice. samples: of sound in a frame.

    Raises TrainingError unless its strides make 12.5 embeddings a second.
    """
    shape = recipe.projector
    if samples * math.prod(shape.strides) != EMBEDDING_SAMPLES:
        raise TrainingError(
            f"recipe {recipe.name}: projector.strides {list(shape.strides)} make {16_000 / samples:g} frames a second "
            f"{16_000 / samples / math.prod(shape.strides):g}; choose strides that make 12.5"
        )
    width = said_width // mixed_layers
    if isinstance(shape, PaperShape):
        return ConvolutionalProjector(
            encoder_width=width,
            llm_width=llm_width,
            strides=shape.strides,
            mixed_layers=mixed_layers,
            voice_width=voice_width,
        )
    sizes = shape.model_dump(exclude={"voice_layer"}) | {
        "counted": shape.tone.index(COUNTED) if COUNTED in shape.tone else None,
        "tone": [len(labels) for labels in tone_labels(shape.tone).values()],
        "encoder_width": width,
        "voice_width": voice_width,
        "llm_width": llm_width,
        "mixed_layers": mixed_layers,
    }
    return Projector(ProjectorConfig(**sizes))


def tone_labels(names: Sequence[str]) -> dict[str, list[str]]:
    """Labels by name of the library's task. Raises TrainingError for a task whose answer is no label."""
    found = {}
    for name in names:
        try:
            task = load_task(name, Path())
        except TaskError as error:
            raise TrainingError(f"projector.tone: {error}") from error
        if task.answer != "label":
            raise TrainingError(f"projector.tone: the answer to {name} is no label; name tasks whose answer is one")
        found[name] = list(task.label_names)
    return found


def with_adapter(llm: PreTrainedModel, shape: AdapterShape) -> Any:
    """The LLM, frozen, with LoRA layers in float32 to be trained."""
    llm.requires_grad_(False)
    lora = LoraConfig(r=shape.rank, lora_alpha=shape.alpha, target_modules=shape.targets, lora_dropout=0.0)
    try:
        adapted: Any = add_adapter(llm, lora)
    except ValueError as error:  # peft's, for names that no layer has
        raise TrainingError(f"adapter.targets: {' '.join(str(error).split())}") from error
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    return adapted


def trainable(module: nn.Module) -> int:
    """Parameters that learn."""
    return sum(p.numel() for p in module.parameters() if p.requires_grad)
