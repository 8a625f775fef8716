"""A LoRA on a network's attention, learned on ComfyUI's network in place and saved so that everything loads
it.

    y = W x + (alpha / rank) B A x            A (rank, in), B (out, rank), B = 0 at the start

One pair of matrices for each of to_q, to_k, to_v, to_out.0, add_q_proj, add_k_proj, add_v_proj, to_add_out of
a block and the q, k, v, out of its second attention. ComfyUI fuses q, k and v: a `Target` names the rows of
the fused output its pair adds to. The file has PEFT's names,

    transformer.transformer_blocks.{i}.attn.to_q.lora_A.weight / .lora_B.weight

with alpha / rank folded into lora_B and no .alpha: diffusers would ignore one, and the stock LoraLoader reads
these. Other families keep ComfyUI's own names, diffusion_model.{layer}.lora_A.weight, which that loader reads
for every model.
"""

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

PREFIX = "transformer."
COMFY_PREFIX = "diffusion_model."
FORMAT = "drm-lora"
_LAYER = re.compile(r"^joint_blocks\.(\d+)\.(x_block|context_block)\.(attn2?)\.(qkv|proj)$")
_PARTS = {
    ("x_block", "qkv"): ("to_q", "to_k", "to_v"),
    ("x_block", "proj"): ("to_out.0",),
    ("context_block", "qkv"): ("add_q_proj", "add_k_proj", "add_v_proj"),
    ("context_block", "proj"): ("to_add_out",),
}
# The layers by their names inside an attention of diffusers.
LORA_TARGETS = tuple(name for names in _PARTS.values() for name in names)


class LoRAFileError(ValueError):
    """The file is no LoRA for this network; the message says what differs and what to do."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """name: the layer in the file; layer: in ComfyUI's network; rows: its part of that output."""

    name: str
    layer: str
    rows: tuple[int, int]
    in_features: int


def named_targets(layers: Mapping[str, nn.Module]) -> list[Target]:
    """Linear layers of ComfyUI's network by their names in it, one pair of matrices each."""
    return [
        Target(
            name=f"{COMFY_PREFIX}{name}",
            layer=name,
            rows=(0, module.weight.shape[0]),
            in_features=module.weight.shape[1],
        )
        for name, module in layers.items()
    ]


def comfy_targets(network: nn.Module) -> list[Target]:
    """The attention layers of an SD3 network as ComfyUI builds it (MMDiT), in order; ValueError without
    any.
    """
    found = []
    for layer, module in network.named_modules():
        match = _LAYER.match(layer)
        if match is None:
            continue
        block, stream, attention, kind = match.groups()
        out_features, in_features = module.weight.shape
        parts = _PARTS[stream, kind]
        size = out_features // len(parts)
        for index, part in enumerate(parts):
            found.append(
                Target(
                    name=f"{PREFIX}transformer_blocks.{block}.{attention}.{part}",
                    layer=layer,
                    rows=(index * size, (index + 1) * size),
                    in_features=in_features,
                )
            )
    if not found:
        raise ValueError(
            f"{type(network).__name__} has no attention of SD3's kind (joint_blocks): a LoRA is trained on"
            " SD3 and SD3.5 models only"
        )
    return found


