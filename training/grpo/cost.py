"""What fine-tuning takes, computed and not measured: memory, and network passes of an iteration.

    python -m training.grpo.cost --config training/configs/step_grpo_24gb.yaml

Weights of policy and reward model, the LoRA with gradients, Adam's two moments and the averages, with nft and
awm a second LoRA for the old policy, and for every latent of a micro-batch what autograd keeps for the
backward pass, counted on fake tensors of the real shapes of SD3.5-Medium. With checkpointing one block is
recomputed at a time, so its share is added. Not in it: the CUDA context, workspaces, fragmentation, the text
encoders (gone before the rest is loaded), the VAE; a fifth on top is prudent.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import peft
import torch
from torch import Tensor, nn

from drm.backbone import TruncatedSD3, sd35_medium_config
from drm.forward_rl import asks_old
from drm.lora import LORA_TARGETS
from training.config import ConfigError
from training.grpo.diffusers_policy import DiffusersPolicy
from training.grpo.saved_bytes import kept_for_backward
from training.grpo.step_grpo_config import StepGRPOConfig, read_step_grpo

GIB = 2**30
CLIP_TOKENS = 77
SD35_MEDIUM = {
    "sample_size": 128,
    "patch_size": 2,
    "in_channels": 16,
    "out_channels": 16,
    "num_layers": 24,
    "attention_head_dim": 64,
    "num_attention_heads": 24,
    "joint_attention_dim": 4096,
    "caption_projection_dim": 1536,
    "pooled_projection_dim": 2048,
    "pos_embed_max_size": 384,
    "dual_attention_layers": tuple(range(13)),
    "qk_norm": "rms_norm",
}


def meta_policy(shape: dict, rank: int, *, half: bool, checkpointing: bool) -> DiffusersPolicy:
    """The policy without memory for its weights."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        transformer = SD3Transformer2DModel(**shape).requires_grad_(False)
        for tensor in (*transformer.parameters(), *transformer.buffers()):
            tensor.data = tensor.data.to(torch.bfloat16 if half else torch.float32)
        peft.inject_adapter_in_model(peft.LoraConfig(r=rank, target_modules=list(LORA_TARGETS)), transformer)
    policy = DiffusersPolicy(transformer.eval(), scale=1.0, half=half)
    for parameter in policy.learned.values():
        parameter.data = parameter.data.float()
    if checkpointing:
        transformer.enable_gradient_checkpointing()
    return policy


def size_of(module: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def kept(policy: DiffusersPolicy, latents: int, side: int, tokens: int) -> int:
    """Bytes autograd keeps from one forward pass of so many latents."""
    config = policy.transformer.config
    return kept_for_backward(
        _Velocity(policy),
        lambda: (
            torch.empty(latents, config.in_channels, side, side),
            torch.empty(latents, tokens, config.joint_attention_dim),
            torch.empty(latents, config.pooled_projection_dim),
        ),
    )


class _Velocity(nn.Module):
    """functional_call wants a module's forward."""

    def __init__(self, policy: DiffusersPolicy) -> None:
        super().__init__()
        self.policy = policy

    def forward(self, x: Tensor, embeds: Tensor, pooled: Tensor) -> Tensor:
        return self.policy.velocity(x, 0.5, embeds, pooled)


def forecast(config: StepGRPOConfig, shape: dict | None = None) -> dict[str, float]:
    """GiB by part, and passes an iteration."""
    model, rollout, settings, shape = config.model, config.rollout, config.grpo, shape or SD35_MEDIUM
    half, side = model.precision == "bf16", rollout.resolution // 8
    tokens = CLIP_TOKENS + (config.data.t5_length or 0)
    each = settings.trajectories
    latents = rollout.micro_prompts * each
    policy = meta_policy(shape, model.lora_rank, half=half, checkpointing=model.gradient_checkpointing)
    learned = sum(p.numel() for p in policy.learned.values())
    one, two = (kept(policy, n, side, tokens) for n in (1, 2))
    each_latent, fixed = two - one, max(0, 2 * one - two)
    if model.gradient_checkpointing:
        whole = meta_policy(shape, model.lora_rank, half=half, checkpointing=False)
        w_one, w_two = (kept(whole, n, side, tokens) for n in (1, 2))
        each_latent += (w_two - w_one) / shape["num_layers"]
    with torch.device("meta"):
        reward = TruncatedSD3(sd35_medium_config()).to(torch.bfloat16 if half else torch.float32)
    copies = 4 + bool(config.train.ema) + settings.is_forward
    return {
        "learned parameters": learned,
        "policy": (size_of(policy) - 4 * learned) / GIB,
        "reward model": size_of(reward) / GIB,
        "LoRA, gradients, Adam, averages": 4 * learned * copies / GIB,
        "kept for the backward pass": (fixed + latents * each_latent) / GIB,
        "latents at once": latents,
        **passes(config),
    }


def passes(config: StepGRPOConfig) -> dict[str, int]:
    """Latents an iteration through the policy with gradients and without, and through the reward model."""
    rollout, settings, forward = config.rollout, config.grpo, config.forward
    guided = 2 if rollout.cfg != 1 else 1
    trajectories = rollout.prompts * settings.trajectories
    learns = sum(settings.learns(step, rollout.steps) for step in range(rollout.steps))
    if settings.is_forward:
        learns = forward.noise_levels
    without = learns * (guided - 1)  # the unconditional branch
    without += learns * guided if settings.kl_weight else 0
    if settings.is_forward:
        without += learns * guided if asks_old(settings, forward) else 0
    if settings.method != "step-grpo":
        without += guided * rollout.steps * (forward.collector_branches if _best_of(config) else 1)
    scored = rollout.prompts * settings.num_branches
    scored *= learns if settings.method.startswith("step-") else 1
    return {
        "passes with gradients": trajectories * learns,
        "passes without": trajectories * without,
        "scored": scored + trajectories * _scored_while_drawing(config),
    }


def _best_of(config: StepGRPOConfig) -> bool:
    return config.grpo.is_forward and config.forward.collector == "best-of"


def _scored_while_drawing(config: StepGRPOConfig) -> int:
    """Latents that the collector has scored for one sample; the last step of step-wise scores nothing."""
    forward = config.forward
    if not config.grpo.is_forward or forward.collector == "euler":
        return 0
    return forward.collector_branches * (1 if forward.collector == "best-of" else config.rollout.steps - 1)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="go over the file")
    args = parser.parse_args(arguments)
    try:
        found = forecast(read_step_grpo(args.config, args.settings))
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    for name, value in found.items():
        print(f"{name:34s} {f'{value:8.2f} GiB' if isinstance(value, float) else f'{value:8,d}'}")
    total = sum(value for value in found.values() if isinstance(value, float))
    print(f"{'in all':34s} {total:8.2f} GiB, {1.2 * total:.1f} with a fifth on top")
    return 0


if __name__ == "__main__":
    sys.exit(main())
