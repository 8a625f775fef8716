"""A reward model without a network of its own: a head of a few megabytes on the model that samples.

    taps  = image tokens after some blocks of the trunk at (x_sigma, sigma, positive prompt)   (B, L, width)
    y_i   = Linear_i(LayerNorm(tap_i)),  e = MLP(sines of sigma)                    (B, L, dim), (B, dim)
    score = ConvHead(sum of y_i + e)   or   QueryHead(y_1 .. y_n, e)

The trunk is a callable, tokens(x, sigma, items) -> Taps, so that nothing here knows where the tokens come
from: ComfyUI's MODEL (nodes/trunk.py) or a transformer of diffusers (diffusers_trunk.py).
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .backbone import Features
from .head import ConvHead, QueryHead, _Float32Module
from .scoring import Parts, is_out_of_memory

KIND = "shared"
_SINES = 64
_SAMPLED_WEIGHTS, _SAMPLED_VALUES = 16, 4
# bfloat16 keeps 8 bits; weights of one model agree to that whatever 16-bit format they are kept in.
_SAME = 2.0**-7
OTHER_SHAPES = "its blocks have other weights, by name or shape"


@dataclass(frozen=True, kw_only=True)
class TrunkFacts:
    """What a shared head belongs to.

    family: a name as in nodes/trunk.py. width: of a token. num_blocks: of the whole model, its lists one
    behind the other. taps: blocks whose image tokens are read, ascending, 1 is the first. latent_channels: of
    the model's latents. fingerprint: see `fingerprint`; None when it is not known.
    """

    family: str
    width: int
    num_blocks: int
    taps: tuple[int, ...]
    latent_channels: int
    fingerprint: dict | None = None

    def __post_init__(self) -> None:
        taps = list(self.taps)
        if not taps or taps != sorted(set(taps)) or not 1 <= taps[0] <= taps[-1] <= self.num_blocks:
            raise ValueError(
                f"blocks {taps} are to be read: wanted ascending numbers from 1 to {self.num_blocks}, the"
                " model's blocks"
            )

    def to_dict(self) -> dict:
        """Its place in a file's header."""
        return {**asdict(self), "taps": list(self.taps)}


class Taps(NamedTuple):
    """Image tokens (n, rows * columns, width) of every tap, row-major over the token grid."""

    tokens: list[Tensor]
    rows: int
    columns: int


# (x (n, C, H, W) in model space, sigma, item (n,) long: the prompt of each) -> Taps
Tokens = Callable[[Tensor, float, Tensor], Taps]


class SharedDRM(_Float32Module):
    """metadata: as DRM's, and text (what the prompts it learned from were encoded with), accuracy, licence
    where they are known.
    """

    def __init__(self, trunk: TrunkFacts, head: ConvHead | QueryHead, metadata: dict | None = None) -> None:
        super().__init__()
        taps = (len(trunk.taps), 0)
        if isinstance(head, QueryHead) and head.taps != taps:
            raise ValueError(
                f"the head reads {head.taps[0]} image and {head.taps[1]} text taps: wanted {taps[0]} and 0,"
                " the blocks that are read"
            )
        self.trunk = trunk
        self.reader = TapReader(trunk.width, len(trunk.taps), head.dim)
        self.head = head
        self.metadata = dict(metadata or {})

    @property
    def dim(self) -> int:
        """Width of a token that it reads, as heads have it."""
        return self.trunk.width

    def forward(self, taps: Taps, sigma: float | Tensor) -> Tensor:
        """Raw scores (n,) in float32, with gradients; sigma: one for all or (n,)."""
        self._check(taps)
        with torch.autocast(taps.tokens[0].device.type, enabled=False):
            image, told = self.reader(taps.tokens, sigma)
            if isinstance(self.head, QueryHead):
                return self.head(Features(image[-1], image, [], told))
            tokens = torch.stack(image).sum(dim=0) + told.unsqueeze(1)
            return self.head(tokens, taps.rows, taps.columns)

    @torch.no_grad()
    def score(self, taps: Taps, sigma: float | Tensor) -> Tensor:
        """Scores (n,) as the head's maker shows them, higher is better. NaN tokens give NaN."""
        raw, shown = self(taps, sigma), self.metadata.get("shown")
        return raw if shown is None else shown["scale"] * raw + shown["offset"]

    def _check(self, taps: Taps) -> None:
        wanted = taps.rows * taps.columns, self.trunk.width
        shapes = [tuple(tokens.shape[1:]) for tokens in taps.tokens]
        if shapes != [wanted] * len(self.trunk.taps):
            raise ValueError(
                f"the taps have shapes {shapes}: wanted {len(self.trunk.taps)} of {wanted}, as the"
                f" {self.trunk.family} model that this head was made for gives"
            )


