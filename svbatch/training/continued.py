"""Going on from a trained bundle: what learns begins as the bundle's own, so that new data or questions are added."""

from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from svbatch.bundle import Bundle
from svbatch.errors import TrainingError
from svbatch.language.weights import fill_adapter
from svbatch.speech.projector import ConvolutionalProjector, Projector


def take_up(bundle: Bundle, projector: Projector | ConvolutionalProjector, llm: Any) -> Tensor | None:
    """Fills the projector, and the LoRA layers of `llm`, with what the bundle has learnt. Returns the ids of the tokens
    that its read-out scores, (N,) int64; None if it has no read-out.

    Raises TrainingError where the recipe's shapes are others, or the bundle has learnt nothing.
    """
    manifest = bundle.manifest
    if manifest.projector is None or manifest.adapter is None:
        raise TrainingError(f"continues: {bundle.ref} has no projector or adapter to go on from; leave it out")
    weights = load_file(bundle.path(manifest.projector.weights))
    token_ids = weights.pop("token_ids", None)
    own = projector.state_dict()
    odd = sorted(
        name
        for name in own.keys() | weights.keys()
        if name not in own or name not in weights or own[name].shape != weights[name].shape
    )
    if odd:
        raise TrainingError(
            f"continues: {len(odd)} tensors of the recipe's projector are not as in {bundle.ref} (first: {odd[0]}); "
            "write `projector` as the bundle's bundle.json has it, and `voice_layer` as its recipe"
        )
    projector.load_state_dict({name: weight.to(own[name].dtype) for name, weight in weights.items()})
    fill_adapter(llm, bundle.path(manifest.adapter.weights).parent)
    return None if token_ids is None else token_ids.long()
