"""SD3's transformer (MMDiT-X), truncated: latents, text and sigma to image tokens.

    tokens = PatchEmbed(x_sigma) + position;  temb = time(1000 sigma) + pooled text;  context = Linear(text)
    context, tokens = JointBlock_i(context, tokens, temb)          i = 0 .. num_kept - 1
    f_v = tokens                                                   (B, (H/2)(W/2), width)

Every module is diffusers' own, from `SD3Transformer2DModel`. Tokens can also be tapped on the way: tap n is
what leaves the n-th block, tap 0 what enters the first. Unless it is tapped, the last kept block's text
output feeds nothing; that block is then built `context_pre_only`: it has no text feed-forward, no text output
projection, and only the two rows of the text modulation (scale and shift before attention) that reach the
image. The image tokens are those of the full model after that block.

With `keeps_output` the model's own last layers are kept too, and read the tokens after the last kept block:

    velocity = unpatchify(Linear(AdaLN(tokens, temb)))             (B, C, H, W)

Coarse tokens: a patch of twice the side is one token in place of four. Its embedding starts as the mean of
theirs, tiled over the larger patch, and its position as the mean of theirs; then it learns.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from diffusers import SD3Transformer2DModel

    from .joint_block import Shared

SD35_MEDIUM_KEPT, SD35_LARGE_KEPT = 21, 33


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """The arguments of diffusers' SD3Transformer2DModel, how many of its blocks are kept, and after which of
    them image and text tokens are tapped (in ascending order; 0 is before the first). keeps_output: whether
    norm_out and proj_out are kept.
    """

    num_kept: int
    num_layers: int
    num_attention_heads: int
    attention_head_dim: int = 64
    sample_size: int = 128
    patch_size: int = 2
    in_channels: int = 16
    joint_attention_dim: int = 4096
    pooled_projection_dim: int = 2048
    pos_embed_max_size: int = 384
    dual_attention_layers: tuple[int, ...] = ()
    qk_norm: str | None = "rms_norm"
    image_taps: tuple[int, ...] = ()
    text_taps: tuple[int, ...] = ()
    keeps_output: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.num_kept <= self.num_layers:
            raise ValueError(
                f"num_kept is {self.num_kept}: wanted 1 to {self.num_layers}, the model's blocks"
            )
        for name, taps in (("image_taps", self.image_taps), ("text_taps", self.text_taps)):
            if list(taps) != sorted(set(taps)) or not set(taps) <= set(range(self.num_kept + 1)):
                raise ValueError(f"{name} are {taps}: wanted ascending numbers from 0 to {self.num_kept}")
        if self.num_layers in self.text_taps:
            raise ValueError(
                f"text_taps are {self.text_taps}: block {self.num_layers} is the model's last, it has no text"
                " output"
            )

    @property
    def width(self) -> int:
        """Width of a token."""
        return self.num_attention_heads * self.attention_head_dim

    @property
    def keeps_text_output(self) -> bool:
        """Whether the text that leaves the last kept block is used."""
        return self.num_kept in self.text_taps

    @classmethod
    def from_diffusers(
        cls,
        config: Mapping,
        num_kept: int,
        image_taps: tuple[int, ...] = (),
        text_taps: tuple[int, ...] = (),
        keeps_output: bool = False,
    ) -> "BackboneConfig":
        """From the config of an SD3Transformer2DModel (or its config.json as a dict)."""
        own = {
            "num_kept": num_kept,
            "image_taps": image_taps,
            "text_taps": text_taps,
            "keeps_output": keeps_output,
        }
        names = set(cls.__dataclass_fields__) - set(own)
        kwargs = {name: config[name] for name in names if name in config}
        kwargs["dual_attention_layers"] = tuple(kwargs.get("dual_attention_layers") or ())
        built = cls(**own, **kwargs)
        context_width = config.get("caption_projection_dim", built.width)
        if context_width != built.width:
            raise ValueError(
                f"text is projected to {context_width} but tokens are {built.width} wide: not an SD3 model"
            )
        return built

    def to_dict(self) -> dict:
        return asdict(self)

    def to_diffusers(self) -> dict:
        """The arguments of the whole SD3Transformer2DModel."""
        own = ("num_kept", "image_taps", "text_taps", "keeps_output")
        shape = {name: value for name, value in asdict(self).items() if name not in own}
        return {**shape, "out_channels": self.in_channels, "caption_projection_dim": self.width}


def sd35_medium_config(num_kept: int = SD35_MEDIUM_KEPT) -> BackboneConfig:
    """Stable Diffusion 3.5 Medium: 24 blocks of width 1536, of which the paper keeps 21."""
    return BackboneConfig(
        num_kept=num_kept, num_layers=24, num_attention_heads=24, dual_attention_layers=tuple(range(13))
    )


def sd35_large_config(num_kept: int = SD35_LARGE_KEPT) -> BackboneConfig:
    """Stable Diffusion 3.5 Large: 38 blocks of width 2432, 33 of them kept by the authors."""
    return BackboneConfig(num_kept=num_kept, num_layers=38, num_attention_heads=38, pos_embed_max_size=192)


class Features(NamedTuple):
    """What a head may read: `tokens` (B, L, width) after the last kept block, the tapped image tokens
    (B, L, width) and text tokens (B, T, width), the time-text embedding `temb` (B, width), and `velocity`
    (B, C, H, W), which the model's own last layers make of the tokens where they are kept.
    """

    tokens: Tensor
    image: list[Tensor]
    text: list[Tensor]
    temb: Tensor
    velocity: Tensor | None = None


class Prepared(NamedTuple):
    """What P prompts, each at its sigma, give to whatever is walked with them: temb (P, D), context (P, T,
    D), and where candidates share them what the blocks make of these (joint_block.Shared, (P, ...) each).
    """

    temb: Tensor
    context: Tensor
    shared: "list[Shared] | None"


# (block, tokens, context, *Shared) -> (context, tokens): one block, compiled.
Compiled = Callable[..., tuple[Tensor | None, Tensor]]


class TruncatedSD3(nn.Module):
    """The first `num_kept` blocks of an SD3 transformer. Imports diffusers when built."""

    def __init__(self, config: BackboneConfig) -> None:
        super().__init__()
        from diffusers.models.embeddings import CombinedTimestepTextProjEmbeddings, PatchEmbed
        from diffusers.models.normalization import AdaLayerNormContinuous

        from .joint_block import JointTransformerBlock

        self.config = config
        self.gradient_checkpointing = False
        self.pos_embed = PatchEmbed(
            height=config.sample_size,
            width=config.sample_size,
            patch_size=config.patch_size,
            in_channels=config.in_channels,
            embed_dim=config.width,
            pos_embed_max_size=config.pos_embed_max_size,
        )
        self.time_text_embed = CombinedTimestepTextProjEmbeddings(
            embedding_dim=config.width, pooled_projection_dim=config.pooled_projection_dim
        )
        self.context_embedder = nn.Linear(config.joint_attention_dim, config.width)
        self.transformer_blocks = nn.ModuleList(
            JointTransformerBlock(
                dim=config.width,
                num_attention_heads=config.num_attention_heads,
                attention_head_dim=config.attention_head_dim,
                context_pre_only=index == config.num_kept - 1 and not config.keeps_text_output,
                qk_norm=config.qk_norm,
                use_dual_attention=index in config.dual_attention_layers,
            )
            for index in range(config.num_kept)
        )
        self.norm_out = self.proj_out = None
        if config.keeps_output:
            self.norm_out = AdaLayerNormContinuous(
                config.width, config.width, elementwise_affine=False, eps=1e-6
            )
            self.proj_out = nn.Linear(config.width, config.patch_size**2 * config.in_channels)

    @property
    def dtype(self) -> torch.dtype:
        return self.context_embedder.weight.dtype

    def token_grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens for a latent of this size; ValueError when it cannot be patched."""
        patch, largest = self.config.patch_size, self.config.pos_embed_max_size
        if height % patch or width % patch or not height or not width:
            raise ValueError(
                f"the latent is {height}x{width}: both sides must be multiples of {patch},"
                f" that is pictures in multiples of {8 * patch} pixels"
            )
        if max(height, width) // patch > largest:
            raise ValueError(
                f"the latent is {height}x{width}: this model's positions reach {largest * patch} a side"
            )
        return height // patch, width // patch

    def prepare(
        self, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor, share: bool = True
    ) -> Prepared:
        """What P prompts need at timestep (P,) = 1000 sigma, whatever is walked with them.

        prompt_embeds (P, T, joint_attention_dim); pooled_prompt_embeds (P, pooled_projection_dim). share:
        whether the blocks' modulations and the first one's text are worked out here, which pays as soon as
        two candidates have a prompt in common.
        """
        from .joint_block import Shared, modulations, text_projections

        temb = self.time_text_embed(timestep, pooled_prompt_embeds.to(self.dtype))
        context = self.context_embedder(prompt_embeds.to(self.dtype))
        if not share:
            return Prepared(temb, context, None)
        signal = F.silu(temb)
        parts = [modulations(block, signal, context.dtype) for block in self.transformer_blocks]
        words = text_projections(self.transformer_blocks[0], context, parts[0][1])
        shared = [Shared(*part, words if index == 0 else None) for index, part in enumerate(parts)]
        return Prepared(temb, context, shared)

    def walk(
        self, latents: Tensor, prepared: Prepared, item: Tensor, compiled: Compiled | None = None
    ) -> Features:
        """Tokens and taps of latents (n, C, H, W), each with the prompt that item (n,) says.

        In the backbone's dtype, image tokens row-major over the token grid.
        """
        self.token_grid(*latents.shape[-2:])
        config = self.config
        tokens = self.pos_embed(latents.to(self.dtype)).contiguous()
        temb, context = prepared.temb[item], prepared.context[item]
        signal = F.silu(temb) if prepared.shared is None else None
        image = [tokens] if 0 in config.image_taps else []
        text = [context] if 0 in config.text_taps else []
        for index, block in enumerate(self.transformer_blocks):
            shared = None if prepared.shared is None else prepared.shared[index].of(item)
            if compiled is not None:
                context, tokens = compiled(block, tokens, context, *shared)
            elif self.gradient_checkpointing and torch.is_grad_enabled():
                context, tokens = checkpoint(block, tokens, context, signal, shared, use_reentrant=False)
            else:
                context, tokens = block(tokens, context, signal, shared)
            if index + 1 in config.image_taps:
                image.append(tokens)
            if index + 1 in config.text_taps:
                text.append(context)
        return Features(tokens, image, text, temb, self._velocity(tokens, temb, latents.shape))

    def _velocity(self, tokens: Tensor, temb: Tensor, shape: torch.Size) -> Tensor | None:
        if self.proj_out is None:
            return None
        rows, columns = self.token_grid(*shape[-2:])
        patch = self.config.patch_size
        # (n, rows columns, patch patch C): within a patch the channels come last.
        patches = self.proj_out(self.norm_out(tokens, temb)).unflatten(2, (patch, patch, -1))
        return patches.unflatten(1, (rows, columns)).permute(0, 5, 1, 3, 2, 4).reshape(shape)

    def features(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor
    ) -> Features:
        """`walk` of latents (B, C, H, W) in model space, each with a prompt of its own; see `prepare`."""
        prepared = self.prepare(timestep, prompt_embeds, pooled_prompt_embeds, share=False)
        return self.walk(latents, prepared, torch.arange(len(latents), device=latents.device))

    def forward(
        self, latents: Tensor, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor
    ) -> Tensor:
        """Image tokens (B, L, width) after the last kept block; see `features` for the arguments."""
        return self.features(latents, timestep, prompt_embeds, pooled_prompt_embeds).tokens


