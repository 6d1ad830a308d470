"""From trained parts to a bundle: float16 weights, the projector's graph, and bundle.json with every hash."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors.torch import save_file

from svbatch.bundle import Bundle, Calibration, Manifest, write_bundle
from svbatch.language.weights import ADAPTER_CONFIG, ADAPTER_WEIGHTS, write_adapter
from svbatch.model import choose_precision, load_model
from svbatch.speech.export import export_projector
from svbatch.training.calibrate import calibrate, calibrate_reader
from svbatch.training.card import card
from svbatch.training.cascade import load_cascade
from svbatch.training.data import held_out, read_manifests
from svbatch.training.recipe import Recipe
from svbatch.training.stages import Trained, precision_of, train

PROJECTOR_GRAPH = "projector.onnx"
PROJECTOR_WEIGHTS = "projector.safetensors"
CARD = "README.md"
KEPT = {"version", "encoder", "voice_activity", "recogniser", "llm", "fetched"}


def make(recipe: Recipe, base: Bundle, data: Path, output: Path, facts: Mapping[str, Any]) -> Bundle | None:
    """Trains by `recipe` as `train` does, publishes in output/bundle, and calibrates on what was held out. Of several
    processes the first does so; the others have nothing to return."""
    parts = train(recipe, base, data, output)
    if not Accelerator().is_main_process:
        return None
    parts.llm.cpu()
    made = publish(parts, recipe, base, output / "bundle", calibration={}, facts=facts)
    examples = read_manifests(data, recipe.manifests)
    aside = [examples[i] for i in sorted(held_out(examples, every=recipe.held_out_every))]
    told = read_manifests(data, recipe.calibration)
    precision = choose_precision("auto", "cpu")
    if recipe.hears_nothing and base.manifest.projector is not None:  # a cascade: it is given what `base` hears
        reader, _ = load_cascade(base, str(made.folder), load_model(base, "cpu", precision), precision)
        return revised(made, {"calibration": plain(calibrate_reader([*aside, *told], reader))})
    model = load_model(made, "cpu", precision)
    return revised(made, {"calibration": plain(calibrate(aside, told, model, seed=recipe.seed))})


def revised(bundle: Bundle, changes: Mapping[str, Any]) -> Bundle:
    """The bundle with other values of some keys of bundle.json, which is written anew."""
    fields = bundle.manifest.model_dump(by_alias=True, exclude={"files"})
    licences = {name: file.licence for name, file in bundle.manifest.files.items()}
    return _written(bundle.folder, fields | dict(changes), licences, bundle.cache_option)


def _written(folder: Path, fields: dict[str, Any], licences: Mapping[str, str], cache: Path | None) -> Bundle:
    """bundle.json, and beside it the card that follows from it."""
    bundle = write_bundle(folder, fields, licences)
    (folder / CARD).write_text(card(bundle.manifest), encoding="utf-8")
    return replace(bundle, cache_option=cache)


def plain(calibration: Mapping[str, Calibration]) -> dict[str, dict[str, float]]:
    """As bundle.json holds it."""
    return {task: fitted.model_dump() for task, fitted in calibration.items()}


def _frozen_files(manifest: Manifest) -> list[str]:
    """What of the frozen parts may lie in a bundle's own folder."""
    encoder, llm = manifest.encoder, manifest.llm
    return [name for name in (encoder.graph, encoder.external_data, llm.tokenizer, llm.config) if name]


def _linked(source: Path, target: Path) -> None:
    """The same file under another name where the disk allows it, else a copy: an encoder's weights may be gigabytes."""
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def publish(
    parts: Trained,
    recipe: Recipe,
    base: Bundle,
    folder: Path,
    *,
    calibration: Mapping[str, Calibration],
    facts: Mapping[str, Any],
) -> Bundle:
    """Writes the bundle `folder` from the trained parts and what `base` brings, and returns it.

    `facts` hold bundle.json's description, data, figures and not_for.
    """
    folder.mkdir(parents=True, exist_ok=True)
    manifest = base.manifest
    kept = [name for name in _frozen_files(manifest) if name in manifest.files]
    for name in kept:
        if base.folder != folder:
            (_linked if name == manifest.encoder.external_data else shutil.copyfile)(base.path(name), folder / name)
    parts.projector.cpu()
    half = {name: weight.detach().half().contiguous() for name, weight in parts.projector.state_dict().items()}
    if parts.readout is not None:
        half["log_scale"] = parts.readout.log_scale.detach().float().cpu()
        half["token_ids"] = parts.readout.token_ids.to(torch.int32)
    save_file(half, folder / PROJECTOR_WEIGHTS)
    export_projector(parts.projector, folder / PROJECTOR_GRAPH, PROJECTOR_WEIGHTS)
    write_adapter(parts.llm, folder)
    ours = "Apache-2.0"
    licences = {name: manifest.files[name].licence for name in kept} | {
        PROJECTOR_GRAPH: ours,
        PROJECTOR_WEIGHTS: ours,
        ADAPTER_WEIGHTS: ours,
        ADAPTER_CONFIG: ours,
    }
    frozen = manifest.model_dump(by_alias=True, include=KEPT)
    origin = {"continued_from": f"{manifest.name} {manifest.version}, id {base.id}"} if recipe.continues else {}
    fields = frozen | {
        "name": recipe.name,
        "projector": {
            "graph": PROJECTOR_GRAPH,
            "weights": PROJECTOR_WEIGHTS,
            "config": recipe.projector.model_dump(exclude_none=True),
        },
        "readout": {"num_tokens": len(parts.readout.token_ids)} if parts.readout else {},
        "adapter": {"weights": ADAPTER_WEIGHTS, "config": recipe.adapter.model_dump()},
        "calibration": plain(calibration),
        "recipe": recipe.model_dump() | {"precision": precision_of(recipe)} | origin,
        **facts,
    }
    return _written(folder, fields, licences, base.cache_option)
