"""Training from a recipe to a bundle: align, then asr, then tasks. Every step can be killed and run again."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from tokenizers import Tokenizer
from torch import Tensor, nn

from svbatch.bundle import Bundle
from svbatch.language.weights import add_adapter, load_base_model
from svbatch.model import llm_folder, load_encoder, load_recogniser
from svbatch.speech.projector import Projector, ProjectorConfig
from svbatch.speech.readout import Readout, spoken_form
from svbatch.training.align import (
    batches,
    ctc_loss,
    masked,
    padded_frames,
    posteriors,
    scored_tokens,
    stretched,
)
from svbatch.training.checkpoints import optimise
from svbatch.training.data import Example, held_out, read_manifests
from svbatch.training.frames import Clip, cached_frames
from svbatch.training.questions import Questioner
from svbatch.training.recipe import LanguageStage, Recipe
from svbatch.training.teach import Teacher
from svbatch.training.transcripts import chosen, recognised

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Corpus:
    """All examples of a recipe, and of those that are trained on and those held out the cached frames.

    `transcripts` are the recogniser's, by index of example.
    """

    examples: list[Example]
    clips: list[Clip]
    held_out: list[Clip]
    transcripts: dict[int, str]


@dataclass(frozen=True)
class Trained:
    """The parts that learn, with what they are tied to."""

    projector: Projector
    readout: Readout
    llm: Any
    tokenizer: Tokenizer


def train(recipe: Recipe, bundle: Bundle, data: Path, output: Path) -> Trained:
    """The trained parts, by the recipe's stages; `output` keeps checkpoints and metrics, and a second call goes on
    from them. `data` holds the recipe's manifests. Frames and transcripts are kept in the bundle's cache."""
    output.mkdir(parents=True, exist_ok=True)
    corpus = read_corpus(recipe, bundle, data)
    parts = build(recipe, bundle, corpus.examples)
    _align(recipe, parts, corpus, output)
    for name in ("asr", "tasks"):
        stage: LanguageStage = getattr(recipe, name)
        _teach(name, stage, recipe.seed, parts, corpus, output)
    return parts


def read_corpus(recipe: Recipe, bundle: Bundle, data: Path) -> Corpus:
    """The recipe's manifests: frames and transcripts are computed where they are missing."""
    examples = read_manifests(data, recipe.manifests)
    aside = held_out(examples, every=recipe.held_out_every)
    encoder = load_encoder(bundle, "cpu")
    encoder_id = bundle.manifest.files[bundle.manifest.encoder.graph].sha256
    cache = bundle.cache / "training"
    clips = cached_frames(examples, encoder, encoder_id, cache, num_passes=recipe.frame_passes, seed=recipe.seed)
    recogniser = load_recogniser(bundle, torch.float32, "cpu")
    wanted = chosen(examples, size=recipe.transcripts, seed=recipe.seed)
    transcripts = recognised(examples, wanted, encoder, recogniser, cache / "transcripts.jsonl")
    for i, text in transcripts.items():
        if examples[i].text is None:
            examples[i] = replace(examples[i], text=text)
    return Corpus(
        examples,
        [clip for clip in clips if clip.example not in aside],
        [clip for clip in clips if clip.example in aside],
        transcripts,
    )


def build(recipe: Recipe, bundle: Bundle, examples: Sequence[Example]) -> Trained:
    """Untrained parts of the recipe's shapes, seeded."""
    torch.manual_seed(recipe.seed)
    llm = load_base_model(llm_folder(bundle, torch.bfloat16), torch.bfloat16)
    embeddings: Tensor = llm.get_input_embeddings().weight.detach()  # type: ignore[operator]
    tokenizer = Tokenizer.from_file(str(bundle.path(bundle.manifest.llm.tokenizer)))
    texts = [spoken_form(e.text) for e in examples if e.text and e.lang == "en"]
    token_ids = scored_tokens(tokenizer, texts, size=recipe.readout_tokens)
    config = ProjectorConfig(
        encoder_width=bundle.manifest.encoder.width,
        llm_width=embeddings.shape[1],
        **recipe.projector.model_dump(),
    )
    lora = LoraConfig(
        r=recipe.adapter.rank,
        lora_alpha=recipe.adapter.alpha,
        target_modules=recipe.adapter.targets,
        lora_dropout=0.0,
    )
    llm.requires_grad_(False)
    adapted: Any = add_adapter(llm, lora)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    projector = Projector(config)
    readout = Readout(token_ids, embeddings[token_ids].float(), projector.log_scale)
    return Trained(projector, readout, adapted, tokenizer)


def _align(recipe: Recipe, parts: Trained, corpus: Corpus, output: Path) -> None:
    said = {
        i: spoken_form(e.text or "")
        for i, e in enumerate(corpus.examples)
        if (e.text and e.lang == "en") or e.labels.get("speech") is False
    }
    clips = [clip for clip in corpus.clips if clip.example in said]
    targets = {
        i: torch.tensor(
            parts.readout.classes(parts.tokenizer.encode(text, add_special_tokens=False).ids),
            dtype=torch.long,
        )
        for i, text in said.items()
    }
    size = recipe.align.frames_per_batch
    epochs: dict[int, list[list[int]]] = {}
    per_epoch = len(batches(clips, frames_per_batch=size, seed=recipe.seed, epoch=0))

    def losses(step: int) -> dict[str, Tensor]:
        epoch = step // per_epoch
        if epoch not in epochs:
            epochs.clear()
            epochs[epoch] = batches(clips, frames_per_batch=size, seed=recipe.seed, epoch=epoch)
        batch = [clips[i] for i in epochs[epoch][step % per_epoch % len(epochs[epoch])]]
        frames, lengths = stretched(*padded_frames(batch))
        _, log_probs = posteriors(parts.projector, parts.readout, masked(frames, lengths), lengths)
        return {"ctc": ctc_loss(log_probs, lengths, [targets[c.example] for c in batch])}

    log.info("align: %d clips, %d steps an epoch", len(clips), per_epoch)
    optimise("align", {"projector": parts.projector}, recipe.align.schedule, losses, output, seed=recipe.seed)


def _teach(name: str, stage: LanguageStage, seed: int, parts: Trained, corpus: Corpus, output: Path) -> None:
    questioner = Questioner(corpus.examples, corpus.clips, corpus.transcripts, stage)
    teacher = Teacher(parts.projector, parts.readout, parts.llm, parts.tokenizer)
    modules: dict[str, nn.Module] = {"projector": parts.projector, "adapter": parts.llm}
    learning = {key: modules[key] for key in stage.schedule.learning_rate}
    losses: Callable[[int], dict[str, Tensor]] = lambda step: teacher.losses(  # noqa: E731
        questioner.draw(step, seed), ctc_weight=stage.ctc_weight
    )
    with nullcontext() if "projector" in learning else mishearing(parts.projector, stage.mishearing):
        optimise(name, learning, stage.schedule, losses, output, seed=seed)


@contextmanager
def mishearing(projector: Projector, dropout: float) -> Iterator[None]:
    """A frozen projector with another dropout: what it knows by heart is misread as new speech is."""
    layers = [module for module in projector.modules() if isinstance(module, nn.Dropout)]
    rates = [layer.p for layer in layers]
    projector.requires_grad_(False).train()
    for layer in layers:
        layer.p = dropout
    try:
        yield
    finally:
        projector.requires_grad_(True).eval()
        for layer, rate in zip(layers, rates, strict=True):
            layer.p = rate
