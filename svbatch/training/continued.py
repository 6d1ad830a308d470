"""Going on from a trained bundle: what learns begins as the bundle's own, so that new data or questions are added."""

from collections.abc import Collection
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from svbatch.bundle import Bundle
from svbatch.errors import TrainingError
from svbatch.language.weights import fill_adapter
from svbatch.speech.projector import ConvolutionalProjector, Projector


def take_up(
    wanted: Collection[str], bundle: Bundle, projector: Projector | ConvolutionalProjector, llm: Any
) -> Tensor | None:
    """Fills what is `wanted`, the projector or the adapter, the LoRA layers of `llm`, with what the bundle has learnt.
    Returns the ids of the tokens that its read-out scores, (N,) int64; None if the projector is not wanted or has none.

    Raises TrainingError where the recipe's shapes are others, or the bundle has learnt nothing.
    """
    manifest = bundle.manifest
    if wanted and (manifest.projector is None or manifest.adapter is None):
        raise TrainingError(f"continues: {bundle.ref} has no projector or adapter to go on from; leave it out")
    if "adapter" in wanted and manifest.adapter is not None:
        fill_adapter(llm, bundle.path(manifest.adapter.weights).parent)
    if "projector" not in wanted or manifest.projector is None:
        return None
    weights = load_file(bundle.path(manifest.projector.weights))
    token_ids = weights.pop("token_ids", None)
    own = projector.state_dict()
    odd = sorted(own.keys() ^ weights.keys())
    odd += [name for name in own if name in weights and own[name].shape != weights[name].shape]
    if odd:
        raise TrainingError(
            f"continues: {len(odd)} tensors of the recipe's projector are not as in {bundle.ref} (first: {odd[0]}); "
            "write `projector` as the recipe in its bundle.json has it"
        )
    projector.load_state_dict({name: weight.to(own[name].dtype) for name, weight in weights.items()})
    return None if token_ids is None else token_ids.long()
