"""Training by a recipe: its stages one after the other. Every step can be killed and run again."""

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from tokenizers import Tokenizer
from torch import Tensor, nn

from svbatch.bundle import Bundle
from svbatch.errors import TrainingError
from svbatch.language.weights import load_base_model
from svbatch.model import (
    Precision,
    choose_device,
    choose_precision,
    frame_samples,
    llm_folder,
    load_encoder,
    load_recogniser,
    load_tokenizer,
)
from svbatch.speech.projector import ConvolutionalProjector, Projector
from svbatch.speech.readout import Readout, spoken_form
from svbatch.speech.tone import word_embedding
from svbatch.training.align import Aligner, scored_tokens
from svbatch.training.checkpoints import Validation, optimise
from svbatch.training.continued import note_start, require_same_start, take_up
from svbatch.training.data import Example, held_out, read_manifests
from svbatch.training.frames import Heard, Listener, cached_frames
from svbatch.training.questions import Question, Questioner
from svbatch.training.recipe import AlignStage, LanguageStage, ProjectorShape, Recipe, ToneStage
from svbatch.training.shape import make_projector, sized, tone_labels, with_adapter
from svbatch.training.speakers import fit_speaker_count
from svbatch.training.teach import Teacher
from svbatch.training.tone import ToneTeacher
from svbatch.training.transcripts import chosen, recognised

log = logging.getLogger(__name__)
VALIDATION_BATCHES = 16


@dataclass(frozen=True)
class Corpus:
    """All examples of a recipe, and of those that are trained on and those held out the clips.

    `transcripts` are the recogniser's, by index of example. `listener` hears what is composed anew.
    """

    examples: list[Example]
    clips: list[Heard]
    held_out: list[Heard]
    transcripts: dict[int, str]
    listener: Listener


@dataclass(frozen=True)
class Trained:
    """The parts that learn, with what they are tied to. `readout` is None with the paper's projector."""

    projector: Projector | ConvolutionalProjector
    readout: Readout | None
    llm: Any
    tokenizer: Tokenizer


def train(recipe: Recipe, bundle: Bundle, data: Path, output: Path) -> Trained:
    """The trained parts, by the recipe's stages; `output` keeps checkpoints and metrics, and a second call goes on
    from them. `data` holds the recipe's manifests. Frames and transcripts are kept in the bundle's cache."""
    output.mkdir(parents=True, exist_ok=True)
    require_same_start(recipe, bundle, output)
    accelerator = Accelerator()
    with accelerator.main_process_first():  # the others find what the first computed
        corpus = read_corpus(recipe, bundle, data)
        parts = build(recipe, bundle, corpus.examples)
    parts.projector.to(accelerator.device)
    parts.llm.to(accelerator.device)
    if accelerator.is_main_process:
        note_start(recipe, bundle, output)
    if parts.readout is not None:
        parts = replace(parts, readout=_moved(parts.readout, parts.projector, accelerator.device))
    for stage in recipe.stages:
        if isinstance(stage, AlignStage):
            _align(stage, recipe, parts, corpus, output)
        elif isinstance(stage, ToneStage):
            _listen(stage, recipe, parts, corpus, output)
        else:
            _teach(stage, recipe, parts, corpus, output)
    return parts


def _moved(readout: Readout, projector: nn.Module, device: torch.device) -> Readout:
    scale: Any = projector.log_scale
    return Readout(readout.token_ids, readout.embeddings.to(device), scale)


def read_corpus(recipe: Recipe, bundle: Bundle, data: Path) -> Corpus:
    """The recipe's manifests: frames and transcripts are computed where they are missing."""
    examples = read_manifests(data, recipe.manifests)
    aside = held_out(examples, every=recipe.held_out_every)
    encoder = load_encoder(bundle, choose_device("auto"))
    encoder_id = bundle.manifest.files[bundle.manifest.encoder.graph].sha256
    cache = bundle.cache / "training"
    clips, listener = cached_frames(
        examples,
        encoder,
        encoder_id,
        cache,
        num_passes=recipe.frame_passes,
        seed=recipe.seed,
        frame_samples=frame_samples(bundle),
        max_bytes=None if recipe.cache_gigabytes is None else round(recipe.cache_gigabytes * 1e9),
    )
    transcripts: dict[int, str] = {}
    if recipe.transcripts:
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
        listener,
    )


def build(recipe: Recipe, bundle: Bundle, examples: Sequence[Example]) -> Trained:
    """Parts of the recipe's shapes as training begins with them: what continues is the bundle's, the rest seeded."""
    torch.manual_seed(recipe.seed)
    dtype = torch.bfloat16 if precision_of(recipe) == "bfloat16" else torch.float32
    llm = load_base_model(llm_folder(bundle, dtype), dtype)
    embeddings: Tensor = llm.get_input_embeddings().weight.detach()  # type: ignore[operator]
    tokenizer = load_tokenizer(bundle)
    adapted = with_adapter(llm, recipe.adapter)
    mixes = recipe.encoder is not None and recipe.encoder.layers == "mix"
    voice_width = bundle.manifest.encoder.voice_width or 0
    projector = make_projector(
        recipe,
        said_width=bundle.manifest.encoder.width - voice_width,
        voice_width=voice_width,
        mixed_layers=_num_layers(recipe) if mixes else 1,
        samples=frame_samples(bundle),
        llm_width=embeddings.shape[1],
    )
    if recipe.gradient_checkpointing:
        adapted.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    token_ids = take_up(recipe, bundle, projector, adapted)
    if not isinstance(projector, Projector):
        return Trained(projector, None, adapted, tokenizer)
    if token_ids is None:
        if projector.tone is not None and isinstance(recipe.projector, ProjectorShape):
            names = [name for labels in tone_labels(recipe.projector.tone).values() for name in labels]
            ids = [tokenizer.encode(f" {name.replace('_', ' ')}", add_special_tokens=False).ids for name in names]
            projector.tone.words.copy_(torch.stack([word_embedding(each, embeddings) for each in ids]))
        texts = [spoken_form(e.text) for e in examples if e.text and e.lang == "en"]
        token_ids = scored_tokens(tokenizer, texts, size=recipe.readout_tokens)
    readout = Readout(token_ids, embeddings[token_ids].float(), projector.log_scale)
    return Trained(projector, readout, adapted, tokenizer)


