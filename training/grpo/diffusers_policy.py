"""The policy of Step-GRPO: an SD3 transformer of diffusers with a LoRA of peft, as a velocity with guidance.

    velocity = v(empty) + cfg (v(prompt) - v(empty))            gradients through v(prompt) alone

Exported tensors have PEFT's names below `transformer.`, alpha / rank folded into lora_B (drm/lora.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from drm import DRM
from drm.lora import LORA_TARGETS, PREFIX, LoRAFileError
from drm.precision import runs_in_bfloat16
from drm.sd3.base_model import load_transformer
from training.data.prompt_cache import PromptCache
from training.engine.launch import TrainingError
from training.grpo.step_grpo_config import PolicyConfig


class DiffusersPolicy(nn.Module):
    """transformer: frozen, with adapters in float32 that learn. Latents in and out are float32."""

    def __init__(self, transformer: nn.Module, *, scale: float, half: bool) -> None:
        super().__init__()
        self.transformer, self.scale, self.half = transformer, scale, half
        self._layers = [module for module in transformer.modules() if hasattr(module, "lora_A")]
        self._names = [name for name, _ in transformer.named_parameters() if ".lora_" in name]

    @property
    def learned(self) -> dict[str, nn.Parameter]:
        """What learns, by name."""
        return {name: self.transformer.get_parameter(name) for name in self._names}

    @contextlib.contextmanager
    def reference(self) -> Iterator[None]:
        """Within it the policy is the frozen one it started from."""
        try:
            for layer in self._layers:
                layer.enable_adapters(False)
            yield
        finally:
            for layer in self._layers:
                layer.enable_adapters(True)

    def velocity(self, x: Tensor, sigma: float, embeds: Tensor, pooled: Tensor) -> Tensor:
        """x (B, C, H, W), embeds (B, T, D), pooled (B, P) -> (B, C, H, W) float32, without guidance."""
        dtype = torch.bfloat16 if self.half else torch.float32
        timestep = torch.full((len(x),), 1000 * sigma, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.half):
            output = self.transformer(
                hidden_states=x.to(dtype),
                timestep=timestep,
                encoder_hidden_states=embeds.to(dtype),
                pooled_projections=pooled.to(dtype),
                return_dict=False,
            )[0]
        return output.float()

    def guided(
        self, x: Tensor, sigma: float, prompt: tuple[Tensor, Tensor], empty: tuple[Tensor, Tensor], cfg: float
    ) -> Tensor:
        """prompt: embeds and pooled, one a latent; empty: one for all."""
        positive = self.velocity(x, sigma, *prompt)
        if cfg == 1:
            return positive
        with torch.no_grad():
            negative = self.velocity(x, sigma, *(part.expand(len(x), *part.shape[1:]) for part in empty))
        return negative + cfg * (positive - negative)

    def tensors(self) -> dict[str, Tensor]:
        """Names and matrices of the exported file, on the CPU in float32."""
        return {
            _file_name(name): p.detach().cpu() * (self.scale if ".lora_B." in name else 1.0)
            for name, p in self.learned.items()
        }

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a file's matrices, of this rank and these layers; LoRAFileError names what differs."""
        learned = {_file_name(name): (name, p) for name, p in self.learned.items()}
        for name in sorted(learned.keys() ^ tensors.keys()):
            where = "is not in the LoRA" if name in learned else "is not a layer of this training"
            raise LoRAFileError(f"{name} {where}: go on from a LoRA that this command made")
        for name, (own, p) in learned.items():
            if tensors[name].shape != p.shape:
                raise LoRAFileError(
                    f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(p.shape)}: set model.lora_rank"
                    " and model.base to those the LoRA was trained with"
                )
            p.copy_(tensors[name] / (self.scale if ".lora_B." in own else 1.0))


def _file_name(name: str) -> str:
    return PREFIX + name.replace(".default.weight", ".weight")


def build_policy(config: PolicyConfig, *, seed: int, device: torch.device) -> DiffusersPolicy:
    """The base with fresh adapters drawn from `seed`; the second matrix of each starts at zero."""
    import peft

    half = runs_in_bfloat16(config.precision, device)
    transformer = load_transformer(
        Path(config.base), device=device, dtype=torch.bfloat16 if half else torch.float32
    )
    settings = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=config.lora_alpha, target_modules=list(LORA_TARGETS)
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        peft.inject_adapter_in_model(settings, transformer)
    for name, parameter in transformer.named_parameters():
        learns = ".lora_" in name
        parameter.requires_grad_(learns)
        if learns:
            parameter.data = parameter.data.float()
    if config.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    return DiffusersPolicy(transformer.eval(), scale=config.lora_alpha / config.lora_rank, half=half).to(
        device
    )


def check_fit(policy: DiffusersPolicy, drm: DRM, cache: PromptCache, name: str) -> None:
    """TrainingError when reward model, base and embeddings are not of one family."""
    config = policy.transformer.config
    embeds, pooled = (part.shape[-1] for part in cache.embeds([""]))
    found = {
        "latent channels": (config.in_channels, drm.in_channels),
        "text width": (config.joint_attention_dim, drm.prompt_dim),
        "pooled text width": (config.pooled_projection_dim, drm.pooled_dim),
    }
    for what, (base, reward) in found.items():
        if base != reward:
            raise TrainingError(
                f"the base has {base} {what}, {name} takes {reward}: they are not of one latent space; take a"
                " reward model of the base's family"
            )
    if (embeds, pooled) != (config.joint_attention_dim, config.pooled_projection_dim):
        raise TrainingError(
            f"the embedded prompts are {embeds} wide and pooled {pooled}, the base takes"
            f" {config.joint_attention_dim} and {config.pooled_projection_dim}: encode them with its encoders"
        )
