"""What training a reward model costs: memory at the full SD3.5-Medium size, throughput, and where time goes.

    python -m benchmarks.reward_training memory      # computed anywhere; measured too where there is a GPU
    python -m benchmarks.reward_training throughput  # the demo model: samples/s, share outside the network

Computed memory: weights, gradients, Adam's two moments and the averaged weights of what learns, and for every
pair of a micro-batch what autograd keeps for the backward pass (counted on fake tensors of the real shapes,
in bfloat16 autocast, text of 77 + 256 tokens). With checkpointing one block is recomputed at a time, so its
share is added. Not in it: the CUDA context, workspaces, fragmentation; a fifth on top is prudent.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from drm import DRM, load_drm, preference
from drm.backbone import BackboneConfig, TruncatedSD3, sd35_medium_config
from drm.head import ConvHead
from training.config import ModelConfig, Resolution, argument
from training.data.batches import Batch, Mixture, Share, TrainingBatches, uniform_sigmas
from training.data.shards import EncodedPairs
from training.engine.atomic import replace_atomically
from training.grpo.saved_bytes import kept_for_backward
from training.reward.trainable import make_trainable

GIB = 2**30
# what is trained, gradient checkpointing, averaged weights; head alone keeps nothing of the backbone
KINDS = (
    ("full", True, True),
    ("full", True, False),
    ("full", False, True),
    ("lora", True, True),
    ("lora", False, True),
    ("head", False, True),
)
CARDS = (12, 16, 24, 48, 80)
MICRO_BATCHES = (1, 2, 4, 8, 16)
RESULTS = Path("benchmarks/results/reward_training.json")
TINY = BackboneConfig(
    num_kept=2, num_layers=3, num_attention_heads=2, joint_attention_dim=64, pooled_projection_dim=32
)


def network(config: BackboneConfig, part: str, checkpointing: bool, device: str) -> DRM:
    """A reward model of this shape with fresh weights, ready to train `part`, frozen weights in bfloat16."""
    with torch.device(device):
        drm = DRM(TruncatedSD3(config), ConvHead(config.width))
        settings = ModelConfig(base="none", train=part, gradient_checkpointing=checkpointing)
        return make_trainable(drm, settings, seed=0, frozen_dtype=torch.bfloat16)


def inputs(config: BackboneConfig, pairs: int, size: int, device: str) -> tuple[Tensor, ...]:
    """Both sides of so many pairs at size x size pixels: latents, sigma, prompt_embeds, pooled."""
    both, side = 2 * pairs, size // 8
    return (
        torch.randn(both, config.in_channels, side, side, device=device),
        torch.rand(both, device=device),
        torch.randn(both, 77 + 256, config.joint_attention_dim, device=device, dtype=torch.bfloat16),
        torch.randn(both, config.pooled_projection_dim, device=device, dtype=torch.bfloat16),
    )


def kept(config: BackboneConfig, part: str, checkpointing: bool, pairs: int, size: int) -> int:
    """Bytes autograd keeps from one forward pass of so many pairs."""
    drm = network(config, part, checkpointing, "meta")
    return kept_for_backward(drm, lambda: inputs(config, pairs, size, "cpu"), half=True)


def computed(
    config: BackboneConfig, part: str, checkpointing: bool, size: int, averaged: bool = True
) -> dict[str, float]:
    """GiB that do not grow with the micro-batch, and GiB a pair."""
    drm = network(config, part, checkpointing, "meta")
    weights = sum(p.numel() * p.element_size() for p in itertools.chain(drm.parameters(), drm.buffers()))
    learned = sum(p.numel() * 4 for p in drm.parameters() if p.requires_grad)
    one, two = (kept(config, part, checkpointing, pairs, size) for pairs in (1, 2))
    pair, fixed = two - one, 2 * one - two  # fixed: weights autocast to bfloat16
    if checkpointing and part != "head":
        whole = [kept(config, part, False, pairs, size) for pairs in (1, 2)]
        pair += (whole[1] - whole[0]) / config.num_kept
        fixed += max(0, 2 * whole[0] - whole[1]) / config.num_kept
    return {
        "learned_parameters": learned // 4,
        "fixed_gib": (weights + (4 if averaged else 3) * learned + fixed) / GIB,
        "pair_gib": pair / GIB,
    }


def step_once(drm: DRM, optimizer: torch.optim.Optimizer, batch: tuple[Tensor, ...], device: str) -> None:
    with torch.autocast(device, torch.bfloat16):
        win, lose = drm(*batch).float().chunk(2)
    preference.bradley_terry_loss(win, lose).backward()
    nn.utils.clip_grad_norm_([p for p in drm.parameters() if p.requires_grad], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def measured(
    config: BackboneConfig, part: str, checkpointing: bool, pairs: int, size: int, device: str
) -> dict:
    """Peak GiB and samples/s of training steps on a device; {"oom": True} when they do not fit."""
    cuda = device == "cuda"
    if cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    try:
        drm = network(config, part, checkpointing, device)
        learned = [p for p in drm.parameters() if p.requires_grad]
        averaged = [p.detach().clone() for p in learned]
        optimizer = torch.optim.AdamW(learned, lr=1e-5, fused=True)
        batch = inputs(config, pairs, size, device)
        seconds = timed(lambda: step_once(drm, optimizer, batch, device), repeats=5, cuda=cuda)
        del averaged
    except torch.OutOfMemoryError:
        return {"oom": True}
    found = {"samples_per_second": pairs / seconds}
    if cuda:
        found["peak_gib"] = torch.cuda.max_memory_allocated() / GIB
    return found


def timed(work: Callable[[], object], repeats: int, cuda: bool) -> float:
    """Median seconds of `work`, after two runs that warm up."""
    seconds = []
    for index in range(repeats + 2):
        if cuda:
            torch.cuda.synchronize()
        begun = time.perf_counter()
        work()
        if cuda:
            torch.cuda.synchronize()
        if index > 1:
            seconds.append(time.perf_counter() - begun)
    return sorted(seconds)[len(seconds) // 2]


def largest_fit(fixed: float, pair: float, card: int) -> int | None:
    """The largest micro-batch whose computed memory and a fifth fits a card of `card` GB."""
    room = card * 1e9 / GIB / 1.2
    fitting = [micro for micro in MICRO_BATCHES if fixed + micro * pair <= room]
    return max(fitting, default=None)


def memory(size: int, tiny: bool) -> dict:
    """The memory table, printed; on a CUDA GPU with measured rows beside the computed ones."""
    config = TINY if tiny else sd35_medium_config()
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    rows = []
    for part, checkpointing, averaged in KINDS:
        row = {"train": part, "checkpointing": checkpointing, "averaged": averaged}
        row |= computed(config, part, checkpointing, size, averaged)
        row["micro_batch_by_card"] = {
            str(card): largest_fit(row["fixed_gib"], row["pair_gib"], card) for card in CARDS
        }
        if averaged and (gpu or tiny):
            device = "cuda" if gpu else "cpu"
            row["measured"] = {
                str(pairs): measured(config, part, checkpointing, pairs, size, device)
                for pairs in ((1, 4) if gpu else (1,))
            }
        rows.append(row)
        fits = "  ".join(f"{card} GB: {micro or '-'}" for card, micro in row["micro_batch_by_card"].items())
        name = f"{part}{', checkpointing' * checkpointing}{'' if averaged else ', ema 0'}"
        print(f"{name:28s} {row['fixed_gib']:6.1f} GiB + {row['pair_gib']:.2f} a pair   {fits}", flush=True)
        if "measured" in row:
            print(f"{'':28s} measured on {gpu or 'CPU'}: {row['measured']}", flush=True)
    return {"size": size, "gpu": gpu, "text_tokens": 333, "rows": rows}


def throughput() -> dict:
    """Training and scoring rates on the demo model and pairs, and the share of a step outside the network."""
    pairs = EncodedPairs("runs/demo/encoded")
    rows = torch.argwhere(~pairs.columns["held_out"]).flatten()
    sources = [pairs.columns["source"][row] for row in rows.tolist()]
    data = TrainingBatches(
        pairs,
        Mixture(rows, sources, {}, 0),
        Share(rank=0, world=1, global_batch=32, micro_batch=32),
        start=0,
        steps=1000,
        sigmas=partial(uniform_sigmas, 0.0, 1.0),
        shared_noise=True,
        drop_t5=0.0,
        text_width=256,
        seed=0,
    )
    drm = load_drm("models/drm/drm_demo_emoji.safetensors")
    scoring = timed(lambda: score_batch(drm, data[3]), repeats=20, cuda=False)
    make_trainable(drm, ModelConfig(base="none", gradient_checkpointing=False), seed=0)
    optimizer = torch.optim.AdamW(drm.parameters(), lr=1e-5, fused=True)
    counter = itertools.count()
    reading = timed(lambda: data[next(counter)], repeats=40, cuda=False)
    batch = data[0]
    arguments = (
        batch.noisy,
        batch.sigma.repeat(2),
        batch.prompt_embeds.repeat(2, 1, 1),
        batch.pooled.repeat(2, 1),
    )
    network_only = timed(lambda: step_once(drm, optimizer, arguments, "cpu"), repeats=20, cuda=False)
    found = {
        "threads": torch.get_num_threads(),
        "train_samples_per_second": 32 / (network_only + reading),
        "scored_latents_per_second": 64 / scoring,
        "share_outside_network": reading / (network_only + reading),
    }
    print(json.dumps(found, indent=1))
    return found


@torch.no_grad()
def score_batch(drm: DRM, batch: Batch) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16):
        return drm.score(
            batch.noisy, batch.sigma.repeat(2), batch.prompt_embeds.repeat(2, 1, 1), batch.pooled.repeat(2, 1)
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("memory", "throughput"))
    parser.add_argument("--size", type=argument(Resolution), default=512, help="pixels a side")
    parser.add_argument("--tiny", action="store_true", help="a small network, to try the script on a CPU")
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    result = memory(args.size, args.tiny) if args.what == "memory" else throughput()
    if args.tiny:
        return
    whole = json.loads(args.results.read_text()) if args.results.exists() else {}
    whole[args.what] = result
    replace_atomically(args.results, lambda path: path.write_text(json.dumps(whole, indent=1)))


if __name__ == "__main__":
    main()