def precision_of(recipe: Recipe) -> Precision:
    """What the LLM's stages compute in; a processor that does not multiply bfloat16 itself takes
    thirty times as long for it as for float32."""
    return choose_precision(recipe.precision, choose_device("auto"))


def _num_layers(recipe: Recipe) -> int:
    assert recipe.encoder is not None
    return int(sized(recipe.encoder.config).num_hidden_layers)


def _align(stage: AlignStage, recipe: Recipe, parts: Trained, corpus: Corpus, output: Path) -> None:
    assert isinstance(parts.projector, Projector)
    assert parts.readout is not None
    learner, judge = (
        Aligner(parts.projector, parts.readout, parts.tokenizer, corpus.examples, clips, stage, seed=recipe.seed)
        for clips in (corpus.clips, corpus.held_out)
    )
    log.info("%s: %d clips, %d batches an epoch", stage.name, len(learner.clips), learner.per_epoch)
    with without_tone(parts.projector):
        optimise(
            stage.name,
            {"projector": parts.projector},
            stage.schedule,
            learner.losses,
            output,
            seed=recipe.seed,
            micro_batches=stage.micro_batches,
            validation=_validation(stage, judge.losses, judge.per_epoch if judge.clips else 0),
            describe=learner.describe,
        )


def _listen(stage: ToneStage, recipe: Recipe, parts: Trained, corpus: Corpus, output: Path) -> None:
    assert isinstance(parts.projector, Projector)
    assert isinstance(recipe.projector, ProjectorShape)
    assert parts.projector.tone is not None
    labels = tone_labels(recipe.projector.tone)
    counter = parts.projector.tone.speakers
    if counter is not None:  # in no checkpoint, since it is fitted in seconds
        fit_speaker_count(parts.projector, counter, corpus.examples, corpus.clips, corpus.listener, seed=recipe.seed)
    learner, judge = (
        ToneTeacher(parts.projector, labels, corpus.examples, clips, stage, seed=recipe.seed)
        for clips in (corpus.clips, corpus.held_out if stage.stop else corpus.clips)
    )
    optimise(
        stage.name,
        {"tone": parts.projector.tone},
        stage.schedule,
        learner.losses,
        output,
        seed=recipe.seed,
        micro_batches=stage.micro_batches,
        validation=_validation(stage, judge.losses, VALIDATION_BATCHES),
        describe=learner.describe,
    )


def _teach(stage: LanguageStage, recipe: Recipe, parts: Trained, corpus: Corpus, output: Path) -> None:
    asker, judge = (
        Questioner(corpus.examples, clips, corpus.transcripts, stage, corpus.listener)
        for clips in (corpus.clips, corpus.held_out if stage.stop else corpus.clips)
    )
    teacher = Teacher(parts.projector, parts.readout, parts.llm, parts.tokenizer, precision=precision_of(recipe))
    modules: dict[str, nn.Module] = {"projector": parts.projector, "adapter": parts.llm}
    learning = {key: modules[key] for key in stage.schedule.learning_rate}
    parts.llm.train(recipe.gradient_checkpointing or "adapter" in learning)

    def losses(questioner: Questioner) -> Callable[[int], dict[str, Tensor]]:
        return lambda batch: teacher.losses(questioner.draw(batch, recipe.seed), ctc_weight=stage.ctc_weight)

    def describe(batch: int) -> str:
        return f"batch {batch} of seed {recipe.seed} ({_names(asker.draw(batch, recipe.seed), corpus.examples)})"

    with (
        without_tone(parts.projector) if "projector" in learning else mishearing(parts.projector, stage.mishearing),
        nullcontext() if "adapter" in learning else frozen(parts.llm),
    ):
        optimise(
            stage.name,
            learning,
            stage.schedule,
            losses(asker),
            output,
            seed=recipe.seed,
            micro_batches=stage.micro_batches,
            validation=_validation(stage, losses(judge), VALIDATION_BATCHES),
            describe=describe,
        )


def _names(questions: Sequence[Question], examples: Sequence[Example]) -> str:
    """Files of a batch, for a person who looks for the odd one."""
    return ", ".join(sorted({examples[question.clip.example].path.name for question in questions}))


def _validation(
    stage: AlignStage | ToneStage | LanguageStage, losses: Callable[[int], dict[str, Tensor]], num_batches: int
) -> Validation | None:
    if stage.stop is None:
        return None
    if not num_batches:
        raise TrainingError(
            f"stage {stage.name}: `stop` wants held-out examples; lower `held_out_every`, or leave it out"
        )
    return Validation(losses, min(VALIDATION_BATCHES, num_batches), stage.stop)


@contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """No parameter of the module learns."""
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


def without_tone(projector: Projector | ConvolutionalProjector) -> AbstractContextManager[None]:
    """The head for the tone, if there is one, does not learn: labels teach it, in a stage of its own."""
    tone = projector.tone if isinstance(projector, Projector) else None
    return nullcontext() if tone is None else frozen(tone)


@contextmanager
def mishearing(projector: nn.Module, dropout: float) -> Iterator[None]:
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