class TapReader(nn.Module):
    """Taps of width `width` and sigma, at the width `dim` of a head."""

    def __init__(self, width: int, taps: int, dim: int) -> None:
        super().__init__()
        self.taps = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, dim)) for _ in range(taps)
        )
        self.sigma = nn.Sequential(nn.Linear(_SINES, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, tokens: Sequence[Tensor], sigma: float | Tensor) -> tuple[list[Tensor], Tensor]:
        """Every tap (n, L, dim), and sigma (n, dim), float32."""
        sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=tokens[0].device).reshape(-1)
        sines = sines_of(sigmas.expand(len(tokens[0])))
        return [read(tap.float()) for read, tap in zip(self.taps, tokens, strict=True)], self.sigma(sines)


def sines_of(sigma: Tensor) -> Tensor:
    """(n, 64) of sigma (n,): sines and cosines of 1000 sigma, periods from 2 pi to 2 pi 10^4."""
    rates = torch.exp(-math.log(10000) * torch.arange(_SINES // 2, device=sigma.device) / (_SINES // 2))
    angles = 1000 * sigma[:, None] * rates
    return torch.cat((angles.cos(), angles.sin()), dim=1)


class SharedScorer:
    """score(candidates (n, C, H, W), sigma, item_index (n,)) -> (n,), as drm.scoring.Scorer's.

    chunk: most candidates at once; before, out_of_memory, free: as there. walked: how many candidates went
    through the trunk, those of a part that did not fit too.
    """

    def __init__(
        self,
        drm: SharedDRM,
        tokens: Tokens,
        *,
        chunk: int | None = None,
        before: Callable[[], object] | None = None,
        out_of_memory: Callable[[Exception], bool] = is_out_of_memory,
        free: Callable[[], object] | None = None,
    ) -> None:
        self.drm, self.tokens, self.walked = drm, tokens, 0
        self.parts = Parts(chunk, before, out_of_memory, free)

    def __call__(self, candidates: Tensor, sigma: float, item_index: Tensor) -> Tensor:
        """Scores (n,) on the candidates' device."""

        def score(part: slice) -> Tensor:
            latents = candidates[part]
            self.walked += len(latents)
            return self.drm.score(self.tokens(latents, sigma, item_index[part]), sigma)

        return self.parts.run(len(candidates), len(candidates), score).to(candidates.device)


def fingerprint(weights: Mapping[str, Tensor], layout: str) -> dict:
    """Tells one base model from another: {layout, shapes, values}, a few hundred bytes.

    weights: of the trunk's blocks, by name. layout: whose names they are; fingerprints of two layouts do not
    compare. shapes: sha256 of names and shapes. values: 64 sampled numbers, none where weights are packed
    or not at hand.
    """
    matrices = {name: weights[name] for name in sorted(weights) if weights[name].ndim > 1}
    text = "\n".join(f"{name} {tuple(value.shape)}" for name, value in matrices.items())
    names = list(matrices)[:: max(1, len(matrices) // _SAMPLED_WEIGHTS)][:_SAMPLED_WEIGHTS]
    values = [value for name in names for value in _sampled(matrices[name])]
    whole = len(values) == len(names) * _SAMPLED_VALUES
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {"layout": layout, "shapes": digest, "values": values if whole else []}


def _sampled(weight: Tensor) -> list[float]:
    """A few values from all over a weight; none of one that is packed or not in memory."""
    places = [(2 * i + 1) * weight.numel() // (2 * _SAMPLED_VALUES) for i in range(_SAMPLED_VALUES)]
    if not weight.is_floating_point() or weight.is_meta:
        return []
    try:
        values = weight.detach().reshape(-1)[places].float().tolist()
    except (NotImplementedError, RuntimeError, TypeError):
        # Quantised kinds of tensors need not know how to be indexed.
        return []
    return [float(f"{value:.6g}") for value in values]


def unlike(known: dict | None, found: dict | None) -> str | None:
    """How a base differs from the one a head was made on, the tail of a sentence; None if it does not, or if
    that cannot be told.
    """
    if not known or not found or known["layout"] != found["layout"]:
        return None
    if known["shapes"] != found["shapes"]:
        return OTHER_SHAPES
    pairs = list(zip(known["values"], found["values"], strict=False))
    other = sum(abs(a - b) > _SAME * max(abs(a), abs(b)) for a, b in pairs)
    if not other:
        return None
    return f"{100 * other / len(pairs):.0f} % of its sampled weights are others"
