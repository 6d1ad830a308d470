"""Whether one voice is heard or several: windows of 2 s, as points of a space in which one speaker's lie together.

A window is the mean and deviation over time of its frames, each of them at mean 0 and variance 1; a linear map (from
discriminant analysis over many speakers, svbatch.training.speakers) makes a point of unit length of it. Three numbers
about all points of a hearing tell the rest: how near the two sides of the best cut in time are to each other, how near
two points are on average, and how near the two that are farthest apart.
"""

import torch
from torch import Tensor, nn

from svbatch.speech.layers import length_mask

WINDOW = 100  # frames: 2 s
HOP = 50
DIMENSIONS = 64
CLUES = 3
FLOOR = 1e-5


class SpeakerCount(nn.Module):
    """Logits of `num_labels` labels, from one voice to several. Nothing in it learns by gradients: it is fitted, so its
    two linear layers, `place` and `output`, are buffers."""

    place: Tensor
    place_offset: Tensor
    output: Tensor
    output_offset: Tensor

    def __init__(self, *, frame_width: int, num_labels: int) -> None:
        super().__init__()
        self.register_buffer("place", torch.eye(DIMENSIONS, 2 * frame_width))
        self.register_buffer("place_offset", torch.zeros(DIMENSIONS))
        self.register_buffer("output", torch.zeros(num_labels, CLUES))
        self.register_buffer("output_offset", torch.zeros(num_labels))

    def forward(self, frames: Tensor, lengths: Tensor) -> Tensor:
        """(B, T, D) and (B,) valid frames -> (B, num_labels)."""
        windows, real = window_statistics(frames, lengths)
        return nn.functional.linear(clues(self.points(windows), real), self.output, self.output_offset)

    def points(self, windows: Tensor) -> Tensor:
        """(B, N, 2 D) -> (B, N, DIMENSIONS) of unit length."""
        return nn.functional.normalize(nn.functional.linear(windows, self.place, self.place_offset), dim=2)


def window_statistics(frames: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """(B, T, D) and (B,) -> mean and deviation over each window, (B, N, 2 D), and which windows hold enough, (B, N):
    half of one, or all that there is."""
    scaled = nn.functional.layer_norm(frames, frames.shape[2:])
    real = length_mask(lengths, frames.shape[1]).to(frames.dtype)
    shares = _over_windows(real[:, None])
    mean, squares = (
        _over_windows((each * real[:, :, None]).transpose(1, 2)) / shares.clamp(min=FLOOR)
        for each in (scaled, scaled.square())
    )
    deviation = (squares - mean.square()).clamp(min=0.0).sqrt()
    enough = shares[:, 0] >= 0.5
    first = torch.arange(enough.shape[1], device=enough.device)[None, :] == 0
    return torch.cat([mean, deviation], dim=1).transpose(1, 2), enough | first


def _over_windows(columns: Tensor) -> Tensor:
    """(B, C, T) -> the mean over each window, zeros past the end, (B, C, N)."""
    after = columns.new_zeros(columns.shape[0], columns.shape[1], WINDOW - 1)  # onnxruntime would fuse a padding
    return nn.functional.avg_pool1d(torch.cat([columns, after], dim=2), WINDOW, stride=HOP)


def clues(points: Tensor, real: Tensor) -> Tensor:
    """(B, N, K) of unit length, (B, N) True where one is -> (B, CLUES), cosines; 1 where there is one point alone."""
    weights = real.to(points.dtype)
    own = points * weights[:, :, None]
    num, total = weights.sum(dim=1), own.sum(dim=1)
    left = own.cumsum(dim=1)
    is_cut = weights.cumsum(dim=1) < num[:, None]
    sides = nn.functional.cosine_similarity(left, total[:, None] - left, dim=2)
    cut = torch.where(is_cut, sides, 1.0).amin(dim=1)
    pairs = (num * (num - 1)).clamp(min=1.0)
    average = torch.where(num > 1, (total.square().sum(dim=1) - num) / pairs, 1.0)
    both = real[:, :, None] & real[:, None, :]
    farthest = torch.where(both, points @ points.transpose(1, 2), 1.0).amin(dim=(1, 2))
    return torch.stack([cut, average, farthest], dim=1)
