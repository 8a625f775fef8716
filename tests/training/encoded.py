"""A small encoded folder and a small base model, for tests of the trainer: made in a second, learnable."""

from dataclasses import asdict
from pathlib import Path

import torch
import yaml
from safetensors.torch import save_file

from drm.sd3.comfy_layout import PREFIX, to_comfy_layout
from tests.tiny import tiny_transformer
from training.config import DataConfig, DRMConfig, ModelConfig, TrainConfig
from training.data import shards
from training.grpo.step_grpo_config import StepGRPOConfig

LATENT = (16, 4, 4)


def write_encoded(
    folder: Path,
    pairs: int = 22,
    held_out: int = 6,
    *,
    latent: tuple[int, ...] = LATENT,
    t5_lengths: tuple[int, ...] = (5, 8),
) -> Path:
    """Pairs whose preferred picture has the higher mean; every third of weight 2, two of label 0.8, in three
    image shards and two prompt shards, from two sources.
    """
    rng = torch.Generator().manual_seed(1)
    images, prompts, total = 30, 7, pairs + held_out
    latents = torch.randn(images, *latent, generator=rng) + torch.linspace(-1, 1, images).reshape(-1, 1, 1, 1)
    folder.mkdir(parents=True, exist_ok=True)
    for index, part in enumerate(latents.split(12)):
        shards.write_image_shard(folder, index, part.half())
    for index, count in enumerate((4, 3)):
        tensors = {
            "clip": torch.randn(count, 6, 128, generator=rng),
            "pooled": torch.randn(count, 256, generator=rng),
        }
        tensors |= {f"t5_{length}": torch.randn(count, length, 256, generator=rng) for length in t5_lengths}
        shards.write_prompt_shard(folder, index, {name: value.half() for name, value in tensors.items()})
    two = torch.stack([torch.randperm(images, generator=rng)[:2].sort().values for _ in range(total)])
    shards.write_pairs(
        folder,
        {
            "prompt": [i % prompts for i in range(total)],
            "chosen": two[:, 1].tolist(),
            "rejected": two[:, 0].tolist(),
            "weight": [2.0 if i % 3 == 0 else 1.0 for i in range(total)],
            "label": [0.8 if i in (1, 4) else 1.0 for i in range(total)],
            "source": ["hpdv3" if i % 2 else "pickapic" for i in range(total)],
            "held_out": [i >= pairs for i in range(total)],
            "row": [f"row {i}" for i in range(total)],
        },
    )
    shards.write_meta(folder, {"latent": list(latent), "t5_lengths": list(t5_lengths), "dtype": "float16"})
    return folder


def write_base(path: Path, seed: int = 0) -> Path:
    """Two blocks of width 128 as one file in ComfyUI's layout."""
    transformer = tiny_transformer(hidden=128, depth=2, seed=seed)
    weights = to_comfy_layout(transformer.state_dict(), transformer.config)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({PREFIX + name: value.contiguous() for name, value in weights.items()}, path)
    return path


def make_config(folder: Path, *, model: dict | None = None, data: dict | None = None, **train) -> DRMConfig:
    """A configuration for what write_encoded and write_base put in `folder`: 5 steps of 8 pairs."""
    return DRMConfig(
        version=1,
        name="tiny",
        licence="CC0-1.0",
        model=ModelConfig(
            **{"base": str(folder / "base.safetensors"), "num_kept": 2, "head_hidden": 64, **(model or {})}
        ),
        data=DataConfig(**{"encoded": str(folder / "encoded"), **(data or {})}),
        train=TrainConfig(
            **{
                "out": str(folder / "run"),
                "steps": 5,
                "global_batch": 8,
                "micro_batch": 8,
                "learning_rate": 1e-3,
                "warmup": 2,
                "ema": 0.9,
                "precision": "no",
                "save_every": 2,
                "workers": 0,
                **train,
            }
        ),
    )


def write_yaml(config: DRMConfig | StepGRPOConfig, path: Path) -> Path:
    """The configuration as the file a person writes."""

    def plain(value: object) -> object:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items() if item is not None}
        return [plain(item) for item in value] if isinstance(value, tuple) else value

    path.write_text(yaml.safe_dump(plain(asdict(config))))
    return path
