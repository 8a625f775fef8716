"""What Step-wise KSampler takes beside stock KSampler, in a real ComfyUI in this process, and its start-up.

    python -m benchmarks.comfyui_nodes            # benchmarks/results/comfyui_nodes.json

Stock KSampler (euler) and ours take turns on the demo model, 20 steps, CFG 1.5, one picture of 128 x 128;
each round's times are divided by the stock sampler's of the same round, and the median is given. Processor
time of this process, which other programs on the machine change least. The model runs as ComfyUI runs it on
a CPU, the reward model in the dtype that DRM Loader picks. Start-up: processor time of importing this pack
and asking it for its nodes, in a fresh process in which ComfyUI's own nodes are imported already.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from drm.ranges import Count
from tools.comfy_inside import load_pack
from tools.comfy_server import ROOT
from training.config import argument
from training.engine.atomic import replace_atomically

MODELS = ROOT / "models"
COMMON = {"seed": 11, "steps": 20, "cfg": 1.5, "scheduler": "simple", "denoise": 1.0}
BRANCHING = {"num_branches": 1, "noise_level": 0.7, "kind": "sde", "branch_start": 0.0, "branch_end": 1.0}
OURS = {
    "k = 1, no noise": {"num_branches": 1, "noise_level": 0.0, "preset": "custom"},
    "k = 1": {"num_branches": 1, "preset": "custom"},
    "fast": {"preset": "fast"},
    "balanced": {"preset": "balanced"},
    "thorough": {"preset": "thorough"},
}


def samplers() -> dict[str, Callable[[], object]]:
    """Calls that sample once: stock KSampler and each of OURS."""
    pack = load_pack()
    import comfy.sd
    import folder_paths

    import nodes

    comfy.utils.PROGRESS_BAR_ENABLED = False
    folder_paths.add_model_folder_path("drm", str(MODELS / "drm"))
    model, *_ = comfy.sd.load_checkpoint_guess_config(
        str(MODELS / "checkpoints/drm_demo_emoji_sd3.safetensors"), output_vae=False, output_clip=False
    )
    clip = pack.module("nodes.demo_clip").load_demo_clip(
        str(MODELS / "text_encoders/drm_demo_emoji_clip.safetensors")
    )
    drm = pack.module("nodes.adapters").load_drm_patcher("drm", "drm_demo_emoji.safetensors", "auto")
    positive, negative = (
        clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in ("pumpkin, fluent style", "")
    )
    latent = {"samples": torch.zeros(1, 16, 16, 16)}
    node = pack.module("nodes.sampler").StepwiseKSampler

    def stock() -> object:
        return nodes.common_ksampler(
            model,
            COMMON["seed"],
            COMMON["steps"],
            COMMON["cfg"],
            "euler",
            COMMON["scheduler"],
            positive,
            negative,
            latent,
            denoise=COMMON["denoise"],
        )

    def ours(settings: dict) -> Callable[[], object]:
        inputs = {**COMMON, **BRANCHING, **settings, "latent_image": latent}
        return lambda: node.execute(model=model, drm=drm, positive=positive, negative=negative, **inputs)

    return {"KSampler": stock} | {name: ours(settings) for name, settings in OURS.items()}


def take_turns(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median over rounds of each call's processor time over the first one's in that round."""
    ratios: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(rounds + 1):
        taken = {}
        for name, call in calls.items():
            begun = time.process_time()
            call()
            taken[name] = time.process_time() - begun
        if number:  # the first round warms up
            for name, seconds in taken.items():
                ratios[name].append(seconds / next(iter(taken.values())))
    return {name: statistics.median(found) for name, found in ratios.items()}


def start_up_milliseconds() -> float:
    """Of importing the pack and listing its nodes."""
    code = (
        "import asyncio, sys, time; from tools import comfy_inside as inside; Pack = inside.Pack; inside.Pack"
        " = lambda: None; inside.load_pack(); import nodes, server, comfy.samplers, comfy_api.latest,"
        " latent_preview; server.PromptServer(asyncio.new_event_loop()); begun = time.process_time();"
        " extension = asyncio.run(sys.modules[Pack().name].comfy_entrypoint()); found ="
        " asyncio.run(extension.get_node_list()); print(len(found), 'nodes took', 1000 * (time.process_time()"
        " - begun))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return float(told.split("took ")[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=argument(Count), default=15)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/comfyui_nodes.json"))
    args = parser.parse_args()
    with torch.inference_mode():
        ratios = take_turns(samplers(), args.rounds)
    start_up = statistics.median(start_up_milliseconds() for _ in range(3))
    result = {
        "device": "CPU",
        "threads": torch.get_num_threads(),
        "over_ksampler": ratios,
        "start_up_ms": start_up,
    }
    replace_atomically(args.out, lambda temporary: temporary.write_text(json.dumps(result, indent=1)))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
