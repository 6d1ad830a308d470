"""Going on from a trained bundle: what learns begins as the bundle's own, so that new data or questions are added."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from svbatch.bundle import Bundle
from svbatch.errors import TrainingError
from svbatch.language.weights import fill_adapter
from svbatch.speech.projector import ConvolutionalProjector, Projector
from svbatch.training.recipe import Recipe

FREE = {"dropout", "voice_layer"}
"""What is not compared of a projector that continues: the first changes no weight, the second is in the encoder."""
START = "continues.txt"


def take_up(recipe: Recipe, bundle: Bundle, projector: Projector | ConvolutionalProjector, llm: Any) -> Tensor | None:
    """Fills what the recipe continues, the projector or the adapter, the LoRA layers of `llm`, with what the bundle has
    learnt. Returns the ids of the tokens that its read-out scores, (N,) int64; None if the projector does not continue
    or has no read-out.

    Raises TrainingError where the recipe's parts are others, or the bundle has learnt nothing.
    """
    if not recipe.continues:
        return None
    manifest = bundle.manifest
    if manifest.projector is None or manifest.adapter is None:
        raise TrainingError(f"continues: {bundle.ref} has no projector or adapter to go on from; leave it out")
    if "adapter" in recipe.continues:
        _require_same("adapter", recipe.adapter.model_dump(), manifest.adapter.config, bundle)
        fill_adapter(llm, bundle.path(manifest.adapter.weights).parent)
    if "projector" not in recipe.continues:
        return None
    _require_same("projector", recipe.projector.model_dump(exclude_none=True), manifest.projector.config, bundle)
    weights = load_file(bundle.path(manifest.projector.weights))
    token_ids = weights.pop("token_ids", None)
    own = projector.state_dict()
    odd = sorted(own.keys() ^ weights.keys())
    odd += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if odd:
        raise TrainingError(
            f"continues: {len(odd)} tensors of the recipe's projector are not as in {bundle.ref} (first: {odd[0]}); "
            "give the bundle `parts` that were made with the same layers and labels, or leave out `continues`"
        )
    projector.load_state_dict({name: weight.to(own[name].dtype) for name, weight in weights.items()})
    return None if token_ids is None else token_ids.long()


def _require_same(part: str, wanted: dict[str, Any], learnt: dict[str, Any], bundle: Bundle) -> None:
    for key in sorted((wanted.keys() | learnt.keys()) - FREE):
        if wanted.get(key) != learnt.get(key):
            raise TrainingError(
                f"continues: {part}.{key} is {wanted.get(key)} in the recipe, and {learnt.get(key)} in {bundle.ref}; "
                f"write `{part}` as the recipe in its bundle.json has it"
            )


def require_same_start(recipe: Recipe, bundle: Bundle, output: Path) -> None:
    """Raises TrainingError where checkpoints in `output` began with another bundle: they hold only what learns."""
    noted = output / START
    began, now = noted.read_text() if noted.exists() else "", bundle.id if recipe.continues else ""
    if began != now and any(output.glob("*.pt")):
        raise TrainingError(
            f"{noted}: training here began with {began or 'no bundle'}, and would go on from {now or 'none'}; "
            "write `parts` and `continues` as they were, or give another --output"
        )


def note_start(recipe: Recipe, bundle: Bundle, output: Path) -> None:
    """Notes in `output` what training there continues."""
    if recipe.continues:
        part = output / f"{START}.part"
        part.write_text(bundle.id)
        part.replace(output / START)
