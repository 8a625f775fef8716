"""The demo family from nothing, or from warm starts, in so many minutes on whatever machine it is.

    python -m training.demo.make --minutes 300 --out runs/scenes [--warm FOLDER]

Every stage takes its share of the minutes, goes on where it was stopped, and is skipped when it is done:

    scenes        pictures of scenes without what is held out, of any scene, and of single things, 64 x 64
    autoencoder   TAESD's shape, 16 channels
    judge, rater  the two detectors
    generator     transformer and text encoder, by flow matching
    drawings      of many captions in many ways, rated
    reward        the DRM, by training.train_drm's own trainer on these

--warm: a folder with autoencoder.safetensors and generator.safetensors of the same shapes to start from.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from diffusers import AutoencoderTiny
from safetensors.torch import load_file
from tokenizers import Tokenizer

from drm.ranges import Range
from drm.sd3 import comfy_layout
from training.config import DataConfig, DRMConfig, ModelConfig, TrainConfig, argument
from training.data.decoders import PREFIX_VAE
from training.demo import text
from training.demo.export import PREFIX_MODEL, save, taesd_layout
from training.demo.fit import TIMED, WARM, device, once
from training.demo.generator import Generator
from training.demo.icons import LICENCE
from training.demo.learning import encode, make_autoencoder, make_detector, make_generator
from training.demo.rated_drawings import draw_all, write_encoded
from training.demo.rendered import render_all
from training.reward.reward_trainer import RESULT, RewardTrainer

Minutes = Annotated[float, Range(0, 10_080, above=True)]
SHARES = {"scenes": 0.03, "autoencoder": 0.06, "judge": 0.05, "rater": 0.05}
SHARES |= {"generator": 0.45, "drawings": 0.08, "reward": 0.28}
# from nothing an autoencoder learns colours last, and all that follows sees through it
FROM_NOTHING = SHARES | {"autoencoder": 0.18, "generator": 0.38, "reward": 0.23}
CHECKPOINT = "checkpoints/drm_demo_scenes_sd3.safetensors"
CLIP = "text_encoders/drm_demo_scenes_clip.safetensors"
REWARD = "drm/drm_demo_scenes.safetensors"
JUDGE = "judge/drm_demo_scenes_judge.safetensors"


def export_base(
    out: Path,
    network: AutoencoderTiny,
    generator: Generator,
    tokenizer: Tokenizer,
    statistics: dict[str, float],
) -> Path:
    """OUT/models with checkpoint, text encoder and judge; the checkpoint's path."""
    models = out / "models"
    transformer = generator.transformer
    layout = comfy_layout.to_comfy_layout(transformer.state_dict(), transformer.config)
    tensors = {PREFIX_MODEL + key: value for key, value in layout.items()}
    tensors |= {PREFIX_VAE + key: value for key, value in taesd_layout(network, statistics).items()}
    tensors = {key: value.cpu() for key, value in tensors.items()}
    title = {"format": "pt", "modelspec.title": "DRM demo, scenes", "license": LICENCE}
    save(tensors, models / CHECKPOINT, title)
    header = {
        "format": "drm-demo-clip",
        "version": "1",
        "config": json.dumps(generator.text_encoder.config.to_diff_dict()),
        "tokenizer": tokenizer.to_str(),
        "license": LICENCE,
    }
    words = {key: value.cpu() for key, value in generator.text_encoder.state_dict().items()}
    save(text.with_prefix(words), models / CLIP, header)
    judge = {"format": "drm-demo-scenes-judge", "license": LICENCE}
    save(load_file(out / "judge.safetensors"), models / JUDGE, judge)
    return models / CHECKPOINT


def reward_config(out: Path, base: Path, folder: Path, steps: int) -> DRMConfig:
    """By the recipe of the training commands; what is timed takes a folder of its own."""
    batch = 64 if device().type == "cpu" else 256
    return DRMConfig(
        version=1,
        name="DRM demo, scenes",
        licence=LICENCE,
        model=ModelConfig(base=str(base), num_kept=3, head_hidden=256, gradient_checkpointing=False),
        data=DataConfig(encoded=str(out / "encoded")),
        train=TrainConfig(
            out=str(folder),
            steps=steps,
            global_batch=batch,
            micro_batch=batch,
            learning_rate=4e-4,
            warmup=100,
            betas=(0.9, 0.99),
            ema=0.995,
            noise="independent",
            save_every=max(1, steps // 20),
            evaluate_every=max(1, steps // 4),
            held_out_pairs=2048,
            workers=0 if device().type == "cpu" else 8,
        ),
    )


def make_reward(out: Path, minutes: float, base: Path) -> Path:
    """The DRM in OUT/models."""
    path, plan = out / "models" / REWARD, out / "reward.json"
    if not path.exists():
        if not plan.exists():
            RewardTrainer(reward_config(out, base, out / "reward_timed", WARM + TIMED)).run()
            rows = (out / "reward_timed" / "log.jsonl").read_text().splitlines()[WARM:]
            rate = float(np.median([json.loads(row)["samples_per_second"] for row in rows]))
            batch = reward_config(out, base, out, 1).train.global_batch
            steps = {"steps": max(1, round(60 * minutes * rate / batch))}
            once(plan, lambda temporary: temporary.write_text(json.dumps(steps)))
        config = reward_config(out, base, out / "reward", json.loads(plan.read_text())["steps"])
        RewardTrainer(config).run()
        once(path, lambda temporary: shutil.copyfile(out / "reward" / RESULT, temporary))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=argument(Minutes), required=True)
    parser.add_argument("--out", type=Path, default=Path("runs/scenes"))
    parser.add_argument("--warm", type=Path, help="folder of warm starts")
    args = parser.parse_args()
    # Weights that die leave gradients too small for a normal float, and each costs a CPU 100 cycles. Threads
    # take the setting over when they start, so it comes first.
    torch.set_flush_denormal(True)
    shares = SHARES if args.warm else FROM_NOTHING
    minutes = {stage: share * args.minutes for stage, share in shares.items()}
    render_all(args.out, minutes["scenes"])
    network = make_autoencoder(args.out, minutes["autoencoder"], args.warm)
    make_detector(args.out, "judge", minutes["judge"], network)
    rater = make_detector(args.out, "rater", minutes["rater"], network)
    generator, tokenizer, statistics = make_generator(args.out, minutes["generator"], args.warm, network)
    base = export_base(args.out, network, generator, tokenizer, statistics)
    family = generator, tokenizer, network, statistics
    parts = draw_all(args.out, minutes["drawings"], *family, rater)

    def scaled(pictures: np.ndarray) -> torch.Tensor:
        return (encode(network, pictures).float() - statistics["mean"]) / statistics["std"]

    write_encoded(args.out, parts, scaled, generator, tokenizer)
    print(f"reward model -> {make_reward(args.out, minutes['reward'], base)}")


if __name__ == "__main__":
    main()
