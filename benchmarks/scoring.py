"""What scoring k siblings costs: shared against naive, and against the machine's matrix products.

    python -m benchmarks.scoring                      # the demo's reward model, about 3 minutes on one thread
    python -m benchmarks.scoring --rounds 9           # with a GPU also SD3.5-Medium's size, about 5 minutes

Naive is the model's own forward over all candidates, with their prompts repeated, in bfloat16 (and on the CPU
under autocast). Shared is what samplers use, drm.scoring.Scorer, at a new sigma every call, so that what is
shared is paid for each time. Patches of another side are those of a model with random weights: what coarse
tokens save. Operations are counted by torch's FlopCounterMode.

With a GPU, the reward model of SD3.5-Medium's full size with random weights in bfloat16: blocks plain
and compiled; operations a second against those of matrix products of the same shapes, one
after another (the layers of every block); peak memory over the weights. Contestants take turns, round by
round, and ratios are medians over rounds of the round's own.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.branching import in_turns, ratio
from benchmarks.growing import grow, without_gpu
from benchmarks.scoring_ways import (
    Case,
    clocked,
    compiled_ways,
    operations,
    peak_memory,
    products,
    row_of,
    tokens_ways,
    ways,
)
from drm import DRM, load_drm
from drm.backbone import BackboneConfig, TruncatedSD3, sd35_medium_config
from drm.head import ConvHead
from drm.ranges import Count
from training.config import argument
from training.demo.loop import bfloat16_autocast

RESULTS = Path("benchmarks/results/scoring.json")
DEMO = Path("models/drm/drm_demo_emoji.safetensors")
BRANCHES = (2, 4, 6)
SIZES = {"512x512": 64, "1024x1024": 128}
# CLIP's 77 tokens and T5's 256.
TEXT_TOKENS = 333
PARTS = {
    "matrix products": ("addmm", "mm", "bmm", "_linear_pointwise"),
    "attention": ("_scaled_dot_product",),
    "head's convolutions and norms": ("mkldnn_convolution", "native_group_norm"),
    "GELU": ("gelu",),
    "casts and copies": ("copy_", "cat"),
}


def profile(work: Callable[[], object]) -> dict[str, float]:
    """Shares of a call's own CPU time by kind of operation."""
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    work()
    with profiler(activities=[ProfilerActivity.CPU]) as found:
        work()
    spent = {
        event.key.split("::")[-1]: event.self_cpu_time_total
        for event in found.key_averages()
        if "::" in event.key
    }
    shares = dict.fromkeys([*PARTS, "the rest, element by element"], 0.0)
    for name, time_ in spent.items():
        kind = next((kind for kind, names in PARTS.items() if name.startswith(names)), list(shares)[-1])
        shares[kind] += time_ / sum(spent.values())
    return shares


def demo_rows(exact: DRM, half: DRM, prompts: int, rounds: int) -> Iterator[dict]:
    """The demo's reward model on the CPU, in bfloat16 (exact: in float32)."""
    device = torch.device("cpu")
    for k in BRANCHES:
        case = Case.draw(exact, prompts, k, 16, exact.metadata.get("text_length", 20), device)
        other = 2 if exact.backbone.config.patch_size > 2 else 4
        works = ways(exact, case) | tokens_ways(exact, case, other)
        counted = {name: operations(work) for name, work in works.items()}
        works = ways(half, case) | tokens_ways(half, case, other)
        contestants = {name: clocked(work, device) for name, work in works.items()}

        grid = exact.backbone.token_grid(16, 16)
        tokens = torch.randn(prompts * k, grid[0] * grid[1], exact.head.dim).bfloat16()
        contestants["naive, autocast"] = clocked(lambda case=case: autocast(exact, case), device)
        contestants["head alone"] = clocked(
            lambda tokens=tokens, grid=grid: exact.head(tokens, *grid), device
        )
        contestants["prepare alone"] = clocked(
            lambda case=case: half.prepare(0.5, case.embeds, case.pooled), device
        )
        in_turns(contestants, 1)
        row = {"k": k, **row_of(in_turns(contestants, rounds), counted, prompts * k)}
        tell(f"demo, k = {k}", row)
        yield row


def autocast(drm: DRM, case: Case) -> Tensor:
    with bfloat16_autocast("cpu"):
        return case.naive(drm)


def demo_facts(exact: DRM, half: DRM, prompts: int, rounds: int) -> dict:
    """Four candidates a prompt: how many at once, what bfloat16 changes, where the time goes."""
    four = Case.draw(exact, prompts, 4, 16, 20, torch.device("cpu"))
    prepared = [drm.prepare(0.5, four.embeds, four.pooled) for drm in (exact, half)]
    found = [
        (drm.score_prepared(four.latents, shared, four.item) - four.one_at_a_time(drm)).abs().max().item()
        for drm, shared in zip((exact, half), prepared, strict=True)
    ]
    return {
        "prompts": prompts,
        "candidates_at_once": parts_rows(half, four, rounds),
        "shared_minus_one_at_a_time": dict(zip(("float32", "bfloat16"), found, strict=True)),
        "profile": {
            "naive, autocast": profile(lambda: autocast(exact, four)),
            "shared": profile(ways(half, four)["shared"]),
        },
    }


