"""The LoRA file of Step-GRPO's command, and what its header says: where it comes from, and its curve."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from safetensors import SafetensorError
from torch import Tensor

from drm.lora import save_lora
from training.engine.checkpoints import why_not_written
from training.engine.launch import TrainingError
from training.evaluation.test_sets import file_sha256
from training.grpo.step_grpo_config import StepGRPOConfig

VERSION = 1  # of the header


def hash_of(path: str | Path) -> dict[str, str]:
    """Name and sha256 of a file, or of a folder's weights."""
    path = Path(path)
    if path.is_file():
        return {"name": path.name, "sha256": file_sha256(path)}
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    parts = [file_sha256(part) for part in sorted(folder.glob("*.safetensors"))]
    return {"name": path.resolve().name, "sha256": hashlib.sha256("".join(parts).encode()).hexdigest()}


def lora_facts(
    config: StepGRPOConfig, done: int, curve: Sequence[tuple[int, float]], hashes: tuple[dict, dict]
) -> dict:
    """curve: (iterations, held-out score) so far; hashes: `hash_of` base and reward model."""
    tree = json.loads(json.dumps(config.identity()))
    return {
        "version": VERSION,
        "name": config.name,
        "license": config.licence,
        "method": config.grpo.method,
        "iterations": done,
        "seed": config.train.seed,
        "ema": config.train.ema,
        "rank": config.model.lora_rank,
        "base": hashes[0],
        "reward": hashes[1],
        "config": {
            key: tree[key] for key in ("grpo", "forward", "rollout", "train", "evaluate") if key in tree
        },
        "config_sha256": config.hash(),
        "best_by": config.evaluate.best_by,
        "curve": [list(point) for point in curve],
    }


def write_lora(tensors: Mapping[str, Tensor], path: Path, facts: dict) -> None:
    """Atomically; TrainingError when the disk is full or fails."""
    try:
        save_lora(tensors, path, facts)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            f"cannot write {path} ({why_not_written(error)}): start the same command again"
        ) from error
