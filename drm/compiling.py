"""torch.compile and CUDA graphs for the blocks of a walk, where they were measured to pay.

Compiling takes the better part of a minute and saves a share of every later call. So on CUDA a shape is first
scored plainly; once that has cost as many seconds as make compiling worth its price, plain, compiled and
graph-captured blocks are timed on the same candidates and the fastest is kept. Where compiling fails (no
compiler, no Triton, no memory) blocks stay plain, and the log says so once.
"""

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .prepared import PLAIN, Steps, image_step, text_step

# Compiling is taken to cost 40 s and to save a fifth.
WORTH_SECONDS = 200.0
REPEATS = 3

Run = Callable[[Steps], Tensor]


def compile_steps(mode: str | None = None, backend: str = "inductor") -> Steps:
    """The two parts a block is walked in, compiled; blocks of one structure share the result.

    mode "reduce-overhead" captures CUDA graphs: what such a walk returns lasts until the next one begins.
    """
    options = {"backend": backend, "dynamic": False, "fullgraph": True}
    if mode is not None:
        options["mode"] = mode
    return Steps(torch.compile(image_step, **options), torch.compile(text_step, **options))


class CompiledSteps:
    """Which steps a shape of candidates is walked in. wanted: None decides by measuring, on CUDA alone; False
    is always plain; True compiles at the first call, on any device.
    """

    def __init__(self, wanted: bool | None = None, backend: str = "inductor") -> None:
        self.wanted, self.backend = wanted, backend
        self.chosen: dict[tuple, Steps] = {}
        self.calls: dict[tuple, int] = {}
        self.seconds: dict[tuple, float] = {}

    def is_on(self, device: torch.device) -> bool:
        """Whether anything but plain steps may come out."""
        return self.wanted or (self.wanted is None and device.type == "cuda")

    def fitting(self, shape: tuple[int, ...], device: torch.device, run: Run, graphs: bool = True) -> Steps:
        """The steps for candidates of this shape; run scores some of that shape, and may be timed.

        graphs: whether the walk's result is used up before the next begins, as CUDA graphs need it.
        """
        key = (*shape, graphs)
        if not self.is_on(device):
            return PLAIN
        if key not in self.chosen:
            if self.wanted is None and not self._is_worth_it(key, run):
                return PLAIN
            ways = {} if self.wanted else {"plain": PLAIN}
            ways["compiled"] = compile_steps(backend=self.backend)
            if graphs and device.type == "cuda":
                ways["in CUDA graphs"] = compile_steps("reduce-overhead", self.backend)
            self.chosen[key] = fastest(ways, run)
        return self.chosen[key]

    def _is_worth_it(self, key: tuple, run: Run) -> bool:
        self.calls[key] = self.calls.get(key, 0) + 1
        # The first calls of a process warm up.
        if self.calls[key] == 3:
            self.seconds[key] = seconds_of(run, PLAIN)
        return self.calls[key] * self.seconds.get(key, 0.0) > WORTH_SECONDS


def fastest(ways: dict[str, Steps], run: Run) -> Steps:
    """The steps that took `run` the least time; plain ones where nothing else works."""
    times = {}
    for name, steps in ways.items():
        try:
            run(steps)
            times[name] = min(seconds_of(run, steps) for _ in range(REPEATS))
        except Exception as error:
            # Whatever a compiler stumbles over, the plain blocks have just worked.
            _tell_once(f"the reward model is not {name}: {type(error).__name__}: {str(error)[:200]}")
    return ways[min(times, key=times.get)] if times else PLAIN


def seconds_of(run: Run, steps: Steps) -> float:
    """Wall time of one run, the GPU's work included."""
    _wait()
    begun = time.perf_counter()
    run(steps)
    _wait()
    return time.perf_counter() - begun


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@functools.cache
def _tell_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
