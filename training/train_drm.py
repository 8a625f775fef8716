"""Train a diffusion reward model on encoded preference pairs, on one GPU or many.

    python -m training.train_drm --config training/configs/drm_sd35_medium.yaml
    accelerate launch --config_file training/configs/accelerate_8gpu.yaml -m training.train_drm --config ...

    loss = mean of weight * -log sigmoid(s(chosen, sigma) - s(rejected, sigma)),  one sigma and noise per pair

(DRM, CVPR 2026: Bradley-Terry on noisy latents.) Accelerate drives the processes. The global batch is the
same for any number of them, and a run that was killed goes on from its last checkpoint as if it had not been:
start the same command again. In train.out:

    log.jsonl            one line a step        step_*/    checkpoints, the last few
    evaluation.jsonl     held-out accuracy      reward.safetensors    the result, for ComfyUI's DRM Loader
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drm import DRMFileError
from drm.sd3.base_model import BaseError
from training.config import ConfigError, DRMConfig, read_config
from training.data.shards import ShardError
from training.engine import checkpoints
from training.engine.launch import TrainingError, run_to_the_end

ERRORS = (
    ConfigError,
    ShardError,
    BaseError,
    DRMFileError,
    TrainingError,
    checkpoints.CheckpointError,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see training/configs")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="go over the file")
    args = parser.parse_args(arguments)

    def run(config: DRMConfig) -> None:
        from training.reward.reward_trainer import RewardTrainer

        RewardTrainer(config).run()

    run_to_the_end(
        lambda: read_config(args.config, DRMConfig, args.settings),
        run,
        ERRORS,
        "lower train.micro_batch, set model.gradient_checkpointing to true or model.train to lora",
    )


if __name__ == "__main__":
    main()
