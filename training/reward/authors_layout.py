"""The weights of a reward model as the DRM authors' code saves and reads them.

    transformer.<name in diffusers' SD3Transformer2DModel>     all blocks, also those that are cut off
    reward_output.down{1,2,3}.{0,1}.*, reward_output.mlp.{0,3}.*       ConvGNHead's names

Ours holds less: no cut block, nothing of the last kept block's text output, of whose modulation two rows of
six. `to_authors` takes what is missing from the base; the authors' forward never reads it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from drm import DRM
from drm.backbone import BackboneConfig, backbone_from_state_dict, first_difference
from drm.head import ConvGNHead

TRANSFORMER, HEAD = "transformer.", "reward_output."
# Blocks kept of the authors' two models, by the base's depth.
KEPT = {24: 21, 38: 33}


class AuthorsFileError(ValueError):
    """The weights are not of this layout or model; the message names the first mismatch and what to do."""


def from_authors(tensors: Mapping[str, Tensor], config: BackboneConfig) -> DRM:
    """The reward model of a checkpoint's weights; those that are cut off may be on the meta device.

    Raises AuthorsFileError, naming the first weight that does not fit.
    """
    parts = {prefix: _below(tensors, prefix) for prefix in (TRANSFORMER, HEAD)}
    for prefix, part in parts.items():
        if not part:
            raise AuthorsFileError(
                f"the checkpoint has no weight below {prefix}: wanted checkpoint-N/model.safetensors of the"
                " authors' training"
            )
    try:
        backbone = backbone_from_state_dict(parts[TRANSFORMER], config)
    except ValueError as error:
        raise AuthorsFileError(f"the checkpoint does not fit the base: {TRANSFORMER}{error}") from error
    head = _head_of(parts[HEAD], config.in_channels)
    return DRM(backbone, head).eval().requires_grad_(False)


def _below(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _head_of(weights: Mapping[str, Tensor], channels: int) -> ConvGNHead:
    """Its widths are those of the weights."""
    names = [f"down{number}.0.weight" for number in (1, 2, 3)]
    if missing := [name for name in names if name not in weights]:
        raise AuthorsFileError(f"the checkpoint's head is of another kind: {HEAD}{missing[0]} is missing")
    head = ConvGNHead(channels, tuple(weights[name].shape[0] for name in names))
    found, expected = (
        {key: tuple(value.shape) for key, value in part.items()} for part in (weights, head.state_dict())
    )
    if message := first_difference(found, expected):
        raise AuthorsFileError(f"the checkpoint's head is of another kind: {HEAD}{message}")
    head.load_state_dict({key: value.float() for key, value in weights.items()})
    return head


def to_authors(drm: DRM, base: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A reward model's weights in the authors' layout, its transformer in the dtype of base, the whole
    SD3Transformer2DModel's weights that it began from. Raises AuthorsFileError for another head, coarse
    tokens, taps, or a base it does not fit.
    """
    config = drm.backbone.config
    if not isinstance(drm.head, ConvGNHead) or config.image_taps or config.text_taps:
        raise AuthorsFileError(
            f"the reward model's head is of kind {drm.head.to_dict()['kind']!r}: the authors' code reads"
            " 'conv_gn' alone"
        )
    last = f"transformer_blocks.{config.num_kept - 1}.norm1_context.linear."
    whole = dict(base)
    for key, value in drm.backbone.state_dict().items():
        if key not in base:
            raise AuthorsFileError(f"the base is another model: {key} is missing")
        if key.startswith(last) and value.shape != base[key].shape:
            # Ours is (scale, shift), theirs shift, scale and four more.
            scale, shift = value.chunk(2)
            value = torch.cat((shift.to(base[key]), scale.to(base[key]), base[key][2 * len(shift) :]))
        if value.shape != base[key].shape:
            raise AuthorsFileError(
                f"the base is another model: {key} has shape {tuple(base[key].shape)}, the reward model's"
                f" {tuple(value.shape)}"
            )
        whole[key] = value.to(base[key])
    return {
        **{TRANSFORMER + key: value.contiguous() for key, value in whole.items()},
        **{HEAD + key: value.contiguous() for key, value in drm.head.state_dict().items()},
    }
