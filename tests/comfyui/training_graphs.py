"""Step-GRPO LoRA Trainer with small settings: as a graph for the server, and called in this process."""

from pathlib import Path
from typing import Any

import torch

from tests.comfyui.graphs import Graph, models, node

PROMPTS = "red heart\nblue car\ngreen tree\nyellow star\npurple cat"
SMALL = {
    "prompts": PROMPTS,
    "width": 32,
    "height": 32,
    "steps": 3,
    "cfg": 2.0,
    "method": "step-grpo",
    "num_branches": 3,
    "prompts_per_iteration": 2,
    "iterations": 2,
    "learning_rate": 0.01,
    "rank": 4,
    "alpha": 8.0,
    "kl_weight": 0.01,
    "noise_level": 0.7,
    "seed": 0,
    "save_every": 1,
    "preview_every": 2,
    "ema_decay": 0.0,
    "name": "test",
    "lora_name": "none",
}


def trainer_graph(**changes: Any) -> Graph:
    """models(), then the trainer 7."""
    connected = {"model": ["1", 0], "drm": ["3", 0], "clip": ["2", 0], "vae": ["1", 2]}
    return models() | {"7": node("StepGRPOLoRATrainer", **connected | SMALL | changes)}


def train(inside: Any, **changes: Any) -> tuple:
    """(MODEL, LORA_MODEL, LOSS_MAP, steps, IMAGE, report) of the node's own execute, as in a prompt."""
    trainer = inside.pack.module("nodes.trainer").StepGRPOLoRATrainer
    connected = {"model": inside.model, "drm": inside.drm, "clip": inside.clip}
    with torch.inference_mode():
        return trainer.execute(**connected | SMALL | changes).result


def files(output: Path, ending: str = ".safetensors") -> list[Path]:
    """What lies in loras/ of an output folder."""
    return sorted((output / "loras").glob(f"*{ending}"))
