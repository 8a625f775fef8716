"""The door to the backbones: one folder holds every fact of a model family, as `sd3/` does.

A reward model's file names its family (`architecture.backbone.kind`; files without it are SD3's). Another
family is a folder beside sd3/ and a name here.
"""

from .sd3.backbone import (
    BackboneConfig,
    Compiled,
    Features,
    Prepared,
    TruncatedSD3,
    backbone_from_state_dict,
    backbone_from_transformer,
    coarsened,
    first_difference,
    is_kept,
    sd35_large_config,
    sd35_medium_config,
    truncate_state_dict,
)

KIND = "sd3"

__all__ = [
    "KIND",
    "BackboneConfig",
    "Compiled",
    "Features",
    "Prepared",
    "TruncatedSD3",
    "backbone_from_state_dict",
    "backbone_from_transformer",
    "coarsened",
    "first_difference",
    "is_kept",
    "sd35_large_config",
    "sd35_medium_config",
    "truncate_state_dict",
]
