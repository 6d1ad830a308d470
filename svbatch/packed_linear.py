"""Linear layers of bfloat16 on a CPU, whose weights are laid out once as its matrix products read them.

torch lays out a plain layer's weights anew at every call: a third of the time where few tokens are multiplied, a
twentieth where many are. The numbers are the same, bit by bit.
"""

import torch
from torch import Tensor, nn


class PackedLinear(nn.Module):
    """`linear` for inference alone, with no `weight` that could be read."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._weight = packed_weight(linear)
        self._bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, states: Tensor) -> Tensor:
        product: Tensor = torch.ops.mkldnn._linear_pointwise(states, self._weight, self._bias, "none", [], "")
        return product


def packed_weight(linear: nn.Linear) -> Tensor:
    """The layer's weights as oneDNN lays them out."""
    weight: Tensor = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach())
    return weight


def gains_by_packing(weight: Tensor) -> bool:
    """Whether this processor gains by it."""
    is_likely = weight.device.type == "cpu" and weight.dtype == torch.bfloat16
    return is_likely and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def packed(linear: nn.Linear) -> nn.Module:
    """A PackedLinear where this processor gains by it, else the layer itself."""
    return PackedLinear(linear) if gains_by_packing(linear.weight) else linear


def pack(module: nn.Module) -> None:
    """Packs every linear layer inside `module`, in place."""
    for name, child in module.named_children():
        if type(child) is nn.Linear:
            setattr(module, name, packed(child))
        else:
            pack(child)
