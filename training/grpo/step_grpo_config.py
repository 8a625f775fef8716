"""What Step-GRPO's training reads: one YAML file as frozen dataclasses.

version: 1
model:    base and reward model, the LoRA, how numbers are kept
data:     prompts to learn from, prompts held out, and their embeddings
grpo:     the algorithm, `method: step-grpo`, grpo, nft, awm, step-nft, step-awm (drm.grpo.GRPOSettings)
forward:  what the last four have of their own (drm.forward_rl.ForwardSettings)
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
from typing import Annotated, Literal

from drm.forward_rl import ForwardSettings
from drm.grpo import GRPOSettings
from drm.ranges import Count, Decay, Positive, Range, Seed
from training.config import (
    ConfigError,
    LearningRate,
    Rank,
    Resolution,
    WeightDecay,
    check_numbers,
    read_config,
)
from training.data.prompt_cache import PromptsConfig

VERSION = 1
Sigma = Annotated[float, Range(0, 1, below=True)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class PolicyConfig:
    """`base`: an SD3 or SD3.5 checkpoint (one file or a diffusers folder). `drm`: the reward. `vae`: a
    diffusers folder (or the demo family's checkpoint), for pictures and baselines. `lora`: one to go on from.
    """

    base: str
    drm: str
    vae: str | None = None
    lora: str | None = None
    lora_rank: Rank = 32
    lora_alpha: Positive = 64.0
    precision: Literal["bf16", "no"] = "bf16"
    gradient_checkpointing: bool = True


@dataclasses.dataclass(frozen=True, kw_only=True)
class RolloutConfig:
    """`prompts` an iteration over all processes, at most `micro_prompts` at once on one (all methods but
    step-grpo then have num_branches latents for each of them at once).
    """

    prompts: Count = 48
    micro_prompts: Count = 4
    steps: Annotated[int, Range(2, 10_000)] = 10  # the last has no noise to learn from
    cfg: Annotated[float, Range(1, 1000)] = 4.5  # 1 is no guidance
    shift: Annotated[float, Range(0, 1000, above=True)] = 3.0
    resolution: Resolution = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    """`ema` 0 keeps no averaged weights; otherwise they are evaluated and exported, taken every `ema_every`
    iterations. `patience`: stop after so many evaluations without a better held-out score.
    """

    out: str
    iterations: Count = 1000
    learning_rate: LearningRate = 1e-4
    weight_decay: WeightDecay = 1e-4
    betas: tuple[Decay, Decay] = (0.9, 0.999)
    clip: Positive = 1.0
    ema: Decay = 0.0
    ema_every: Count = 8
    save_every: Count = 20
    keep: Count = 2
    evaluate_every: Count | None = 50
    pictures_every: Count | None = None
    patience: Count | None = None
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeldOutConfig:
    """Each held-out prompt is drawn from `seeds` noises by `steps` plain steps; its score is the DRM's mean
    over `sigmas`. `drms`: more reward models by name. `baselines`: name to clip:FOLDER, pickscore:FOLDER or
    module:function. `best_by`: whose score decides which LoRA is the best, and when patience runs out:
    held_out (the DRM that is optimised), or one of the others, which it cannot learn to fool. `pictures`: how
    many prompts the grids show.
    """

    prompts: Count = 64
    seeds: Count = 4
    steps: Annotated[int, Range(1, 10_000)] = 40
    batch: Count = 8
    sigmas: tuple[Sigma, ...] = (0.0, 0.2, 0.4)
    drms: dict[str, str] = dataclasses.field(default_factory=dict)
    baselines: dict[str, str] = dataclasses.field(default_factory=dict)
    best_by: str = "held_out"
    pictures: Count = 8
    seed: Seed = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepGRPOConfig:
    """The whole file."""

    version: Annotated[int, Range(1, VERSION)]
    model: PolicyConfig
    data: PromptsConfig
    train: OptimizerConfig
    grpo: GRPOSettings = dataclasses.field(default_factory=GRPOSettings)
    forward: ForwardSettings = dataclasses.field(default_factory=ForwardSettings)
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
        if not self.grpo.is_forward:
            tree.pop("forward")
        tree["rollout"].pop("micro_prompts")
        tree["data"].pop("encoders")
        tree["model"].pop("gradient_checkpointing")
        for key in ("batch", "pictures"):
            tree["evaluate"].pop(key)
        return {key: value for key, value in tree.items() if isinstance(value, dict)}


def read_step_grpo(path: str | Path, overrides: Sequence[str] = ()) -> StepGRPOConfig:
    """The YAML file; ConfigError in one sentence when it cannot be used."""
    return read_config(path, StepGRPOConfig, overrides)


def _check(config: StepGRPOConfig) -> None:
    if config.version != VERSION:
        raise ConfigError(
            f"version is {config.version}, this code reads {VERSION}: take the configuration of this release"
            " in training/configs and carry your values over"
        )
    check_numbers(config)
    train, rollout, evaluate, model = config.train, config.rollout, config.evaluate, config.model
    scorers = [*evaluate.drms, *evaluate.baselines]
    needs_vae = bool(evaluate.baselines or train.pictures_every)
    learned = [step for step in range(rollout.steps) if config.grpo.learns(step, rollout.steps)]
    wrong = [
        (not learned, "grpo.start to grpo.end", (config.grpo.start, config.grpo.end), "a step in the window"),
        (not evaluate.sigmas, "evaluate.sigmas", evaluate.sigmas, "at least one"),
        (
            len({"held_out", "diversity", "step", "prompts", *scorers}) < 4 + len(scorers),
            "evaluate.drms and baselines",
            ", ".join(scorers),
            "names of their own, none of them held_out, diversity, step or prompts",
        ),
        (
            evaluate.best_by not in ("held_out", *scorers),
            "evaluate.best_by",
            evaluate.best_by,
            f"one of {', '.join(('held_out', *scorers))}",
        ),
        (needs_vae and not model.vae, "model.vae", model.vae, "a VAE, for pictures and baselines"),
    ]
    for is_wrong, key, value, wanted in wrong:
        if is_wrong:
            raise ConfigError(f"{key} is {value}: wanted {wanted}")
