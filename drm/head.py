"""The heads: tokens to one score per picture, in float32 whatever the backbone runs in.

ConvHead, DRM's own kind, on the image tokens f_v after the last kept block:

    h = MLP(LayerNorm(f_v))                 (B, L, D) -> (B, L, hidden), Linear - GELU - Linear
    m = tokens of h on their H x W grid     row-major, any H and W
    m = GELU(GroupNorm(Conv3x3(m)))         twice
    score = Linear(mean over H, W of m)     (B,)

The DRM paper gives the outline (projection, 2D map, small convolutional network, pooling, linear layer) and
not the sizes; the layer norm in front is ours, because late SD3 tokens carry a few very large channels.

ConvGNHead, the DRM authors' published kind, on what the model's own norm_out and proj_out make of the tokens:

    m = ReLU(GroupNorm(Conv3x3(m)))         (B, 16, H, W), three times, stride 2: 16 -> 256 -> 512 -> 512
    score = Linear(Dropout(ReLU(Linear(mean over H, W of m))))          (B,)

QueryHead, DiNa-LRM's kind, on the tapped tokens x_i of both streams and the time-text embedding temb:

    y_i = Linear_i(x_i (1 + gamma_i) + beta_i + e_i)        (gamma_i, beta_i) = MLP_i(temb), e_i learned
    image = Linear(y_i of the image taps, concatenated)     text likewise
    q = q + out(attend(q, image) + attend(q, text))         q: learned queries; values gated token by token
    q = q + out(attend(q, image))                           without gates
    score = mean over the queries of Linear(q + MLP(RMSNorm(q)))
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Features

# The range of DiNa-LRM's logistic output.
_LOGISTIC_HEIGHT, _LOGISTIC_LOW = 4.0, -2.0


class _Float32Module(nn.Module):
    def _apply(self, fn: Callable, recurse: bool = True) -> "_Float32Module":
        # .to(bfloat16) and .half() on the whole model move the head but leave its dtype alone.
        def keep_dtype(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        return super()._apply(keep_dtype, recurse)


class ConvHead(_Float32Module):
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

    def to_dict(self) -> dict:
        """Its place in a file's header."""
        return {"kind": "conv", "dim": self.dim, "hidden": self.hidden}

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


class RowDropout(nn.Module):
    """Dropout of (B, D) whose mask is a function of a number for each row, so that a training which is killed
    or spread over more processes drops the same. numbers: whole numbers, set before a call; None draws anew.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        self.share, self.numbers = share, None

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.share:
            return x
        if self.numbers is None:
            return F.dropout(x, self.share)
        if len(self.numbers) != len(x):
            raise ValueError(f"{len(self.numbers)} numbers for a dropout of {len(x)} rows: give one for each")
        rows = [torch.rand(x.shape[1], generator=_generator(number)) for number in self.numbers]
        return x * (torch.stack(rows).to(x.device) >= self.share) / (1 - self.share)


def _generator(number: int) -> torch.Generator:
    # Neighbouring seeds of one generator are alike in their first draws; a large odd factor parts them.
    return torch.Generator().manual_seed(number * 0x9E3779B97F4A7C15 & 0x7FFFFFFFFFFFFFFF)


class ConvGNHead(_Float32Module):
    """channels: of the velocity it reads, widths: of the three maps. The parameters have the names of the
    published head, whose state dict loads as it is.
    """

    def __init__(
        self, channels: int = 16, widths: tuple[int, int, int] = (256, 512, 512), dropout: float = 0.1
    ) -> None:
        super().__init__()
        self.channels, self.widths, self.dropout = channels, tuple(widths), dropout

        def down(before: int, after: int) -> nn.Sequential:
            layers = (
                nn.Conv2d(before, after, 3, stride=2, padding=1),
                nn.GroupNorm(math.gcd(32, after), after),
            )
            return nn.Sequential(*layers, nn.ReLU())

        self.down1 = down(channels, widths[0])
        self.down2 = down(widths[0], widths[1])
        self.down3 = down(widths[1], widths[2])
        last = widths[2]
        self.drop = RowDropout(dropout)
        self.mlp = nn.Sequential(nn.Linear(last, last), nn.ReLU(), self.drop, nn.Linear(last, 1))

    def to_dict(self) -> dict:
        """Its place in a file's header."""
        return {
            "kind": "conv_gn",
            "channels": self.channels,
            "widths": list(self.widths),
            "dropout": self.dropout,
        }

    def forward(self, velocity: Tensor) -> Tensor:
        """Scores (B,) float32 of a backbone's velocity (B, channels, H, W), of any size."""
        with torch.autocast(velocity.device.type, enabled=False):
            image = self.down3(self.down2(self.down1(velocity.float())))
            return self.mlp(image.mean(dim=(2, 3))).squeeze(1)


