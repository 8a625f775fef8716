"""The diffusion reward model: a truncated SD3 backbone and a head, from noisy latents to a score.

    raw = head(backbone(x_sigma, timestep = 1000 sigma, positive prompt));  score = scale * raw + offset

(DRM: Diffusion-based Reward Model With Step-wise Guidance, CVPR 2026.) Latents are in model space and carry
the noise that sigma says; only the positive prompt is given, there is no guidance in a reward model. Scores
rank pictures at one sigma; across sigmas they compare only after calibration. scale and offset are 1 and 0
unless the model's maker shows its score otherwise.

A model may carry further heads after earlier blocks, each an opinion of its own at a part of the cost. Scores
of different depths do not compare.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from . import prepared as walking
from .backbone import TruncatedSD3
from .head import ConvHead, QueryHead
from .prepared import PLAIN, Prepared, Rows, Steps

GoOn = Callable[[int, Tensor], Tensor]
See = Callable[[Tensor, Steps], tuple[Rows, Tensor]]


def _at_once(see: See, index: Tensor) -> list[tuple[Rows, Tensor]]:
    return [see(index, PLAIN)]


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
        every_depth: bool = False,
    ) -> Tensor:
        """Raw scores (B,) in float32, with gradients; see `score` for the other arguments.

        every_depth: (B, len(depths)) instead, the last column the model's score.
        """
        self._check_latents(latents)
        batch = len(latents)
        self._check_prompts(batch, prompt_embeds, pooled_prompt_embeds)
        features = self.backbone.features(
            latents,
            1000 * _sigmas(sigma, latents).expand(batch),
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
        _check_sigma(sigma)
        if not bool(torch.isfinite(latents).all()):
            raise ValueError("latents hold NaN or infinity: look at what made them (a broken VAE or model)")
        self._check_latents(latents)
        self._check_prompts(len(latents), prompt_embeds, pooled_prompt_embeds)
        sigmas = _sigmas(sigma, latents)
        one_for_all = len(sigmas) == len(prompt_embeds) == len(pooled_prompt_embeds) == 1
        prompts = 1 if one_for_all else len(latents)
        prepared = walking.prepare(
            self.backbone,
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
        """What the candidates of B prompts share at sigma, for score_prepared and score_staged.

        prompt_embeds (B, T, prompt_dim), pooled_prompt_embeds (B, pooled_dim) in any dtype. Raises ValueError
        for other shapes or a sigma outside [0, 1].
        """
        _check_sigma(sigma)
        count = len(prompt_embeds)
        self._check_prompts(count, prompt_embeds, pooled_prompt_embeds)
        timestep = torch.full((count,), 1000 * float(sigma), device=prompt_embeds.device)
        return walking.prepare(self.backbone, timestep, prompt_embeds, pooled_prompt_embeds.expand(count, -1))

    @torch.no_grad()
    def score_prepared(
        self, latents: Tensor, prepared: Prepared, item_index: Tensor, steps: Steps = PLAIN
    ) -> Tensor:
        """`score` of latents (n, C, H, W), each with the prompt that item_index (n,) says, at its sigma.

        NaN latents give NaN. steps: the parts a block is walked in, compiled or plain.
        """
        self._check_latents(latents)
        rows = walking.enter(self.backbone, latents, prepared, item_index)
        rows = walking.walk(self.backbone, prepared, rows, self.num_blocks, steps)
        return self._shown(self._judge(rows, prepared, latents))

    @torch.no_grad()
    def score_staged(
        self,
        latents: Tensor,
        prepared: Prepared,
        item_index: Tensor,
        go_on: GoOn,
        in_parts: Callable[[See, Tensor], list[tuple[Rows, Tensor]]] = _at_once,
    ) -> tuple[Tensor, Tensor]:
        """Scores (n,) and the depths (n,) they were taken at, of candidates as in score_prepared.

        After every depth but the last, go_on(depth, scores (n,) float32) -> (n,) bool says which rows the
        next one must see; rows that stopped before come as -inf and stay out. The others keep the score and
        depth they have, which compare with no other depth's. in_parts(see, index (m,)) is a list of what
        see(piece, steps) returns, its rows one depth further and their scores, for pieces of index in order.
        """
        self._check_latents(latents)
        alive, rows = torch.arange(len(latents), device=latents.device), None
        scores = torch.full(alive.shape, -torch.inf, device=latents.device)
        reached = torch.zeros_like(alive)
        for depth in self.depths:

            def see(
                index: Tensor, steps: Steps, depth: int = depth, rows: Rows | None = rows
            ) -> tuple[Rows, Tensor]:
                if rows is None:
                    part = walking.enter(self.backbone, latents[index], prepared, item_index[index])
                else:
                    part = rows.take(index)
                part = walking.walk(self.backbone, prepared, part, depth, steps)
                return part, self._shown(self._judge(part, prepared, latents))

            parts, found = zip(*in_parts(see, torch.arange(len(alive), device=alive.device)), strict=True)
            found = torch.cat(found)
            scores[alive], reached[alive] = found, depth
            if depth == self.num_blocks:
                break
            standing = torch.full_like(scores, -torch.inf).index_copy(0, alive, found)
            stays = go_on(depth, standing).to(alive.device)[alive]
            alive, rows = alive[stays], Rows.join(parts).take(stays)
            if not len(alive):
                break
        return scores, reached

    def _judge(self, rows: Rows, prepared: Prepared, latents: Tensor) -> Tensor:
        """Raw scores (n,) of rows by the head that stands where they have come to."""
        grid = self.backbone.token_grid(*latents.shape[-2:])
        if rows.done != self.num_blocks:
            return self.early_heads[str(rows.done)](rows.tokens, *grid)
        if isinstance(self.head, QueryHead):
            return self.head(walking.features(prepared, rows))
        return self.head(rows.tokens, *grid)


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
