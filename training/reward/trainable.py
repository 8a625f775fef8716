"""The network a reward model's training starts from, and the plain reward model it ends as.

    full   every weight learns, kept in float32
    lora   backbone frozen; the head and adapters of rank r on all attention projections (peft) learn
    head   backbone frozen, the head learns

Frozen weights are kept in bfloat16 when training runs in it: that halves what they take.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch

from drm import DRM, DRMFileError, SharedDRM
from drm.backbone import TruncatedSD3
from drm.checkpoint import load_whole_drm, read_header
from drm.head import ConvGNHead, ConvHead
from drm.lora import LORA_TARGETS
from drm.sd3.base_model import load_backbone
from training.config import ModelConfig
from training.engine.launch import TrainingError
from training.reward import on_trunk


def is_reward_model(base: str) -> bool:
    """Whether `base` is a reward model's file; any other file or folder is load_backbone's to judge."""
    if not Path(base).is_file() or Path(base).suffix != ".safetensors":
        return False
    try:
        read_header(base)
    except DRMFileError:
        return False
    return True


def build(config: ModelConfig, *, seed: int, frozen_dtype: torch.dtype = torch.float32) -> DRM:
    """The reward model `config` describes; what learns is in float32 and asks for gradients, the rest is
    frozen in frozen_dtype. `seed` decides fresh weights: the head's, the adapters', a random backbone's.
    """
    if is_reward_model(config.base):
        if config.backbone == "shared":
            raise TrainingError(
                f"model.base is the reward model {Path(config.base).name}: a head that rides on a model"
                " (model.backbone shared) wants that model's own checkpoint"
            )
        drm = load_whole_drm(config.base)
    else:
        keeps_output = config.head == "conv_gn"
        backbone = load_backbone(
            config.base, config.num_kept, coarse=config.coarse, keeps_output=keeps_output
        )
        if config.backbone == "shared":
            drm = on_trunk.build(config.base, backbone, config.head_hidden, seed=seed)
        else:
            drm = fresh(backbone, config.head_hidden, seed=seed, random_backbone=config.random_backbone)
    return make_trainable(drm, config, seed=seed, frozen_dtype=frozen_dtype)


def make_trainable(
    drm: DRM, config: ModelConfig, *, seed: int, frozen_dtype: torch.dtype = torch.float32
) -> DRM:
    """`drm` itself, ready to learn what config.train says."""
    drm.requires_grad_(False).train()
    drm.head.requires_grad_(True)
    if config.train == "full":
        drm.backbone.requires_grad_(True)
    else:
        drm.backbone.to(frozen_dtype)
    if config.train == "lora":
        add_adapters(drm, rank=config.lora_rank, alpha=config.lora_alpha, seed=seed)
    drm.backbone.gradient_checkpointing = config.gradient_checkpointing and config.train != "head"
    return drm


def fresh(backbone: TruncatedSD3, hidden: int, *, seed: int, random_backbone: bool = False) -> DRM:
    """A fresh head on `backbone`, or on one of its shape with fresh weights: ConvGNHead where the backbone
    keeps the model's last layers, which it reads, else ConvHead.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = (
            ConvGNHead(backbone.config.in_channels)
            if backbone.config.keeps_output
            else ConvHead(backbone.config.width, hidden)
        )
        if random_backbone:
            backbone = TruncatedSD3(backbone.config)
    return DRM(backbone, head)


def add_adapters(drm: DRM, *, rank: int, alpha: float, seed: int) -> None:
    """A LoRA on every attention projection the backbone uses; its second matrix starts at zero."""
    import peft

    settings = peft.LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(LORA_TARGETS))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed + 1)
        peft.inject_adapter_in_model(settings, drm.backbone)
    for name, parameter in drm.backbone.named_parameters():
        learns = "lora_" in name
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.float()


def plain(drm: DRM) -> DRM | SharedDRM:
    """A copy in float32 with its adapters merged into the weights, frozen, ready for save_drm; of a head that
    rides on its base, the head alone.
    """
    from peft.tuners.lora import LoraLayer

    if isinstance(drm, on_trunk.OnTrunk):
        return copy.deepcopy(drm.head).requires_grad_(False).eval()
    drm = copy.deepcopy(drm).float()
    for name, module in list(drm.backbone.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            drm.backbone.set_submodule(name, module.get_base_layer())
    return drm.requires_grad_(False).eval()
