"""Fine-tune SD3 with a diffusion reward model: Step-GRPO, or GRPO behind one switch, on one GPU or many.

    python -m training.train_step_grpo --config training/configs/step_grpo_sd35_medium.yaml
    accelerate launch --config_file training/configs/accelerate_8gpu.yaml -m training.train_step_grpo ...

drm/grpo.py has the algorithm, grpo/step_grpo_trainer.py the run. Prompts and noise are a function of (seed,
iteration), so the run is the same for any number of processes, and one that was killed goes on from its last
checkpoint as if it had not been: start the same command again. In train.out:

    log.jsonl            one line an iteration      step_*/             checkpoints, the last few
    evaluation.jsonl     held-out scores            lora.safetensors    the result, for LoraLoader, diffusers
    pictures/            grids of the same seeds    best.safetensors    the best by its held-out score
"""

from __future__ import annotations

import argparse
from pathlib import Path

from drm import DRMFileError
from drm.lora import LoRAFileError
from drm.sd3.base_model import BaseError
from training.config import ConfigError
from training.data.decoders import DecoderError
from training.data.prompt_cache import PromptError
from training.engine import checkpoints
from training.engine.launch import TrainingError, run_to_the_end
from training.evaluation.baselines import BaselineError
from training.grpo.step_grpo_config import StepGRPOConfig, read_step_grpo

ERRORS = (
    ConfigError,
    PromptError,
    BaseError,
    DRMFileError,
    LoRAFileError,
    DecoderError,
    BaselineError,
    TrainingError,
    checkpoints.CheckpointError,
)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--config", type=Path, required=True, help="YAML file, see training/configs")
    parser.add_argument("settings", nargs="*", metavar="section.key=value", help="go over the file")
    args = parser.parse_args(arguments)

    def run(config: StepGRPOConfig) -> None:
        from training.grpo.step_grpo_trainer import StepGRPOTrainer

        StepGRPOTrainer(config).run()

    run_to_the_end(
        lambda: read_step_grpo(args.config, args.settings),
        run,
        ERRORS,
        "lower rollout.micro_prompts or evaluate.batch, or set model.gradient_checkpointing to true",
    )


if __name__ == "__main__":
    main()