def truncate_state_dict(state_dict: Mapping[str, Tensor], config: BackboneConfig) -> dict[str, Tensor]:
    """The weights of a whole SD3Transformer2DModel that TruncatedSD3(config) holds.

    Where the last kept block loses its text output and was not the model's last, it has a six-part text
    modulation (shift, scale, gate of attention, then of the feed-forward). Only the first two remain, in the
    order (scale, shift) of AdaLayerNormContinuous.
    """
    last = config.num_kept - 1
    cut_text = config.num_kept < config.num_layers and not config.keeps_text_output
    modulation = f"transformer_blocks.{last}.norm1_context.linear."
    kept = {}
    for key, value in state_dict.items():
        if not is_kept(key, config.num_kept, config.keeps_text_output, config.keeps_output):
            continue
        if cut_text and key.startswith(modulation):
            shift, scale = value.chunk(6)[:2]
            value = torch.cat((scale, shift))
        kept[key] = value
    return kept


def is_kept(key: str, num_kept: int, keeps_text_output: bool = False, keeps_output: bool = False) -> bool:
    """Whether a weight of SD3Transformer2DModel, by its name there, has a place in a truncated backbone."""
    last = num_kept - 1
    unused = tuple(f"transformer_blocks.{last}.{name}." for name in ("attn.to_add_out", "ff_context"))
    if key.startswith(("norm_out.", "proj_out.")):
        return keeps_output
    if key.startswith(unused) and not keeps_text_output:
        return False
    return not key.startswith("transformer_blocks.") or int(key.split(".")[1]) <= last


