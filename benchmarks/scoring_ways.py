"""The ways of scoring k siblings that benchmarks.scoring compares, and what is measured of them."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.branching import ratio
from drm import DRM
from drm.backbone import BackboneConfig, TruncatedSD3
from drm.compiling import CompiledSteps, compile_step
from drm.head import ConvHead
from drm.scoring import Scorer


@dataclasses.dataclass(frozen=True)
class Case:
    """Candidates (B * k, ...) of B prompts."""

    latents: Tensor
    item: Tensor
    embeds: Tensor
    pooled: Tensor

    @classmethod
    def draw(cls, drm: DRM, prompts: int, k: int, side: int, tokens: int, device: torch.device) -> Case:
        generator = torch.Generator().manual_seed(0)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator).to(device)

        return cls(
            normal(prompts * k, drm.in_channels, side, side),
            torch.arange(prompts, device=device).repeat_interleave(k),
            normal(prompts, tokens, drm.prompt_dim),
            normal(prompts, drm.pooled_dim),
        )

    @torch.no_grad()
    def naive(self, drm: DRM) -> Tensor:
        """The model's own forward."""
        return drm(self.latents, 0.5, self.embeds[self.item], self.pooled[self.item])

    def one_at_a_time(self, drm: DRM) -> Tensor:
        """Scores of candidates that never meet."""
        rows = zip(self.latents, self.embeds[self.item], self.pooled[self.item], strict=True)
        return torch.cat([drm.score(x[None], 0.5, text[None], pooled[None]) for x, text, pooled in rows])


def ways(drm: DRM, case: Case) -> dict[str, Callable[[], object]]:
    """Naive and shared, with plain blocks; every call at a sigma of its own."""
    scorer = Scorer(drm, case.embeds, case.pooled, compiled=CompiledSteps(False))
    sigmas = (0.5 + 1e-6 * number for number in itertools.count())
    return {
        "naive": lambda: case.naive(drm),
        "shared": lambda: scorer(case.latents, next(sigmas), case.item),
    }


def with_patches(drm: DRM, side: int) -> DRM:
    """A model of this one's shape and dtype with patches of another side, its weights random."""
    config, device = drm.backbone.config, drm.head.out.weight.device
    reach = config.patch_size * config.pos_embed_max_size
    changed = dataclasses.replace(config, patch_size=side, pos_embed_max_size=reach // side)
    with device:
        other = DRM(TruncatedSD3(changed).to(drm.backbone.dtype), ConvHead(drm.head.dim, drm.head.hidden))
    return other.requires_grad_(False).eval()


def tokens_ways(drm: DRM, case: Case, side: int) -> dict[str, Callable[[], object]]:
    """Naive and shared scoring with patches of that side."""
    found, name = ways(with_patches(drm, side), case), f"patches of {side}"
    return {f"{name}, {way}": found[way] for way in ("naive", "shared")}


def compiled_ways(drm: DRM, case: Case, device: torch.device) -> dict[str, Callable[[], object]]:
    """Shared scoring with compiled blocks."""
    step = compile_step("inductor" if device.type == "cuda" else "eager")

    def scored() -> Tensor:
        shared = drm.prepare(0.5, case.embeds, case.pooled)
        return drm.score_prepared(case.latents, shared, case.item, step)

    return {"compiled": scored}


def products(config: BackboneConfig, rows: int, side: int, tokens: int, device: torch.device) -> list:
    """(a, b) of every matrix product in the blocks' layers, for `rows` candidates."""
    width, image, text = config.width, rows * (side // config.patch_size) ** 2, rows * tokens
    shapes = []
    for block in range(config.num_kept):
        shapes += [(image, width, width)] * (8 if block in config.dual_attention_layers else 4)
        shapes += [(image, width, 4 * width), (image, 4 * width, width), *[(text, width, width)] * 3]
        if block + 1 < config.num_kept:
            shapes += [(text, width, width), (text, width, 4 * width), (text, 4 * width, width)]
    made = {
        shape: tuple(
            torch.randn(size, device=device, dtype=torch.bfloat16) for size in (shape[:2], shape[1:])
        )
        for shape in set(shapes)
    }
    return [made[shape] for shape in shapes]


def clocked(work: Callable[[], object], device: torch.device) -> Callable[[], float]:
    """The seconds of a call, a GPU's work included."""

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def timed() -> float:
        wait()
        begun = time.perf_counter()
        work()
        wait()
        return time.perf_counter() - begun

    return timed


def operations(work: Callable[[], object]) -> int:
    """Floating-point operations of a call, two for a multiply and add."""
    counter = FlopCounterMode(display=False)
    with counter:
        work()
    return counter.get_total_flops()


def peak_memory(work: Callable[[], object]) -> int:
    """Most bytes that a call holds beyond what is there before it."""
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    work()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def row_of(taken: dict[str, list[float]], counted: dict[str, int], count: int) -> dict:
    """Of every way: time and operations over naive's, and milliseconds and operations a candidate."""
    return {
        name: {
            "time_ratio": ratio(taken, name, "naive"),
            "operations_ratio": counted[name] / counted["naive"] if name in counted else None,
            "operations": counted[name] // count if name in counted else None,
            "milliseconds": 1000 * statistics.median(times) / count,
        }
        for name, times in taken.items()
    }
