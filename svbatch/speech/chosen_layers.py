"""Which of an encoder's layers make a frame."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from svbatch.errors import BundleError


@dataclass(frozen=True)
class ChosenLayers:
    """What is said stands in the last layer alone, or in all of them side by side where they are `mixed`. `voice`: the
    number, from 1, of the layer that tells who says it and how; an early one tells it best. None for no such layer."""

    mixed: bool = False
    voice: int | None = None

    def require(self, num_layers: int) -> None:
        """Raises BundleError where the encoder has no layer `voice`."""
        if self.voice is not None and not 1 <= self.voice <= num_layers:
            raise BundleError(f"layer {self.voice} for the voice: the encoder has layers 1 to {num_layers}; name one")

    def frames(self, layers: Sequence[Tensor]) -> Tensor:
        """Every layer's (B, T, D) -> (B, T, D), or L · D where they are mixed, and D more for the voice."""
        chosen = list(layers) if self.mixed else [layers[-1]]
        if self.voice is not None:
            chosen.append(layers[self.voice - 1])
        return torch.cat(chosen, dim=2) if len(chosen) > 1 else chosen[0]


LAST_LAYER = ChosenLayers()