def backbone_from_state_dict(state_dict: Mapping[str, Tensor], config: BackboneConfig) -> TruncatedSD3:
    """The backbone of a whole SD3Transformer2DModel's weights, which it takes over without a copy.

    Weights that are cut off may be on the meta device. Raises ValueError naming the first weight that is
    missing, has no place, or has another shape.
    """
    with torch.device("meta"):
        backbone = TruncatedSD3(config)
    kept = truncate_state_dict(state_dict, config)
    expected = {key: tuple(value.shape) for key, value in backbone.state_dict().items()}
    message = first_difference({key: tuple(value.shape) for key, value in kept.items()}, expected)
    if message:
        raise ValueError(message)
    backbone.load_state_dict(kept, assign=True)
    return backbone


def first_difference(found: Mapping[str, tuple], expected: Mapping[str, tuple]) -> str | None:
    """A sentence on the first weight whose name or shape is not the expected one; None when all are."""
    for key, shape in expected.items():
        if key not in found:
            return f"{key} is missing"
        if found[key] != shape:
            return f"{key} has shape {found[key]}, wanted {shape}"
    return next((f"{key} has no place in the model" for key in found if key not in expected), None)


def backbone_from_transformer(
    transformer: "SD3Transformer2DModel",
    num_kept: int,
    image_taps: tuple[int, ...] = (),
    text_taps: tuple[int, ...] = (),
    coarse: int = 1,
    keeps_output: bool = False,
) -> TruncatedSD3:
    """The first blocks of a diffusers SD3 transformer, as copies in its dtype and on its device.

    coarse: how many times the side of a patch; see `coarsened`.
    """
    config = BackboneConfig.from_diffusers(transformer.config, num_kept, image_taps, text_taps, keeps_output)
    kept = {
        key: value.detach().clone()
        for key, value in transformer.state_dict().items()
        if is_kept(key, num_kept, config.keeps_text_output, keeps_output)
    }
    if coarse != 1:
        kept, config = coarsened(kept, config, coarse)
    return backbone_from_state_dict(kept, config)


