"""The diffusion reward model: a truncated SD3 backbone and a head, from noisy latents to a score.

    raw = head(backbone(x_sigma, timestep = 1000 sigma, positive prompt));  score = scale * raw + offset

(DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026.) Latents are in model space and carry
the noise that sigma says; only the positive prompt is given, there is no guidance in a reward model. Scores
rank pictures at one sigma; across sigmas they compare only after calibration. scale and offset are 1 and 0
unless the model's maker shows its score otherwise.
"""

import torch
from torch import Tensor, nn

from .backbone import TruncatedSD3
from .head import ConvHead, QueryHead


class DRM(nn.Module):
    """metadata: what is known about the model (text_length, calibration, name, ...), kept in its file; its
    "shown", {"scale", "offset"}, is how `score` shows the raw score.
    """

    def __init__(
        self, backbone: TruncatedSD3, head: ConvHead | QueryHead, metadata: dict | None = None
    ) -> None:
        super().__init__()
        if head.dim != backbone.config.width:
            raise ValueError(
                f"the head takes tokens of width {head.dim}, the backbone's are {backbone.config.width}"
            )
        taps = len(backbone.config.image_taps), len(backbone.config.text_taps)
        if isinstance(head, QueryHead) and head.taps != taps:
            raise ValueError(
                f"the head reads {head.taps[0]} image and {head.taps[1]} text taps, the backbone has"
                f" {taps[0]} and {taps[1]}"
            )
        self.backbone = backbone
        self.head = head
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
    ) -> Tensor:
        """Raw scores (B,) in float32, with gradients; see `score` for the arguments."""
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
        )
        if isinstance(self.head, QueryHead):
            return self.head(features)
        return self.head(features.tokens, *self.backbone.token_grid(*latents.shape[-2:]))

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
