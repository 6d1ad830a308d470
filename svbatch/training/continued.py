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
"""What a recipe may change of a projector that it continues."""


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
    """Notes in `output` what the training there continues. Raises TrainingError if a run before began with another:
    a checkpoint holds only what learns."""
    path = output / "continues.txt"
    if recipe.continues and path.exists() and path.read_text() != bundle.id:
        raise TrainingError(
            f"{path}: training here began with the bundle {path.read_text()}, and {recipe.parts} is now {bundle.id}; "
            "give that bundle by `parts`, or another --output"
        )
    if recipe.continues:
        path.write_text(bundle.id)