def parts_rows(drm: DRM, case: Case, rounds: int) -> dict[str, float]:
    """Time a candidate by how many go through at once, over that of all at once."""
    shared, count = drm.prepare(0.5, case.embeds, case.pooled), len(case.item)

    def parted(size: int) -> Callable[[], object]:
        parts = list(zip(case.latents.split(size), case.item.split(size), strict=True))
        return lambda: [drm.score_prepared(x, shared, item) for x, item in parts]

    sizes = [size for size in (1, 2, 4, 8, 16, 24, 32, 64) if size < count]
    contestants = {str(size): clocked(parted(size), case.latents.device) for size in (*sizes, count)}
    in_turns(contestants, 1)
    taken = in_turns(contestants, rounds)
    return {name: ratio(taken, name, str(count)) for name in contestants}


def tell(what: str, row: dict) -> None:
    ratios = {
        name: figures["time_ratio"]
        for name, figures in row.items()
        if isinstance(figures, dict) and "time_ratio" in figures
    }
    cells = [f"{name} {value:.2f}" for name, value in ratios.items()]
    print(f"{what}, time over naive's: {', '.join(cells)}", flush=True)


def random_drm(config: BackboneConfig, device: torch.device) -> DRM:
    """Random weights in bfloat16."""
    default = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.bfloat16)
        with device:
            backbone = TruncatedSD3(config)
    finally:
        torch.set_default_dtype(default)
    with device:
        drm = DRM(backbone, ConvHead(config.width))
    return drm.requires_grad_(False).eval()


def large_rows(
    config: BackboneConfig, sizes: dict[str, int], tokens: int, rounds: int, where: str
) -> Iterator[dict]:
    """One prompt and k candidates at every size: times, operations a second and memory."""
    device = torch.device(where)
    drm = random_drm(config, device)
    for (size, side), k in itertools.product(sizes.items(), BRANCHES):
        case = Case.draw(drm, 1, k, side, tokens, device)
        works = ways(drm, case) | tokens_ways(drm, case, 2 * config.patch_size)
        counted = {name: operations(work) for name, work in works.items()}
        compiled = compiled_ways(drm, case, device)
        works |= compiled
        counted |= dict.fromkeys(set(works) - set(counted), counted["shared"])
        layers = products(config, k, side, tokens, device)
        counted["products"] = sum(2 * a.shape[0] * a.shape[1] * b.shape[1] for a, b in layers)
        contestants = {name: clocked(work, device) for name, work in works.items()}
        contestants["products"] = clocked(lambda layers=layers: [a @ b for a, b in layers], device)
        in_turns(contestants, 3)
        taken = in_turns(contestants, rounds)
        row = {"size": size, "k": k, **row_of(taken, counted, k)}
        per_second = {name: counted[name] / statistics.median(times) for name, times in taken.items()}
        row["teraflops"] = {name: value / 1e12 for name, value in per_second.items()}
        row["share_of_products"] = {name: per_second[name] / per_second["products"] for name in works}
        alone = case.one_at_a_time(drm)
        row["minus_one_at_a_time"] = {
            name: (works[name]() - alone).abs().max().item() for name in ("shared", *compiled)
        }
        if device.type == "cuda":
            row["peak_bytes"] = {name: peak_memory(works[name]) for name in ("naive", "shared")}
        tell(f"{size}, k = {k}", row)
        shares = ", ".join(f"{name} {share:.2f}" for name, share in row["share_of_products"].items())
        print(f"  operations a second over the products': {shares}", flush=True)
        yield row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--prompts", type=argument(Count), default=8)
    parser.add_argument("--rounds", type=argument(Count), default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--gpu-only", action="store_true", help="leave the CPU's rows as they are")
    args = parser.parse_args()
    if not args.gpu_only:
        exact = load_drm(args.model).requires_grad_(False)
        half = load_drm(args.model, dtype=torch.bfloat16).requires_grad_(False)
        facts = {
            "machine": platform.machine(),
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            **demo_facts(exact, half, args.prompts, args.rounds),
        }
        grow(args.out, "cpu", facts, rows=demo_rows(exact, half, args.prompts, args.rounds))
    if torch.cuda.is_available():
        facts = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
        rows = large_rows(sd35_medium_config(), SIZES, TEXT_TOKENS, args.rounds, "cuda")
        grow(args.out, "gpu", facts, rows=rows)
    elif args.gpu_only:
        parser.error("--gpu-only: torch sees no GPU here")
    else:
        without_gpu(args.out)
    print(f"written to {args.out}")


if __name__ == "__main__":
    main()
