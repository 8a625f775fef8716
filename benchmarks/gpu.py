"""One card in a few minutes: the GPU tests, sampling and training at SD3.5-Medium's size with random weights.

    make bench-gpu                                 # benchmarks/results/gpu_<card>.json, at most four minutes
    python -m benchmarks.gpu --tiny --out x.json   # the same on a CPU with a network of two blocks, to try it

In a real ComfyUI in this process. Every way is warmed up at every size, then all take turns for three rounds
of 20 steps (12 at 1024 x 1024); ratios are medians over rounds of the round's own, to stock KSampler. Each
row is written as it comes, and what --minutes leave no room for is left out and named.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch

from benchmarks.reward_training import memory
from benchmarks.scoring import random_drm
from drm.backbone import BackboneConfig, sd35_medium_config
from drm.ranges import Range
from drm.sd3.comfy_layout import to_comfy_layout
from tools.comfy_inside import Pack, load_pack
from tools.comfy_server import ROOT
from training.config import argument
from training.engine.atomic import replace_atomically

TINY = BackboneConfig(
    num_kept=1,
    num_layers=2,
    num_attention_heads=2,
    joint_attention_dim=64,
    pooled_projection_dim=64,
    pos_embed_max_size=24,
)
SIZES = {512: 20, 1024: 12}
TINY_SIZES = {64: 3, 128: 2}
TEXT_TOKENS = 154
ROUNDS = 3
BRANCHING = {"noise_level": 0.7, "kind": "sde", "branch_start": 0.0, "branch_end": 1.0}
WAYS = {
    **{f"k = {k}": {"num_branches": k, "preset": "custom"} for k in (1, 2, 4, 6)},
    **{name: {"num_branches": 4, "preset": name} for name in ("fast", "balanced", "thorough")},
}


@dataclass
class Report:
    """The result's file, written again with every row."""

    path: Path
    facts: dict
    until: float
    rows: list[dict] = field(default_factory=list)

    def add(self, part: str, **row: object) -> None:
        self.rows.append({"part": part, **row})
        print(json.dumps(self.rows[-1]), flush=True)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({**self.facts, "rows": self.rows}, indent=1) + "\n"
        replace_atomically(self.path, lambda temporary: temporary.write_text(text))

    def has_time(self, part: str, seconds: float = 0.0) -> bool:
        """Whether a part that takes so long still fits; when not, a row says that it was left out."""
        if time.monotonic() + seconds < self.until:
            return True
        self.add(part, left_out="no time left")
        return False


class RandomText:
    """Stands for a text encoder: random embeddings of the right shape, the same for the same text."""

    def __init__(self, config: BackboneConfig) -> None:
        self.config = config

    def tokenize(self, text: str) -> str:
        return text

    def encode_from_tokens_scheduled(self, text: str) -> list:
        generator = torch.Generator().manual_seed(len(text))
        embeds = torch.randn(1, TEXT_TOKENS, self.config.joint_attention_dim, generator=generator)
        pooled = torch.randn(1, self.config.pooled_projection_dim, generator=generator)
        return [[embeds, {"pooled_output": pooled}]]


def gpu_tests(report: Report) -> None:
    """Runs the tests marked gpu in a process of their own."""
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    counts = dict(re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout))
    failed = re.findall(r"^FAILED (\S+)", done.stdout, re.MULTILINE)
    report.add("tests", **{name: int(count) for count, name in counts.items()}, failures=failed)


def load_models(pack: Pack, config: BackboneConfig, device: torch.device) -> tuple:
    """(MODEL, DRM) of random weights as the loaders of a prompt would give them."""
    import comfy.model_management as mm
    import comfy.sd
    from diffusers import SD3Transformer2DModel

    with torch.inference_mode(), device:
        transformer = SD3Transformer2DModel(**config.to_diffusers()).bfloat16()
        weights = to_comfy_layout(transformer.state_dict(), transformer.config)
        model = comfy.sd.load_diffusion_model_state_dict(weights)
        module = random_drm(config, device)
    patcher = pack.module("nodes.adapters").patcher_class()
    return model, patcher(module, load_device=device, offload_device=mm.unet_offload_device())


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated() / 2**30 if device.type == "cuda" else None