class QueryHead(_Float32Module):
    """dim: width of a token and of temb; image_taps, text_taps: how many there are; width: inside the head,
    dim when not given.

    Tokens are projected to `width` first where it is not `dim` or use_proj_in says so. logistic: (centre,
    scale) of DiNa-LRM's optional output 4 / (1 + exp(-(score - centre) / scale)) - 2. The parameters have the
    names of the published head, whose state dict loads as it is.
    """

    def __init__(
        self,
        dim: int,
        image_taps: int,
        text_taps: int,
        width: int | None = None,
        num_queries: int = 4,
        num_heads: int = 8,
        use_proj_in: bool = False,
        logistic: tuple[float, float] | None = None,
    ) -> None:
        super().__init__()
        width = width or dim
        if image_taps < 1 or text_taps < 0 or num_queries < 1:
            raise ValueError(
                f"{image_taps} image taps, {text_taps} text taps and {num_queries} queries: wanted at least"
                " one image tap and one query"
            )
        if width % num_heads:
            raise ValueError(
                f"the head is {width} wide: wanted a multiple of its {num_heads} attention heads"
            )
        self.dim, self.width, self.use_proj_in = dim, width, use_proj_in
        self.logistic = tuple(logistic) if logistic else None

        def adapters(count: int) -> nn.ModuleList:
            return nn.ModuleList(_TapAdapter(dim, width, use_proj_in) for _ in range(count))

        self.layer_adapters_visual = adapters(image_taps)
        self.layer_adapters_text = adapters(text_taps)
        self.agg_visual = nn.Linear(image_taps * (width // 4), width)
        self.agg_text = nn.Linear(text_taps * (width // 4), width) if text_taps else None
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, num_queries, width))
        self.attn1 = _QueryAttention(width, num_heads, text=text_taps > 0, gated=True)
        self.attn2 = _QueryAttention(width, num_heads, text=False, gated=False)
        self.norm_ff = nn.RMSNorm(width)
        self.ff = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.head = nn.Linear(width, 1)

    @property
    def taps(self) -> tuple[int, int]:
        """How many image taps and how many text taps it reads."""
        return len(self.layer_adapters_visual), len(self.layer_adapters_text)

    def to_dict(self) -> dict:
        """Its place in a file's header."""
        image_taps, text_taps = self.taps
        return {
            "kind": "query",
            "dim": self.dim,
            "image_taps": image_taps,
            "text_taps": text_taps,
            "width": self.width,
            "num_queries": self.query_tokens.shape[1],
            "num_heads": self.attn1.num_heads,
            "use_proj_in": self.use_proj_in,
            "logistic": self.logistic,
        }

    def forward(self, features: Features) -> Tensor:
        """Scores (B,) float32 of a backbone's taps."""
        if (len(features.image), len(features.text)) != self.taps:
            raise ValueError(
                f"{len(features.image)} image and {len(features.text)} text taps: wanted"
                f" {self.taps[0]} and {self.taps[1]}"
            )
        with torch.autocast(features.temb.device.type, enabled=False):
            temb = features.temb.float()
            image = self.agg_visual(_adapt(self.layer_adapters_visual, features.image, temb))
            text = (
                self.agg_text(_adapt(self.layer_adapters_text, features.text, temb)) if self.taps[1] else None
            )
            queries = self.attn1(self.query_tokens.expand(len(temb), -1, -1), image, text)
            queries = self.attn2(queries, image)
            queries = queries + self.ff(self.norm_ff(queries))
            score = self.head(queries).mean(dim=1).squeeze(1)
            if self.logistic is None:
                return score
            centre, scale = self.logistic
            return _LOGISTIC_HEIGHT * torch.sigmoid((score - centre) / (abs(scale) + 1e-6)) + _LOGISTIC_LOW


def _adapt(adapters: nn.ModuleList, taps: list[Tensor], temb: Tensor) -> Tensor:
    return torch.cat([adapt(tap.float(), temb) for adapt, tap in zip(adapters, taps, strict=True)], dim=-1)


class _TapAdapter(nn.Module):
    """One tap, modulated by temb (FiLM), at a quarter of the head's width."""

    def __init__(self, dim: int, width: int, use_proj_in: bool) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, width) if use_proj_in or dim != width else nn.Identity()
        self.layer_embed = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.cond_mlp = nn.Sequential(nn.Linear(dim, 2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width))
        self.proj = nn.Linear(width, width // 4)
        # A new head starts without modulation.
        nn.init.zeros_(self.cond_mlp[2].weight)
        nn.init.zeros_(self.cond_mlp[2].bias)

    def forward(self, tokens: Tensor, temb: Tensor) -> Tensor:
        gamma, beta = self.cond_mlp(temb).unsqueeze(1).chunk(2, dim=-1)
        return self.proj(self.proj_in(tokens) * (1 + gamma) + beta + self.layer_embed)


class _QueryAttention(nn.Module):
    """Queries attend to image tokens and, where there are some, to text tokens; the two results are added."""

    def __init__(self, width: int, num_heads: int, text: bool, gated: bool) -> None:
        super().__init__()
        self.num_heads = num_heads

        def gate() -> nn.Sequential:
            layers = nn.Sequential(nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 1))
            nn.init.zeros_(layers[2].weight)
            nn.init.zeros_(layers[2].bias)
            return layers

        self.norm_q, self.norm_v = nn.RMSNorm(width), nn.RMSNorm(width)
        self.norm_t = nn.RMSNorm(width) if text else None
        self.to_q = nn.Linear(width, width)
        self.to_k_vis, self.to_v_vis = nn.Linear(width, width), nn.Linear(width, width)
        self.to_k_text = nn.Linear(width, width) if text else None
        self.to_v_text = nn.Linear(width, width) if text else None
        self.to_out = nn.Sequential(nn.Linear(width, width))
        self.gate_vis = gate() if gated else None
        self.gate_text = gate() if gated and text else None

    def _attend(
        self, query: Tensor, context: Tensor, to_k: nn.Module, to_v: nn.Module, gate: nn.Module | None
    ) -> Tensor:
        value = to_v(context) if gate is None else to_v(context) * torch.sigmoid(gate(context))
        query, key, value = (
            tensor.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for tensor in (query, to_k(context), value)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)

    def forward(self, queries: Tensor, image: Tensor, text: Tensor | None = None) -> Tensor:
        query = self.to_q(self.norm_q(queries))
        gathered = self._attend(query, self.norm_v(image), self.to_k_vis, self.to_v_vis, self.gate_vis)
        if text is not None:
            gathered = gathered + self._attend(
                query, self.norm_t(text), self.to_k_text, self.to_v_text, self.gate_text
            )
        return queries + self.to_out(gathered)
