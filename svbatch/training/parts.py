"""The frozen parts of a recipe that names encoder and LLM one by one, as a bundle without anything trained."""

import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError
from transformers import AutoConfig

from svbatch.bundle import MANIFEST_NAME, Bundle, describe_file, find_bundle, write_bundle
from svbatch.cache import cache_dir, cached_file
from svbatch.errors import TrainingError
from svbatch.fetch import fetch
from svbatch.speech.chosen_layers import ChosenLayers
from svbatch.speech.export import EXTERNAL_DATA, export_encoder, write_encoder
from svbatch.speech.pretrained import HUB, load_encoder_to_export
from svbatch.speech.waveform import SAMPLE_RATE_HZ, frame_samples
from svbatch.speech.whisper import load_whisper
from svbatch.training.recipe import EncoderChoice, LanguageModelChoice, Recipe
from svbatch.training.shape import sized

log = logging.getLogger(__name__)
GRAPH, TOKENIZER, CONFIG = "encoder.onnx", "tokenizer.json", "llm.json"


def frozen_parts(recipe: Recipe, base: Path, folder: Path, cache: Path | None) -> Bundle:
    """The recipe's frozen parts, all of them in the cache: a bundle that it names, relative to `base`, or one that is
    made in `folder` unless it is there. Raises BundleError, TrainingError."""
    if recipe.parts is not None:
        bundle = find_bundle(recipe.parts, base=base, cache=cache)
        fetch(bundle)
        is_enough = recipe.voice_layer is None or bundle.manifest.encoder.voice_width is not None
        return bundle if is_enough else _with_voice(bundle, recipe.voice_layer, folder)
    assert recipe.encoder is not None
    assert recipe.llm is not None
    if not (folder / MANIFEST_NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoder = _write_encoder(recipe.encoder, recipe.voice_layer, base, folder)
        llm, fetched = _take_llm(recipe.llm, base, folder, cache_dir(cache))
        fields: dict[str, Any] = {
            "name": f"{recipe.name}-parts",
            "version": "1",
            "description": f"the frozen parts of {recipe.name}: {recipe.encoder.source}, {recipe.llm.source}",
            "encoder": encoder,
            "recogniser": None,
            "projector": None,
            "readout": {},
            "llm": llm,
            "adapter": None,
            "calibration": {},
            "fetched": fetched,
            "recipe": {},
            "data": [],
            "figures": {},
            "not_for": "anything by themselves",
        }
        licences = dict.fromkeys((GRAPH, EXTERNAL_DATA), recipe.encoder.licence)
        write_bundle(folder, fields, licences | dict.fromkeys((TOKENIZER, CONFIG), recipe.llm.licence))
    bundle = find_bundle(str(folder), cache=cache)
    fetch(bundle)
    return bundle


def _with_voice(bundle: Bundle, layer: int | None, folder: Path) -> Bundle:
    """The frozen parts of `bundle`, its Whisper exported anew into `folder` with a layer for the voice, unless it is
    there."""
    manifest = bundle.manifest
    if manifest.recogniser is None or manifest.encoder.external_data is None:
        raise TrainingError(
            f"projector.voice_layer: the encoder of {bundle.ref} cannot be exported anew; name it by `encoder`, or "
            "leave out voice_layer"
        )
    if not (folder / MANIFEST_NAME).exists():
        folder.mkdir(parents=True, exist_ok=True)
        encoder = load_whisper(bundle.path(manifest.recogniser.weights)).model.encoder
        export_encoder(encoder, folder / manifest.encoder.graph, chosen=ChosenLayers(voice=layer))
        shutil.copyfile(bundle.path(manifest.llm.tokenizer), folder / manifest.llm.tokenizer)
        width = encoder.config.d_model
        nothing: dict[str, Any] = {
            "projector": None,
            "readout": {},
            "adapter": None,
            "calibration": {},
            "recipe": {},
            "figures": {},
        }
        fields = manifest.model_dump(by_alias=True, exclude={"files"}) | nothing
        fields["encoder"] |= {"width": 2 * width, "voice_width": width}
        kept = (manifest.encoder.graph, manifest.llm.tokenizer)
        write_bundle(folder, fields, {name: manifest.files[name].licence for name in kept})
    made = find_bundle(str(folder), cache=bundle.cache_option)
    fetch(made)
    return made


def _write_encoder(choice: EncoderChoice, voice_layer: int | None, base: Path, folder: Path) -> dict[str, Any]:
    """Exports the encoder into `folder`; what bundle.json says of it."""
    if choice.source is None:
        raise TrainingError("encoder.source is null: it has no public weights; name a folder that holds yours")
    source = choice.source if choice.source.startswith(HUB) else str(base / choice.source)
    encoder, normalise = load_encoder_to_export(source)
    _require_sizes("encoder", choice.config, encoder.config, source)
    chosen = ChosenLayers(mixed=choice.layers == "mix", voice=voice_layer)
    write_encoder(encoder, folder, half=False, normalise=normalise, chosen=chosen)
    layer = encoder.config.hidden_size
    said, voice = layer * (encoder.config.num_hidden_layers if chosen.mixed else 1), layer if chosen.voice else 0
    rate = SAMPLE_RATE_HZ / frame_samples(encoder.config)
    return {
        "graph": GRAPH,
        "width": said + voice,
        "voice_width": voice or None,
        "frames_per_second": int(rate) if rate.is_integer() else rate,
        "window_seconds": 30,
        "external_data": EXTERNAL_DATA,
    }


def _take_llm(
    choice: LanguageModelChoice, base: Path, folder: Path, cache: Path
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Brings the LLM's weights into the cache and its small files into `folder`; what bundle.json says of both."""
    source = _folder_of(choice.source, base)
    shards = sorted(source.glob("*.safetensors"))
    missing = [name for name in ("config.json", TOKENIZER) if not (source / name).is_file()]
    if missing or not shards:
        lacking = ", ".join([*missing, *([] if shards else ["*.safetensors"])])
        raise TrainingError(f"llm.source {choice.source}: lacks {lacking}; name a model in transformers' format")
    _require_sizes("llm", choice.config, AutoConfig.from_pretrained(source), choice.source)
    shutil.copyfile(source / "config.json", folder / CONFIG)
    shutil.copyfile(source / TOKENIZER, folder / TOKENIZER)
    fetched = {}
    for shard in shards:
        entry = describe_file(shard, choice.licence)
        is_public = choice.source.startswith(HUB)
        address = f"hf:{choice.source.removeprefix(HUB)}/{shard.name}" if is_public else shard.absolute().as_uri()
        fetched[shard.name] = {**entry.model_dump(), "from": [address]}
        target = cached_file(cache, entry.sha256, shard.name)
        if is_public and not target.exists():  # it was downloaded a moment ago
            target.parent.mkdir(parents=True, exist_ok=True)
            part = target.with_name(f"{target.name}.taken")
            shutil.copyfile(shard, part)
            os.replace(part, target)
    names = [shard.name for shard in shards]
    return {"weights": names[0], "more_weights": names[1:] or None, "config": CONFIG, "tokenizer": TOKENIZER}, fetched


def _folder_of(source: str, base: Path) -> Path:
    if not source.startswith(HUB):
        return base / source
    wanted = ["config.json", TOKENIZER, "*.safetensors"]
    try:
        return Path(snapshot_download(source.removeprefix(HUB), allow_patterns=wanted))
    except (OSError, HfHubHTTPError) as error:
        why = " ".join(str(error).split())
        raise TrainingError(f"llm.source {source}: cannot be downloaded: {why}; name a folder that holds it") from error


def _require_sizes(part: str, wanted: Mapping[str, Any], found: Any, source: str) -> None:
    """The recipe's sizes are what its counts and rates were made for."""
    named, held = sized(wanted).to_dict(), found.to_dict()
    odd = [f"{key} {held.get(key)!r}, not {wanted[key]!r}" for key in wanted if held.get(key) != named.get(key)]
    if odd:
        raise TrainingError(f"{part}.source {source}: has {'; '.join(odd)}; correct {part}.config or the source")
