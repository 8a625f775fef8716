"""A small family, prompts and their embeddings, for tests of Step-GRPO's command: made in a second."""

from pathlib import Path

import torch
from PIL import Image

from drm.forward_rl import ForwardSettings
from drm.grpo import GRPOSettings
from tests.tiny import build_demo_family
from training.data.prompt_cache import write_prompts
from training.grpo.step_grpo_config import (
    HeldOutConfig,
    OptimizerConfig,
    PolicyConfig,
    PromptsConfig,
    RolloutConfig,
    StepGRPOConfig,
)

WIDTH, TOKENS = 128, 5
TRAIN = [f"a {word} thing" for word in ("red", "green", "blue", "round", "flat", "old", "new")]
HELD_OUT = [f"a {word} thing" for word in ("black", "white", "tall")]


def embed(prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    """Random numbers of their own for every prompt: (B, 5, 128), (B, 128)."""
    rows = [
        torch.randn(TOKENS + 1, WIDTH, generator=torch.Generator().manual_seed(sum(p.encode())))
        for p in prompts
    ]
    both = torch.stack(rows)
    return both[:, :TOKENS], both[:, TOKENS]


def write_family(folder: Path) -> None:
    """Base with a VAE, reward model, prompt files and their embeddings."""
    files = build_demo_family(folder, hidden=WIDTH, depth=2, text=WIDTH)
    files.checkpoint.rename(folder / "base.safetensors")
    files.drm.rename(folder / "reward.safetensors")
    (folder / "train.txt").write_text("# to learn from\n\n" + "\n".join(TRAIN) + "\n")
    (folder / "held_out.txt").write_text("\n".join(HELD_OUT) + "\n")
    write_prompts(folder / "prompts", TRAIN + HELD_OUT, embed, {"encoders": "random"})


def redness(prompt: str, pictures: list[Image.Image]) -> list[float]:
    """A baseline: how red a picture is."""
    return [sum(picture.resize((1, 1)).getpixel((0, 0))[:1]) / 255 for picture in pictures]


def make_config(
    folder: Path,
    *,
    out: str,
    grpo: dict | None = None,
    forward: dict | None = None,
    rollout: dict | None = None,
    evaluate: dict | None = None,
    model: dict | None = None,
    **train,
) -> StepGRPOConfig:
    """5 prompts an iteration, 4 steps, 4 x 4 latents."""
    return StepGRPOConfig(
        version=1,
        name="tiny",
        licence="CC0-1.0",
        model=PolicyConfig(
            **{
                "base": str(folder / "base.safetensors"),
                "drm": str(folder / "reward.safetensors"),
                "lora_rank": 4,
                "lora_alpha": 8.0,
                "precision": "no",
                "gradient_checkpointing": False,
                **(model or {}),
            }
        ),
        data=PromptsConfig(
            prompts=str(folder / "train.txt"),
            held_out=str(folder / "held_out.txt"),
            encoded=str(folder / "prompts"),
        ),
        grpo=GRPOSettings(**{"num_branches": 3, "min_std": 1e-5, **(grpo or {})}),
        forward=ForwardSettings(**(forward or {})),
        rollout=RolloutConfig(
            **{"prompts": 5, "micro_prompts": 8, "steps": 4, "cfg": 2.0, "resolution": 32, **(rollout or {})}
        ),
        evaluate=HeldOutConfig(**{"prompts": 3, "seeds": 2, "steps": 3, **(evaluate or {})}),
        train=OptimizerConfig(
            **{
                "out": out,
                "iterations": 6,
                "learning_rate": 1e-2,
                "ema": 0.9,
                "ema_every": 2,
                "save_every": 2,
                "evaluate_every": 3,
                "keep": 9,
                **train,
            }
        ),
    )
