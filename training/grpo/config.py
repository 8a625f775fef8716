"""What Step-GRPO's training reads: one YAML file as frozen dataclasses.

version: 1
model:    base and reward model, the LoRA, how numbers are kept
data:     prompts to learn from, prompts held out, and their embeddings
grpo:     the algorithm, `method: step-grpo` or `method: grpo` (drm.grpo.GRPOSettings)
rollout:  how many prompts, steps, guidance, size
train:    optimiser and what is saved (`python -m training.train_step_grpo`)
evaluate: how held-out prompts are drawn and scored
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from drm.grpo import GRPOSettings
from training.config import ConfigError, read_config

VERSION = 1
PATCH = 16  # pixels: eight of the VAE, two of the network


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """`base`: an SD3 or SD3.5 checkpoint (one file or a diffusers folder). `drm`: the reward. `vae`: a
    diffusers folder (or the demo family's checkpoint), for pictures and rivals. `lora`: one to go on from.
    """

    base: str
    drm: str
    vae: str | None = None
    lora: str | None = None
    lora_rank: int = 32
    lora_alpha: float = 64.0
    precision: Literal["bf16", "no"] = "bf16"
    gradient_checkpointing: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """`prompts`, `held_out`: text files, one prompt a line. `encoded`: the folder of their embeddings, made
    at the first start when `encoders`, a diffusers SD3 folder, is given (training/prompts.py).
    """

    prompts: str
    encoded: str
    held_out: str | None = None
    encoders: str | None = None
    t5_length: int | None = 256


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """`prompts` an iteration over all processes, at most `micro_prompts` at once on one (GRPO then has
    num_branches latents for each of them at once).
    """

    prompts: int = 48
    micro_prompts: int = 4
    steps: int = 10
    cfg: float = 4.5
    shift: float = 3.0
    resolution: int = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`ema` 0 keeps no averaged weights; otherwise they are evaluated and exported, taken every `ema_every`
    iterations. `patience`: stop after so many evaluations without a better held-out score.
    """

    out: str
    iterations: int = 1000
    learning_rate: float = 1e-4
    weight_decay: float = 1e-4
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema: float = 0.0
    ema_every: int = 8
    save_every: int = 20
    keep: int = 2
    evaluate_every: int | None = 50
    pictures_every: int | None = None
    patience: int | None = None
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Each held-out prompt is drawn from `seeds` noises by `steps` plain steps; its score is the DRM's mean
    over `sigmas`. `drms`: more reward models by name. `rivals`: name to clip:FOLDER, pickscore:FOLDER or
    module:function. `best_by`: whose score decides which LoRA is the best, and when patience runs out:
    held_out (the DRM that is optimised), or one of the others, which it cannot learn to fool. `pictures`: how
    many prompts the grids show.
    """

    prompts: int = 64
    seeds: int = 4
    steps: int = 40
    batch: int = 8
    sigmas: tuple[float, ...] = (0.0, 0.2, 0.4)
    drms: dict[str, str] = dataclasses.field(default_factory=dict)
    rivals: dict[str, str] = dataclasses.field(default_factory=dict)
    best_by: str = "held_out"
    pictures: int = 8
    seed: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepGRPOConfig:
    """The whole file."""

    version: int
    model: PolicyConfig
    data: PromptsConfig
    train: OptimizerConfig
    grpo: GRPOSettings = dataclasses.field(default_factory=GRPOSettings)
    rollout: RolloutConfig = RolloutConfig()
    evaluate: HeldOutConfig = HeldOutConfig()
    licence: str = "unknown"
    name: str = "Step-GRPO LoRA"

    def __post_init__(self) -> None:
        _check(self)

    def hash(self) -> str:
        """sha256 of everything in it, the same for the same configuration."""
        return hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()

    def identity(self) -> dict:
        """What must not change within a run; how it is spread, saved and for how long may."""
        tree = json.loads(json.dumps(dataclasses.asdict(self)))
        free = {"out", "iterations", "save_every", "keep", "patience", "pictures_every"}
        tree["train"] = {key: value for key, value in tree["train"].items() if key not in free}
        tree["rollout"].pop("micro_prompts")
        tree["data"].pop("encoders")
        tree["model"].pop("gradient_checkpointing")
        for key in ("batch", "pictures"):
            tree["evaluate"].pop(key)
        return {key: value for key, value in tree.items() if isinstance(value, dict)}


def read_step_grpo(path: str | Path, overrides: Sequence[str] = ()) -> StepGRPOConfig:
    """The YAML file; ConfigError in one sentence when it cannot be used."""
    try:
        return read_config(path, StepGRPOConfig, overrides)
    except ConfigError:
        raise
    except ValueError as error:  # GRPOSettings knows nothing of configurations
        raise ConfigError(f"grpo: {error}") from error


def _check(config: StepGRPOConfig) -> None:
    if config.version != VERSION:
        raise ConfigError(
            f"version is {config.version}, this code reads {VERSION}: take the configuration of this release"
            " in training/configs and carry your values over"
        )
    train, rollout, evaluate, model = config.train, config.rollout, config.evaluate, config.model
    at_least_one = {
        "rollout.prompts": rollout.prompts,
        "rollout.micro_prompts": rollout.micro_prompts,
        "train.iterations": train.iterations,
        "train.ema_every": train.ema_every,
        "train.save_every": train.save_every,
        "train.keep": train.keep,
        "train.evaluate_every": train.evaluate_every or 1,
        "train.pictures_every": train.pictures_every or 1,
        "train.patience": 1 if train.patience is None else train.patience,
        "evaluate.prompts": evaluate.prompts,
        "evaluate.seeds": evaluate.seeds,
        "evaluate.steps": evaluate.steps,
        "evaluate.batch": evaluate.batch,
        "model.lora_rank": model.lora_rank,
    }
    scorers = [*evaluate.drms, *evaluate.rivals]
    size, needs_vae = rollout.resolution, bool(evaluate.rivals) or train.pictures_every is not None
    learned = [step for step in range(rollout.steps) if config.grpo.learns(step, rollout.steps)]
    wrong = [(value < 1, key, value, "at least 1") for key, value in at_least_one.items()] + [
        (
            rollout.steps < 2,
            "rollout.steps",
            rollout.steps,
            "at least 2, the last has no noise to learn from",
        ),
        (not learned, "grpo.start to grpo.end", (config.grpo.start, config.grpo.end), "a step in the window"),
        (rollout.cfg < 1, "rollout.cfg", rollout.cfg, "at least 1 (no guidance)"),
        (not rollout.shift > 0, "rollout.shift", rollout.shift, "above 0"),
        (size < PATCH or size % PATCH, "rollout.resolution", size, f"a multiple of {PATCH}"),
        (not train.learning_rate > 0, "train.learning_rate", train.learning_rate, "above 0"),
        (not 0 <= train.ema < 1, "train.ema", train.ema, "0 (none) to below 1"),
        (not train.clip > 0, "train.clip", train.clip, "above 0"),
        (not model.lora_alpha > 0, "model.lora_alpha", model.lora_alpha, "above 0"),
        (not evaluate.sigmas, "evaluate.sigmas", evaluate.sigmas, "at least one"),
        (not all(0 <= s < 1 for s in evaluate.sigmas), "evaluate.sigmas", evaluate.sigmas, "0 to below 1"),
        (
            len({"held_out", "diversity", "step", "prompts", *scorers}) < 4 + len(scorers),
            "evaluate.drms and rivals",
            ", ".join(scorers),
            "names of their own, none of them held_out, diversity, step or prompts",
        ),
        (
            evaluate.best_by not in ("held_out", *scorers),
            "evaluate.best_by",
            evaluate.best_by,
            f"one of {', '.join(('held_out', *scorers))}",
        ),
        (needs_vae and not model.vae, "model.vae", model.vae, "a VAE, for pictures and rivals"),
    ]
    for is_wrong, key, value, wanted in wrong:
        if is_wrong:
            raise ConfigError(f"{key} is {value}: wanted {wanted}")