class Adapters(nn.Module):
    """The matrices, in float32. `enabled` False gives the network as it was, for the reference policy."""

    def __init__(self, targets: list[Target], rank: int, alpha: float, seed: int) -> None:
        super().__init__()
        if rank < 1 or not alpha > 0:
            raise ValueError(f"rank is {rank} and alpha {alpha}: wanted at least 1 and above 0")
        self.targets, self.rank, self.scale, self.enabled = targets, rank, alpha / rank, True
        generator = torch.Generator().manual_seed(seed)
        self.down, self.up = nn.ParameterList(), nn.ParameterList()
        for target in targets:
            bound = 1 / math.sqrt(target.in_features)  # PEFT's start: kaiming uniform with a = sqrt(5)
            uniform = torch.rand(rank, target.in_features, generator=generator)
            self.down.append(nn.Parameter((2 * uniform - 1) * bound))
            self.up.append(nn.Parameter(torch.zeros(target.rows[1] - target.rows[0], rank)))

    def _change(self, x: Tensor, indices: list[int]) -> Tensor:
        """What the pairs of one layer add to its output for x (..., in)."""
        down = torch.cat([self.down[index] for index in indices]).to(x.dtype)
        hidden = F.linear(x, down).split(self.rank, dim=-1)
        parts = [
            F.linear(h, self.up[i].to(x.dtype) * self.scale) for h, i in zip(hidden, indices, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    @contextlib.contextmanager
    def attached(self, network: nn.Module) -> Iterator[None]:
        """Within it, every target layer of `network` adds its pairs; afterwards nothing of them is left."""
        by_layer: dict[str, list[int]] = {}
        for index, target in enumerate(self.targets):
            by_layer.setdefault(target.layer, []).append(index)
        handles = []
        try:
            for layer, indices in by_layer.items():

                def add(module, inputs, output, indices=indices):
                    return output + self._change(inputs[0], indices) if self.enabled else output

                handles.append(network.get_submodule(layer).register_forward_hook(add))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def tensors(self) -> dict[str, Tensor]:
        """Names and matrices of the file, on the CPU in float32, each with memory of its own."""
        found = {}
        for target, down, up in zip(self.targets, self.down, self.up, strict=True):
            found[f"{target.name}.lora_A.weight"] = down.detach().cpu().clone()
            found[f"{target.name}.lora_B.weight"] = up.detach().cpu() * self.scale
        return found

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Go on from a file's matrices, of this rank and these layers; LoRAFileError names the first that
        differs.
        """
        expected = self.tensors()
        for name in sorted(expected.keys() | tensors.keys()):
            if name not in tensors or name not in expected:
                where = "is not in the LoRA" if name not in tensors else "is not a layer of this training"
                raise LoRAFileError(f"{name} {where}: go on from a LoRA that this node or command made")
            if tensors[name].shape != expected[name].shape:
                raise LoRAFileError(
                    f"{name} is {tuple(tensors[name].shape)}, wanted {tuple(expected[name].shape)}: set the"
                    " rank and the base model to those the LoRA was trained with"
                )
        for target, down, up in zip(self.targets, self.down, self.up, strict=True):
            down.copy_(tensors[f"{target.name}.lora_A.weight"])
            up.copy_(tensors[f"{target.name}.lora_B.weight"] / self.scale)


def save_tensors(tensors: Mapping[str, Tensor], path: str | os.PathLike, metadata: Mapping[str, str]) -> None:
    """A safetensors file that is there whole or not at all: a process killed on the way leaves the one
    before.
    """
    from safetensors.torch import save_file

    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, dict(metadata))
        temporary.chmod(0o644)  # safetensors writes files for their owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def save_lora(tensors: Mapping[str, Tensor], path: str | os.PathLike, facts: Mapping) -> None:
    """Writes PEFT-named tensors to path (.safetensors), atomically. facts: JSON-able, under "drm" in the
    header.
    """
    path = Path(path)
    if path.suffix != ".safetensors":
        raise LoRAFileError(f"{path.name}: LoRAs are saved as .safetensors, choose such a name")
    header = {"format": "pt", "kind": FORMAT, "drm": json.dumps(facts, allow_nan=False)}
    save_tensors(tensors, path, header)


def load_lora(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict]:
    """Tensors and facts of a file by save_lora; LoRAFileError when it is missing, damaged or of another
    kind.
    """
    from safetensors import SafetensorError, safe_open

    path = Path(path)
    if path.suffix != ".safetensors" or not path.is_file():
        raise LoRAFileError(f"{path} is no .safetensors file: choose a LoRA made by Step-GRPO")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise LoRAFileError(f"{path.name} is damaged or cut short ({error})") from error
    if metadata.get("kind") != FORMAT:
        raise LoRAFileError(
            f"{path.name} was not made by Step-GRPO: its names and scale may mean other things"
        )
    try:
        return tensors, json.loads(metadata["drm"])
    except (KeyError, ValueError) as error:
        raise LoRAFileError(
            f"{path.name} has lost what Step-GRPO wrote about it ({error!r}): take the file as it was made"
        ) from error
