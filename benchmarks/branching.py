"""What branching costs: the CUDA kernel against the card's own copy, and plain torch against a CPU's step.

    python -m benchmarks.branching                       # about a minute, and another on a GPU
    python -m benchmarks.branching --batches 1 64        # a GPU's batch sizes

On a GPU, at SD3.5's latents for 512x512 and 1024x1024: bytes a second of the fused kernel (x and velocity
read in float32, k bfloat16 candidates written, one pass), as a share of a copy that moves as many bytes and
of the card's largest copy; the time of the twin in plain torch over the kernel's; and the second launch, the
winner's float32 state. Calls go round a ring of tensors larger than the cache, in a CUDA graph, so that the
host's launching is not what is measured; `eager` is the time with it.

Everywhere: what `branch_step` adds to one step of the demo's plain sampling (CFG) on one thread of the CPU,
and how much faster the CPU's noise is than Philox in torch's int64, which other devices use. This part counts
the process's CPU time, which other work on the machine disturbs least.

Contestants take turns, round by round; figures are medians over rounds of the round's own ratio. The file
keeps the part that this machine cannot measure.
"""

from __future__ import annotations

import argparse
import itertools
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from benchmarks.growing import grow, without_gpu
from drm import branching, noise
from drm.branching import branch_step, candidate_noise
from drm.flow import schedule, velocity_from_denoised
from drm.ranges import Count
from training.config import argument
from training.demo.export import load_family
from training.demo.generator import SHIFT, guided_denoise, initial_noise

RESULTS = Path("benchmarks/results/branching.json")
LATENTS = {"512x512": (16, 64, 64), "1024x1024": (16, 128, 128)}
BRANCHES = (2, 4, 6)
DRAW = {"seed": 2**40 + 7, "step": 3, "noise_level": 0.7, "kind": "sde", "noise_scale": 1.0}
# A ring of tensors of this many bytes leaves nothing of use in any card's cache.
RING_BYTES = 512 * 2**20
CPU_LATENT, CPU_STEPS = (16, 16, 16), 20


