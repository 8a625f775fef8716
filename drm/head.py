"""The head: image tokens to one score per picture, in float32 whatever the backbone runs in.

    h = MLP(LayerNorm(f_v))                 (B, L, D) -> (B, L, hidden), Linear - GELU - Linear
    m = tokens of h on their H x W grid     row-major, any H and W
    m = GELU(GroupNorm(Conv3x3(m)))         twice
    score = Linear(mean over H, W of m)     (B,)

The DRM paper gives the outline (projection, 2D map, small convolutional network, pooling, linear layer) and
not the sizes; the layer norm in front is ours, because late SD3 tokens carry a few very large channels.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


class ConvHead(nn.Module):
    """dim: width of a token; hidden: width of the map."""

    def __init__(self, dim: int, hidden: int = 256) -> None:
        super().__init__()
        self.dim, self.hidden = dim, hidden
        self.norm = nn.LayerNorm(dim)
        self.mlp = nn.Sequential(nn.Linear(dim, hidden), nn.GELU(), nn.Linear(hidden, hidden))
        groups = math.gcd(32, hidden)
        self.conv = nn.Sequential(
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GroupNorm(groups, hidden),
            nn.GELU(),
            nn.Conv2d(hidden, hidden, 3, padding=1),
            nn.GroupNorm(groups, hidden),
            nn.GELU(),
        )
        self.out = nn.Linear(hidden, 1)

    def _apply(self, fn: Callable, recurse: bool = True) -> "ConvHead":
        # .to(bfloat16) and .half() on the whole model move the head but leave its dtype alone.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)

    def forward(self, tokens: Tensor, height: int, width: int) -> Tensor:
        """Scores (B,) float32 of tokens (B, height * width, dim) in row-major order."""
        if tokens.shape[1:] != (height * width, self.dim):
            raise ValueError(
                f"tokens have shape {tuple(tokens.shape)}: wanted (B, {height * width}, {self.dim}) for a"
                f" {height}x{width} grid"
            )
        with torch.autocast(tokens.device.type, enabled=False):
            hidden = self.mlp(self.norm(tokens.float()))
            image = hidden.transpose(1, 2).reshape(len(tokens), self.hidden, height, width)
            return self.out(self.conv(image).mean(dim=(2, 3))).squeeze(1)
