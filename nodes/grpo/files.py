"""What a Step-GRPO run leaves on the disk: the LoRA, and beside it the state a killed run goes on from.

    NAME_1a2b3c4d.safetensors     the LoRA, for the stock LoraLoader and diffusers
    NAME_1a2b3c4d.resume          matrices, Adam's moments, their running mean, the best so far, and with nft
                                  and awm the old policy's matrices (safetensors)

The state is written first and is what counts: a server killed between the two goes on from the newer one, and
writes the LoRA again. 1a2b3c4d stands for everything the run depends on, so that the same node finds its own
files. The state does not end in .safetensors, or the page would offer it as a LoRA.
"""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .inputs import Training
from .watch import Watch

if TYPE_CHECKING:
    from ...drm.lora import Adapters

# What may change between two runs of one training: how long it goes on and how often one looks.
FREE = ("iterations", "save_every", "preview_every", "name")
STATE = "drm-step-grpo-state"
LIKE = 0.1


# A DRM loaded while a prompt runs has inference tensors, which refuse to be sliced outside of that mode.
@torch.inference_mode()
def weights_hash(module: nn.Module) -> str:
    """sha256 over names, shapes and up to 512 evenly spaced values of every weight of a network."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, flat.numel() // 512)].float().cpu().contiguous()
        digest.update(f"{name}{tuple(tensor.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def sketch(latents: list[Tensor]) -> list[float]:
    """What stays of latents (S, C, H, W) between two runs on equal inputs, whatever their last digits do."""
    return torch.cat(latents).float().mean(dim=(2, 3)).flatten().tolist()


def apart(one: list[float], other: list[float]) -> float:
    """Distance of two sketches over their size: noise of another device stays far below LIKE."""
    a, b = torch.tensor(one), torch.tensor(other)
    return float((a - b).norm() / b.norm()) if a.shape == b.shape else float("inf")


@dataclass
class Progress:
    """How far a run is. sketch: of the pictures before it, see `sketch`."""

    watch: Watch
    sketch: list[float] = field(default_factory=list)
    iteration: int = 0
    rewards: list[float] = field(default_factory=list)
    kl: list[float] = field(default_factory=list)
    cheated: bool = False


@dataclass
class State:
    """Everything that changes while a run goes on. best, average: names and matrices as in the file. old: the
    matrices of the policy that trails, where the method has one.
    """

    adapters: "Adapters"
    optimizer: torch.optim.Optimizer
    progress: Progress
    best: dict[str, Tensor] = field(default_factory=dict)
    average: list[Tensor] = field(default_factory=list)
    old: list[Tensor] = field(default_factory=list)

    def tensors(self) -> dict[str, Tensor]:
        found = {f"best.{name}": tensor for name, tensor in self.best.items()}
        found |= {f"average.{i}": tensor for i, tensor in enumerate(self.average)}
        found |= {f"old.{i}": tensor for i, tensor in enumerate(self.old)}
        for i, parameter in enumerate(self.adapters.parameters()):
            found[f"parameter.{i}"] = parameter.detach()
            for key, value in self.optimizer.state.get(parameter, {}).items():
                found[f"{key}.{i}"] = value
        return found

    def save(self, path: Path) -> None:
        from ...drm.lora import save_tensors

        header = {"kind": STATE, "progress": json.dumps(dataclasses.asdict(self.progress))}
        save_tensors({name: tensor.cpu() for name, tensor in self.tensors().items()}, path, header)

    def load(self, path: Path) -> bool:
        """Goes on from a file; whether there was a whole one of this run's layers. ValueError when the MODEL
        drew other pictures before that run than it does now (this state's sketch).
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                header = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError):
            return False
        parameters = list(self.adapters.parameters())
        if header.get("kind") != STATE or not self._fits(tensors, parameters):
            return False
        progress = json.loads(header["progress"])
        distance = apart(progress["sketch"], self.progress.sketch)
        if distance > LIKE:
            raise ValueError(
                f"{path.name} is of a run whose MODEL drew other pictures before the training ({distance:.0%}"
                " apart): another text encoder, hooks or patches are connected now; connect what that run"
                " had, or give this one another name"
            )
        self._take(tensors, parameters)
        self.progress = Progress(**{**progress, "watch": Watch.from_dict(progress["watch"])})
        return True

    @staticmethod
    def _fits(tensors: dict[str, Tensor], parameters: list[nn.Parameter]) -> bool:
        shapes = {name: tensor.shape for name, tensor in tensors.items()}
        return all(shapes.get(f"parameter.{i}") == value.shape for i, value in enumerate(parameters))

    @torch.no_grad()
    def _take(self, tensors: dict[str, Tensor], parameters: list[nn.Parameter]) -> None:
        for i, parameter in enumerate(parameters):
            parameter.copy_(tensors[f"parameter.{i}"])
            if f"step.{i}" in tensors:
                self.optimizer.state[parameter] = {
                    "step": tensors[f"step.{i}"],
                    "exp_avg": tensors[f"exp_avg.{i}"].to(parameter.device),
                    "exp_avg_sq": tensors[f"exp_avg_sq.{i}"].to(parameter.device),
                }
        self.average, self.old = (
            [
                tensors[f"{part}.{i}"].to(parameter.device)
                for i, parameter in enumerate(parameters)
                if f"{part}.{i}" in tensors
            ]
            for part in ("average", "old")
        )
        self.best = {
            name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")
        }


def settings_of(training: Training) -> dict:
    """The inputs as JSON."""
    return {**dataclasses.asdict(training), "prompts": list(training.prompts)}


def run_id(training: Training, hashes: dict[str, str]) -> str:
    """Eight letters that stand for all that the result depends on; hashes: of the networks and the LoRA."""
    fixed = {key: value for key, value in settings_of(training).items() if key not in FREE}
    text = json.dumps([fixed, hashes], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]
