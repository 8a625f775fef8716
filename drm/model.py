"""The diffusion reward model: a truncated SD3 backbone and a head, from noisy latents to a score.

    raw = head(backbone(x_sigma, timestep = 1000 sigma, positive prompt));  score = scale * raw + offset

(DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026.) Latents are in model space and carry
the noise that sigma says; only the positive prompt is given, there is no guidance in a reward model. Scores
rank pictures at one sigma; across sigmas they compare only after calibration. scale and offset are 1 and 0
unless the model's maker shows its score otherwise.

A model may carry further heads after earlier blocks, each an opinion of its own at a part of the cost. Scores
of different depths do not compare.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .backbone import TruncatedSD3
from .head import ConvHead, QueryHead


class DRM(nn.Module):
    """metadata: what is known about the model (text_length, calibration, name, ...), kept in its file; its
    "shown", {"scale", "offset"}, is how `score` shows the raw score. early_heads: heads on the image tokens
    after earlier blocks, by the number of blocks before them, 1 to num_kept - 1.
    """

    def __init__(
        self,
        backbone: TruncatedSD3,
        head: ConvHead | QueryHead,
        metadata: dict | None = None,
        early_heads: Mapping[int, ConvHead] | None = None,
    ) -> None:
        super().__init__()
        early = dict(sorted((early_heads or {}).items()))
        for some_head in (head, *early.values()):
            if some_head.dim != backbone.config.width:
                raise ValueError(
                    f"the head takes tokens of width {some_head.dim}, the backbone's are"
                    f" {backbone.config.width}"
                )
        if not set(early) <= set(range(1, backbone.config.num_kept)):
            raise ValueError(
                f"early heads stand after blocks {', '.join(map(str, early))}: wanted numbers from 1 to"
                f" {backbone.config.num_kept - 1}"
            )
        taps = len(backbone.config.image_taps), len(backbone.config.text_taps)
        if isinstance(head, QueryHead) and head.taps != taps:
            raise ValueError(
                f"the head reads {head.taps[0]} image and {head.taps[1]} text taps, the backbone has"
                f" {taps[0]} and {taps[1]}"
            )
        self.backbone = backbone
        self.head = head
        self.early_heads = nn.ModuleDict({str(blocks): early[blocks] for blocks in early})
        self.metadata = dict(metadata or {})

    @property
    def in_channels(self) -> int:
        """Channels of the latents it scores."""
        return self.backbone.config.in_channels

    @property
    def prompt_dim(self) -> int:
        """Width of prompt_embeds."""
        return self.backbone.config.joint_attention_dim

    @property
    def pooled_dim(self) -> int:
        """Width of pooled_prompt_embeds."""
        return self.backbone.config.pooled_projection_dim

    @property
    def num_blocks(self) -> int:
        """Transformer blocks kept."""
        return self.backbone.config.num_kept

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks before each head, ascending; the last is num_blocks."""
        return (*(int(blocks) for blocks in self.early_heads), self.num_blocks)

    def _check_shapes(self, latents: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> None:
        if latents.ndim != 4 or len(latents) == 0:
            raise ValueError(f"latents have shape {tuple(latents.shape)}: wanted a non-empty (B, C, H, W)")
        if latents.shape[1] != self.in_channels:
            raise ValueError(
                f"the latent has {latents.shape[1]} channels, this reward model reads {self.in_channels}: use"
                " it with the model family it was trained on (SD3 has 16 channels, SD1.5 and SDXL have 4)"
            )
        for name, got, ndim, wanted in (
            ("prompt embedding", prompt_embeds, 3, self.prompt_dim),
            ("pooled prompt embedding", pooled_prompt_embeds, 2, self.pooled_dim),
        ):
            if got is None:
                raise ValueError(f"the {name} is missing: this reward model needs one of width {wanted}")
            if got.ndim != ndim or got.shape[-1] != wanted:
                raise ValueError(
                    f"the {name} has shape {tuple(got.shape)}, this reward model wants width {wanted}: use"
                    " the text encoders of the model it was trained with"
                )
            if len(got) not in (1, len(latents)):
                raise ValueError(f"{len(got)} {name}s for {len(latents)} latents: give one, or one for each")

    def forward(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
        every_depth: bool = False,
    ) -> Tensor:
        """Raw scores (B,) in float32, with gradients; see `score` for the other arguments.

        every_depth: (B, len(depths)) instead, the last column the model's score.
        """
        self._check_shapes(latents, prompt_embeds, pooled_prompt_embeds)
        batch = len(latents)
        sigma = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device)
        if sigma.numel() not in (1, batch):
            raise ValueError(f"{sigma.numel()} sigmas for {batch} latents: give one, or one for each")
        features = self.backbone.features(
            latents,
            1000 * sigma.reshape(-1).expand(batch),
            prompt_embeds.expand(batch, -1, -1),
            pooled_prompt_embeds.expand(batch, -1),
            blocks=self.depths[:-1] if every_depth else (),
        )
        grid = self.backbone.token_grid(*latents.shape[-2:])
        last = self.head(features) if isinstance(self.head, QueryHead) else self.head(features.tokens, *grid)
        if not every_depth:
            return last
        heads = zip(self.early_heads.values(), features.after, strict=True)
        early = [early_head(tokens, *grid) for early_head, tokens in heads]
        return torch.stack([*early, last], dim=1)

    def forward_depths(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
    ) -> Tensor:
        """Raw scores (B, len(depths)) of every head in float32, with gradients, as `forward` gives them."""
        return self(latents, sigma, prompt_embeds, pooled_prompt_embeds, every_depth=True)

    @torch.no_grad()
    def score(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
    ) -> Tensor:
        """Scores (B,) in float32 as its maker shows them, higher is better, without gradients.

        latents: (B, C, H, W) in model space at noise sigma, sides in multiples of the patch. sigma: one
        number in [0, 1] or one for each, (B,). prompt_embeds (B or 1, T, prompt_dim), pooled_prompt_embeds (B
        or 1, pooled_dim). Inputs are taken in any dtype. Raises ValueError for other shapes, a sigma outside
        [0, 1], or latents with NaN or infinity.
        """
        values = torch.as_tensor(sigma, dtype=torch.float32)
        # Float32 schedules overshoot 1 by a rounding error. Written so that NaN fails too.
        if not bool(((values >= 0) & (values <= 1 + 1e-4)).all()):
            raise ValueError(f"sigma is {values.flatten().tolist()}: wanted 0 (clean) to 1 (pure noise)")
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("latents hold NaN or infinity: look at what made them (a broken VAE or model)")
        raw = self(latents, sigma, prompt_embeds, pooled_prompt_embeds)
        shown = self.metadata.get("shown")
        return raw if shown is None else shown["scale"] * raw + shown["offset"]
