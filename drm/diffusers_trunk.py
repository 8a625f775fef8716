"""A transformer of diffusers as the trunk of a shared head: SD3, FLUX.1, Qwen-Image, Z-Image.

    facts  = trunk_facts(transformer, taps=(4, 8, 12))                  what the head's file says of it
    tokens = trunk_tokens(transformer, facts.taps, prompts)             a callable for SharedScorer
    scores = drm.score(tokens(x, sigma, items), sigma)

The transformer is called as diffusers' own pipelines call it, in its own dtype, and left where it is.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .shared import Taps, Tokens, TrunkFacts, fingerprint
from .tap import tap

# All of them make one token of 2 x 2 latents.
_PATCH = 2


class Prompts(NamedTuple):
    """P prompts as the model's own text encoders give them: embeds (P, T, D), pooled (P, D') where the model
    reads one, mask (P, T) where some of the T are padding, and guidance where the model was distilled for it.
    """

    embeds: Tensor
    pooled: Tensor | None = None
    mask: Tensor | None = None
    guidance: float = 3.5

    def rows(self, items: Tensor) -> "Prompts":
        """The prompts of these items, (n,) long."""
        return Prompts(*(v[items.to(v.device)] if isinstance(v, Tensor) else v for v in self))


@dataclass(frozen=True)
class _Family:
    """name, block lists, how the network is called, and what of a block's output is image."""

    name: str
    lists: tuple[str, ...]
    call: Callable[[nn.Module, Tensor, float, Prompts], object]
    image: Callable[[object, int], Tensor]


def trunk_facts(transformer: nn.Module, taps: Sequence[int]) -> TrunkFacts:
    """What a shared head's file says of this base. Raises ValueError for a class that is not known, or taps
    that are not among its blocks.
    """
    family = _family(transformer)
    blocks, config = _blocks(transformer, family), transformer.config
    weights = dict(transformer.named_parameters())
    width = config.dim if family.name == "z_image" else transformer.inner_dim
    packed = family.name in ("flux", "qwen_image")
    return TrunkFacts(
        family=family.name,
        width=width,
        num_blocks=len(blocks),
        taps=tuple(taps),
        latent_channels=config.in_channels // (_PATCH**2 if packed else 1),
        fingerprint=fingerprint(
            {name: value for name, value in weights.items() if name.startswith(family.lists)}, "diffusers"
        ),
    )


def trunk_tokens(transformer: nn.Module, taps: Sequence[int], prompts: Prompts) -> Tokens:
    """The callable tokens(x (n, C, H, W), sigma, items (n,)) -> Taps of these blocks."""
    family = _family(transformer)
    blocks = _blocks(transformer, family)

    @torch.no_grad()
    def tokens(x: Tensor, sigma: float, items: Tensor) -> Taps:
        height, width = x.shape[-2:]
        if x.ndim != 4 or height % _PATCH or width % _PATCH:
            raise ValueError(f"the latents have shape {tuple(x.shape)}: wanted (n, C, H, W), H and W even")
        like = next(transformer.parameters())
        own = Prompts(*(_as(value, like) for value in prompts.rows(items)))
        latents = x.to(like.device, like.dtype)
        outputs = tap(blocks, taps, lambda: family.call(transformer, latents, sigma, own))
        rows, columns = height // _PATCH, width // _PATCH
        found = [family.image(outputs[number], rows * columns) for number in taps]
        return Taps(found, rows, columns)

    return tokens


def _as(value: Tensor | float | None, like: Tensor) -> Tensor | float | None:
    if not isinstance(value, Tensor):
        return value
    return value.to(like.device, like.dtype if value.is_floating_point() else None)


def _family(transformer: nn.Module) -> _Family:
    found = _FAMILIES.get(type(transformer).__name__)
    if found is None:
        raise ValueError(
            f"{type(transformer).__name__} is not a known trunk: wanted one of {', '.join(_FAMILIES)}"
        )
    return found


def _blocks(transformer: nn.Module, family: _Family) -> list[nn.Module]:
    return [block for name in family.lists for block in getattr(transformer, name)]


def _packed(latents: Tensor) -> Tensor:
    """(n, C, H, W) to (n, H/2 * W/2, 4 C), channel before place within the patch."""
    return F.pixel_unshuffle(latents, _PATCH).flatten(2).transpose(1, 2).contiguous()


def _call_sd3(transformer: nn.Module, latents: Tensor, sigma: float, prompts: Prompts) -> object:
    time = latents.new_full((len(latents),), 1000 * sigma)
    return transformer(latents, prompts.embeds, prompts.pooled, time)


def _call_flux(transformer: nn.Module, latents: Tensor, sigma: float, prompts: Prompts) -> object:
    rows, columns = (size // _PATCH for size in latents.shape[-2:])
    places = torch.zeros(rows, columns, 3, device=latents.device, dtype=latents.dtype)
    places[..., 1] += torch.arange(rows, device=latents.device)[:, None]
    places[..., 2] += torch.arange(columns, device=latents.device)
    distilled = transformer.config.guidance_embeds
    return transformer(
        hidden_states=_packed(latents),
        encoder_hidden_states=prompts.embeds,
        pooled_projections=prompts.pooled,
        timestep=latents.new_full((len(latents),), sigma),
        guidance=latents.new_full((len(latents),), prompts.guidance) if distilled else None,
        img_ids=places.reshape(-1, 3),
        txt_ids=places.new_zeros(prompts.embeds.shape[1], 3),
    )


def _call_qwen_image(transformer: nn.Module, latents: Tensor, sigma: float, prompts: Prompts) -> object:
    rows, columns = (size // _PATCH for size in latents.shape[-2:])
    return transformer(
        hidden_states=_packed(latents),
        encoder_hidden_states=prompts.embeds,
        encoder_hidden_states_mask=prompts.mask,
        timestep=latents.new_full((len(latents),), sigma),
        img_shapes=[[(1, rows, columns)]] * len(latents),
    )


def _call_z_image(transformer: nn.Module, latents: Tensor, sigma: float, prompts: Prompts) -> object:
    captions = list(prompts.embeds)
    if prompts.mask is not None:
        captions = [caption[mask.bool()] for caption, mask in zip(captions, prompts.mask, strict=True)]
    # Its time runs the other way.
    time = latents.new_full((len(latents),), 1 - sigma)
    return transformer(list(latents.unsqueeze(2)), time, captions)


def _flux_image(output: object, length: int) -> Tensor:
    # Single blocks of older diffusers return text and image as one tensor.
    return output[:, -length:] if isinstance(output, Tensor) else output[1]


_FAMILIES = {
    "SD3Transformer2DModel": _Family("sd3", ("transformer_blocks",), _call_sd3, lambda out, _: out[1]),
    "FluxTransformer2DModel": _Family(
        "flux", ("transformer_blocks", "single_transformer_blocks"), _call_flux, _flux_image
    ),
    "QwenImageTransformer2DModel": _Family(
        "qwen_image", ("transformer_blocks",), _call_qwen_image, lambda out, length: out[1][:, :length]
    ),
    # Here the image stands before the caption.
    "ZImageTransformer2DModel": _Family(
        "z_image", ("layers",), _call_z_image, lambda out, length: out[:, :length]
    ),
}