def in_turns(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of every contestant, measured one after the other in every round."""
    taken: dict[str, list[float]] = {name: [] for name in contestants}
    for _ in range(rounds):
        for name, contestant in contestants.items():
            taken[name].append(contestant())
    return taken


def ratio(taken: dict[str, list[float]], above: str, below: str) -> float:
    """Median over rounds of one contestant's time over another's."""
    pairs = zip(taken[above], taken[below], strict=True)
    return statistics.median(a / b for a, b in pairs)


def on_clock(
    call: Callable[[], object], repeats: int = 1, before: Callable[[], object] | None = None
) -> Callable[[], float]:
    """CPU seconds of one call. before: done first and not counted, as a network leaves caches cold."""

    def timed() -> float:
        if before:
            before()
        begun = time.process_time()
        for _ in range(repeats):
            call()
        return (time.process_time() - begun) / repeats

    return timed


def on_events(call: Callable[[], object], calls: int) -> Callable[[], float]:
    """Seconds of one of the `calls` calls that `call` makes on the GPU, by its own clock."""

    def timed() -> float:
        begun, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begun.record()
        call()
        ended.record()
        ended.synchronize()
        return begun.elapsed_time(ended) / 1000 / calls

    return timed


def graphed(calls: list[Callable[[], object]]) -> tuple[Callable[[], object], list]:
    """The calls as one CUDA graph, and what they returned, which must live as long."""
    for call in calls[:2]:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = [call() for call in calls]
    return graph.replay, [graph, kept]


def copied(total: int, ring: int) -> Callable[[], float]:
    """A copy that moves `total` bytes, half read and half written."""
    pairs = [torch.empty(2, max(1, total // 8), device="cuda") for _ in range(ring)]
    replay, kept = graphed([lambda pair=pair: pair[1].copy_(pair[0]) for pair in pairs])
    timed = on_events(replay, ring)
    timed.kept = kept
    return timed


def kernel_row(kernel, shape: tuple[int, ...], batch: int, k: int, rounds: int) -> dict:
    """One size on the GPU."""
    elements = batch * shape[0] * shape[1] * shape[2]
    moved = elements * (4 + 4 + 2 * k)
    ring = max(2, min(256, RING_BYTES // moved + 1))
    sigmas = schedule(50).cuda()
    settings = {**DRAW, "items": list(range(batch)), "branches": list(range(k)), "dtype": torch.bfloat16}
    inputs = [torch.randn(2, batch, *shape, device="cuda") for _ in range(ring)]
    at = (sigmas[3], sigmas[4], sigmas[1])
    winner = torch.zeros(batch, dtype=torch.long, device="cuda")

    def drawn(pair: torch.Tensor, draw: Callable = kernel.branch_step) -> branching.Candidates:
        return draw(pair[0], pair[1], at, **settings)

    replay, kept = graphed([lambda pair=pair: drawn(pair) for pair in inputs])
    states, kept_states = graphed([lambda one=one: one.state(winner) for one in kept[1]])
    some = inputs[: min(8, ring)]
    contestants = {
        "kernel": on_events(replay, ring),
        "copy": copied(moved, ring),
        "state": on_events(states, ring),
        "state copy": copied(elements * 12, ring),
        "eager": on_events(lambda: [drawn(pair) for pair in some], len(some)),
        "twin": on_events(lambda: [drawn(pair, branching._twin) for pair in some], len(some)),
    }
    in_turns(contestants, 2)
    taken = in_turns(contestants, rounds)
    seconds = {name: statistics.median(times) for name, times in taken.items()}
    del kept, kept_states
    return {
        "batch": batch,
        "k": k,
        "bytes": moved,
        "gigabytes_a_second": moved / seconds["kernel"] / 1e9,
        "share_of_equal_copy": ratio(taken, "copy", "kernel"),
        "state_share_of_equal_copy": ratio(taken, "state copy", "state"),
        "twin_over_kernel": ratio(taken, "twin", "eager"),
        "microseconds": {name: 1e6 * value for name, value in seconds.items()},
    }


def on_gpu(batches: list[int], rounds: int) -> tuple[dict, Iterator[dict]]:
    """The card, and the rows of the kernel's table as they come."""
    kernel = branching._kernel(torch.device("cuda", torch.cuda.current_device()))
    if kernel is None:
        raise SystemExit("the Triton kernel does not run on this GPU: the warning above says why")
    largest = copied(2 * 2**30, 2)
    in_turns({"copy": largest}, 3)
    copy_rate = 2 * 2**30 / statistics.median(in_turns({"copy": largest}, rounds)["copy"])

    def rows() -> Iterator[dict]:
        for (size, shape), batch, k in itertools.product(LATENTS.items(), batches, BRANCHES):
            row = {"size": size, **kernel_row(kernel, shape, batch, k, rounds)}
            row["share_of_largest_copy"] = row["gigabytes_a_second"] * 1e9 / copy_rate
            print(
                f"{size} batch {batch} k {k}: {row['gigabytes_a_second']:.0f} GB/s,"
                f" {row['share_of_equal_copy']:.2f} of an equal copy, {row['share_of_largest_copy']:.2f} of"
                f" the largest; the twin takes {row['twin_over_kernel']:.1f} times as long"
            )
            yield row

    card = {"card": torch.cuda.get_device_name(), "torch": torch.__version__}
    return {**card, "copy_gigabytes_a_second": copy_rate / 1e9}, rows()


def step_rows(models: Path, rounds: int) -> Iterator[dict]:
    """branch_step against one plain step of the demo's generator, CFG included, on the CPU."""
    family, sigmas = load_family(models), schedule(CPU_STEPS, SHIFT)
    for batch in (1, 8):
        denoise = guided_denoise(family.generator, family.tokenizer, ["a cat"] * batch, 4.5)
        x = initial_noise(list(range(batch)))
        velocity = torch.randn_like(x)

        def plain(denoise=denoise, x=x) -> torch.Tensor:
            slope = velocity_from_denoised(x, denoise(x, sigmas[5]), sigmas[5].expand(len(x)))
            return x + slope * (sigmas[6] - sigmas[5])

        steps = itertools.count()

        def branched(k: int, x=x, velocity=velocity, steps=steps) -> branching.Candidates:
            address = {"seed": 3, "step": next(steps) // 4, "items": range(len(x)), "branches": range(k)}
            return branch_step(x, velocity, sigmas[5], sigmas[6], **address, sigma_max=sigmas[1])

        names = {f"k = {k}": on_clock(lambda k=k: branched(k), before=plain) for k in (1, 2, 4, 6)}
        contestants = {"plain": on_clock(plain), **names}
        in_turns(contestants, 2)
        taken = in_turns(contestants, rounds)
        for k in (1, 2, 4, 6):
            # Of means, because one step in several draws the noise of all.
            share = statistics.mean(taken[f"k = {k}"]) / statistics.median(taken["plain"])
            print(f"CPU, demo, batch {batch}, k = {k}: branching is {100 * share:.2f} % of a plain step")
            yield {"batch": batch, "k": k, "share_of_plain_step": share}


def torch_noise(shape: tuple[int, ...], batch: int, k: int) -> torch.Tensor:
    """The same noise by the way of devices without the kernel: Philox in int64, all at once."""
    counters = torch.arange((shape[0] * shape[1] * shape[2] + 3) // 4)
    item = torch.arange(batch).repeat_interleave(k).unsqueeze(1)
    branch = torch.arange(k).repeat(batch).unsqueeze(1)
    return noise._normals(counters, torch.tensor([5]), item, branch, 3)


def noise_rows(rounds: int) -> Iterator[dict]:
    """The CPU's noise against plain torch's."""
    for shape, batch, k in ((CPU_LATENT, 1, 1), (CPU_LATENT, 8, 4), (LATENTS["512x512"], 1, 4)):

        def here(shape=shape, batch=batch, k=k) -> torch.Tensor:
            return candidate_noise(shape, 3, 5, range(batch), range(k))

        def there(shape=shape, batch=batch, k=k) -> torch.Tensor:
            return torch_noise(shape, batch, k)

        if not torch.equal(here().flatten(), there().flatten()):
            raise SystemExit("the CPU's noise is not plain torch's")
        contestants = {"here": on_clock(here, 5), "torch": on_clock(there, 5)}
        in_turns(contestants, 2)
        taken = in_turns(contestants, rounds)
        count = batch * k * shape[0] * shape[1] * shape[2]
        row = {
            "shape": shape,
            "batch": batch,
            "k": k,
            "speedup": ratio(taken, "torch", "here"),
            "nanoseconds_a_normal": 1e9 * statistics.median(taken["here"]) / count,
        }
        print(
            f"CPU, noise of {shape}, batch {batch}, k = {k}: {row['nanoseconds_a_normal']:.1f} ns a normal,"
            f" {row['speedup']:.1f} times as fast as int64 in torch"
        )
        yield row


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--models", type=Path, default=Path("models"))
    parser.add_argument("--batches", type=argument(Count), nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=argument(Count), default=15)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--gpu-only", action="store_true", help="leave the CPU's rows as they are")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.gpu_only:
        facts = {"machine": platform.machine(), "threads": 1, "torch": torch.__version__}
        step, noise = step_rows(options.models, options.rounds), noise_rows(options.rounds)
        grow(options.out, "cpu", facts, step=step, noise=noise)
    if torch.cuda.is_available():
        facts, rows = on_gpu(options.batches, options.rounds)
        grow(options.out, "gpu", facts, rows=rows)
    elif options.gpu_only:
        parser.error("--gpu-only: torch sees no GPU here")
    else:
        without_gpu(options.out)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
