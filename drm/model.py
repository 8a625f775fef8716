"""The diffusion reward model: a truncated SD3 backbone and a head, from noisy latents to a score.

    raw = head(backbone(x_sigma, timestep = 1000 sigma, positive prompt));  score = scale * raw + offset

(DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026.) Latents are in model space and carry
the noise that sigma says; only the positive prompt is given, there is no guidance in a reward model. Scores
rank pictures at one sigma; across sigmas they compare only after calibration. scale and offset are 1 and 0
unless the model's maker shows its score otherwise.
"""

import torch
from torch import Tensor, nn

from .backbone import Compiled, Features, Prepared, TruncatedSD3
from .head import ConvGNHead, ConvHead, QueryHead


class DRM(nn.Module):
    """metadata: what is known about the model (text_length, calibration, name, ...), kept in its file; its
    "shown", {"scale", "offset"}, is how `score` shows the raw score.
    """

    def __init__(
        self,
        backbone: TruncatedSD3,
        head: ConvHead | ConvGNHead | QueryHead,
        metadata: dict | None = None,
    ) -> None:
        super().__init__()
        if isinstance(head, ConvGNHead):
            if not backbone.config.keeps_output or backbone.config.in_channels != head.channels:
                raise ValueError(
                    f"the head reads a velocity of {head.channels} channels: wanted a backbone that keeps"
                    f" norm_out and proj_out for {head.channels} channels, this one has keeps_output"
                    f" {backbone.config.keeps_output} and {backbone.config.in_channels}"
                )
        elif head.dim != backbone.config.width:
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

    def _check_latents(self, latents: Tensor) -> None:
        if latents.ndim != 4 or len(latents) == 0:
            raise ValueError(f"latents have shape {tuple(latents.shape)}: wanted a non-empty (B, C, H, W)")
        if latents.shape[1] != self.in_channels:
            raise ValueError(
                f"the latent has {latents.shape[1]} channels, this reward model reads {self.in_channels}: use"
                " it with the model family it was trained on (SD3 has 16 channels, SD1.5 and SDXL have 4)"
            )

    def _check_prompts(self, count: int, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> None:
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
            if len(got) not in (1, count):
                raise ValueError(f"{len(got)} {name}s for {count} latents: give one, or one for each")

    def forward(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
    ) -> Tensor:
        """Raw scores (B,) in float32, with gradients; see `score` for the arguments."""
        return self._judge(self.features(latents, sigma, prompt_embeds, pooled_prompt_embeds), latents)

    def features(
        self,
        latents: Tensor,
        sigma: float | Tensor,
        prompt_embeds: Tensor,
        pooled_prompt_embeds: Tensor,
    ) -> Features:
        """What the head reads, with gradients; see `score` for the arguments."""
        self._check_latents(latents)
        batch = len(latents)
        self._check_prompts(batch, prompt_embeds, pooled_prompt_embeds)
        return self.backbone.features(
            latents,
            1000 * _sigmas(sigma, latents).expand(batch),
            prompt_embeds.expand(batch, -1, -1),
            pooled_prompt_embeds.expand(batch, -1),
        )

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
        _check_sigma(sigma)
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("latents hold NaN or infinity: look at what made them (a broken VAE or model)")
        self._check_latents(latents)
        self._check_prompts(len(latents), prompt_embeds, pooled_prompt_embeds)
        sigmas = _sigmas(sigma, latents)
        one_for_all = len(sigmas) == len(prompt_embeds) == len(pooled_prompt_embeds) == 1
        prompts = 1 if one_for_all else len(latents)
        prepared = self.backbone.prepare(
            1000 * sigmas.expand(prompts),
            prompt_embeds.expand(prompts, -1, -1),
            pooled_prompt_embeds.expand(prompts, -1),
        )
        item_index = torch.arange(prompts, device=latents.device).expand(len(latents))
        return self.score_prepared(latents, prepared, item_index)

    def _shown(self, raw: Tensor) -> Tensor:
        shown = self.metadata.get("shown")
        return raw if shown is None else shown["scale"] * raw + shown["offset"]

    @torch.no_grad()
    def prepare(self, sigma: float, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor) -> Prepared:
        """What the candidates of B prompts share at sigma, for score_prepared.

        prompt_embeds (B, T, prompt_dim), pooled_prompt_embeds (B, pooled_dim) in any dtype. Raises ValueError
        for other shapes or a sigma outside [0, 1].
        """
        _check_sigma(sigma)
        count = len(prompt_embeds)
        self._check_prompts(count, prompt_embeds, pooled_prompt_embeds)
        timestep = torch.full((count,), 1000 * float(sigma), device=prompt_embeds.device)
        return self.backbone.prepare(timestep, prompt_embeds, pooled_prompt_embeds.expand(count, -1))

    @torch.no_grad()
    def score_prepared(
        self, latents: Tensor, prepared: Prepared, item_index: Tensor, compiled: Compiled | None = None
    ) -> Tensor:
        """`score` of latents (n, C, H, W), each with the prompt that item_index (n,) says, at its sigma.

        NaN latents give NaN. compiled: a block's step, where it is compiled.
        """
        self._check_latents(latents)
        return self._shown(self._judge(self.backbone.walk(latents, prepared, item_index, compiled), latents))

    def _judge(self, features: Features, latents: Tensor) -> Tensor:
        """Raw scores (n,)."""
        if isinstance(self.head, QueryHead):
            return self.head(features)
        if isinstance(self.head, ConvGNHead):
            return self.head(features.velocity)
        return self.head(features.tokens, *self.backbone.token_grid(*latents.shape[-2:]))


def _sigmas(sigma: float | Tensor, latents: Tensor) -> Tensor:
    sigmas = torch.as_tensor(sigma, dtype=torch.float32, device=latents.device).reshape(-1)
    if len(sigmas) not in (1, len(latents)):
        raise ValueError(f"{len(sigmas)} sigmas for {len(latents)} latents: give one, or one for each")
    return sigmas


def _check_sigma(sigma: float | Tensor) -> None:
    values = torch.as_tensor(sigma, dtype=torch.float32)
    # Float32 schedules overshoot 1 by a rounding error. Written so that NaN fails too.
    if not bool(((values >= 0) & (values <= 1 + 1e-4)).all()):
        raise ValueError(f"sigma is {values.flatten().tolist()}: wanted 0 (clean) to 1 (pure noise)")