def seconds_of(work: Callable[[], object], device: torch.device) -> float:
    """Wall time of a call, the device's work included."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    wait()
    begun = time.perf_counter()
    work()
    wait()
    return time.perf_counter() - begun


def samplers(pack: Pack, model: object, drm: object, text: RandomText, size: int) -> dict[str, Callable]:
    """Calls that sample one picture in so many steps, by name."""
    import nodes

    positive, negative = (text.encode_from_tokens_scheduled(prompt) for prompt in ("a prompt", ""))
    latent = {"samples": torch.zeros(1, 16, size // 8, size // 8)}
    node = pack.module("nodes.sampler").StepwiseKSampler
    prompts = {"positive": positive, "negative": negative}

    def stock(steps: int) -> None:
        with torch.inference_mode():
            nodes.common_ksampler(
                model, 11, steps, 4.5, "euler", "simple", positive, negative, latent, denoise=1.0
            )

    def ours(settings: dict) -> Callable[[int], None]:
        inputs = {"seed": 11, "cfg": 4.5, "scheduler": "simple", "denoise": 1.0, "latent_image": latent}
        inputs |= {"model": model, "drm": drm, **prompts, **BRANCHING, **settings}

        def sample(steps: int) -> None:
            with torch.inference_mode():
                node.execute(steps=steps, **inputs)

        return sample

    return {"stock": stock, **{name: ours(settings) for name, settings in WAYS.items()}}


def table(report: Report, works: dict[str, Callable], size: int, steps: int, device: torch.device) -> None:
    """Every way's seconds, ratio to stock and peak memory at one size; rounds as time allows."""
    taken, peaks = {name: [] for name in works}, {}
    for work in works.values():
        work(2)
    for number in range(ROUNDS):
        last = sum(times[-1] for times in taken.values()) if number else 0.0
        if not report.has_time(f"sampling {size}, round {number + 1}", last):
            break
        for name, work in works.items():
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            taken[name].append(seconds_of(lambda work=work: work(steps), device))
            peaks[name] = peak_gib(device)
    for name, times in taken.items():
        if times:
            ratio = statistics.median(t / s for t, s in zip(times, taken["stock"], strict=True))
            row = {"way": name, "size": size, "steps": steps, "seconds": times, "ratio": ratio}
            report.add("sampling", **row, peak_gib=peaks[name])


def trainer(report: Report, pack: Pack, model: object, drm: object, text: RandomText, size: int) -> None:
    """One iteration of Step-GRPO LoRA Trainer, after the KSamplers above, as a prompt runs it."""
    device = model.load_device
    settings = {"width": size, "height": size, "steps": 4, "cfg": 4.5, "method": "step-grpo"}
    settings |= {"num_branches": 4, "prompts_per_iteration": 1, "iterations": 1, "learning_rate": 1e-4}
    settings |= {"rank": 16, "alpha": 16.0, "kl_weight": 0.0, "noise_level": 0.7, "seed": 0}
    settings |= {"save_every": 1, "preview_every": 1, "ema_decay": 0.0, "name": "bench", "lora_name": "none"}
    node = pack.module("nodes.trainer").StepGRPOLoRATrainer

    def train() -> None:
        with torch.inference_mode():
            node.execute(model=model, drm=drm, clip=text, prompts="one\nthree", **settings)

    try:
        seconds = seconds_of(train, device)
    except Exception as error:  # whatever fails on a card is the finding
        report.add("trainer", size=size, failed=f"{type(error).__name__}: {error}")
        return
    report.add("trainer", size=size, seconds=seconds, peak_gib=peak_gib(device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--tiny", action="store_true", help="a small network, on the CPU")
    parser.add_argument("--minutes", type=argument(Annotated[float, Range(0, 1440)]), default=4.0)
    parser.add_argument("--out", type=Path, help="benchmarks/results/gpu_<card>.json by default")
    parser.add_argument("--tests", action=argparse.BooleanOptionalAction, default=True)
    args = parser.parse_args()
    if not args.tiny and not torch.cuda.is_available():
        raise SystemExit("no CUDA device here: --tiny tries the script on a CPU")
    card = "cpu" if args.tiny else torch.cuda.get_device_name()
    out = args.out or Path(f"benchmarks/results/gpu_{re.sub(r'[^a-z0-9]+', '_', card.lower())}.json")
    facts = {"card": card, "torch": torch.__version__, "python": sys.version.split()[0]}
    report = Report(out, facts, time.monotonic() + 60 * args.minutes)
    if args.tests:
        gpu_tests(report)
    pack = load_pack(cpu=args.tiny)
    import folder_paths

    folder_paths.set_output_directory(str(ROOT / "output" / "bench_gpu"))
    config, sizes = (TINY, TINY_SIZES) if args.tiny else (sd35_medium_config(), SIZES)
    device, text = torch.device("cpu" if args.tiny else "cuda"), RandomText(config)
    model, drm = load_models(pack, config, device)
    for size, steps in sizes.items():
        if report.has_time(f"sampling {size}"):
            table(report, samplers(pack, model, drm, text, size), size, steps, device)
    if report.has_time("trainer"):
        trainer(report, pack, model, drm, text, min(sizes))
    del model, drm
    if report.has_time("memory", 30.0):
        report.add("memory", **memory(min(sizes), args.tiny))
    print(f"written to {out}")


if __name__ == "__main__":
    main()