def coarsened(
    state_dict: Mapping[str, Tensor], config: BackboneConfig, factor: int
) -> tuple[dict[str, Tensor], BackboneConfig]:
    """Weights and config with patches `factor` times the side: so many times fewer tokens, squared.

    A starting point for training: before it, a coarse token is the mean of the fine ones it stands for, and
    so is its position. ValueError where the positions cannot be shared out evenly.
    """
    if config.keeps_output:
        raise ValueError(
            "tokens cannot be coarse where the model's own last layers are kept: coarse must be 1"
        )
    largest = config.pos_embed_max_size
    if factor < 1 or largest % factor:
        raise ValueError(
            f"tokens cannot be {factor} times as coarse: wanted a divisor of the {largest} positions a side"
        )
    changed = dict(state_dict)
    weight, positions = changed["pos_embed.proj.weight"], changed["pos_embed.pos_embed"]
    changed["pos_embed.proj.weight"] = weight.repeat(1, 1, factor, factor) / factor**2
    grid = positions.reshape(1, largest, largest, -1).permute(0, 3, 1, 2).float()
    pooled = nn.functional.avg_pool2d(grid, factor).flatten(2).transpose(1, 2)
    changed["pos_embed.pos_embed"] = pooled.contiguous().to(positions)
    larger = replace(config, patch_size=config.patch_size * factor, pos_embed_max_size=largest // factor)
    return changed, larger
