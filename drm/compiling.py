"""torch.compile for the blocks of a walk, where it was measured to pay: on CUDA, where launches bound them.

Compiling takes the better part of a minute and saves a share of every later call (measured on an H200 at 512
x 512 and four candidates: 29 ms for 61, after 16 s). So a shape is first scored plainly; once that has cost
as many seconds as make compiling worth its price, plain and compiled blocks are timed on the same candidates
and the faster are kept. Where compiling fails (no compiler, no Triton, no memory) blocks stay plain, and the
log says so once.
"""

import functools
import logging
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .backbone import Compiled

# Compiling is taken to cost 40 s and to save a fifth.
WORTH_SECONDS = 200.0
REPEATS = 3

Run = Callable[[Compiled | None], Tensor]


def compile_step(backend: str = "inductor") -> Compiled:
    """A block's step, compiled; blocks of one structure share the result."""
    from .sd3.joint_block import step

    # Three structures of block for every shape are more than the eight variants dynamo allows by itself.
    dynamo = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, 64)
    return torch.compile(step, backend=backend, dynamic=False, fullgraph=True)


class CompiledSteps:
    """Which step a shape of candidates is walked in, None for the plain one. wanted: None decides by
    measuring, on CUDA alone; False is always plain; True compiles at the first call, on any device.
    """

    def __init__(self, wanted: bool | None = None, backend: str = "inductor") -> None:
        self.wanted, self.backend = wanted, backend
        self.chosen: dict[tuple, Compiled | None] = {}
        self.calls: dict[tuple, int] = {}
        self.seconds: dict[tuple, float] = {}

    def fitting(self, shape: tuple[int, ...], device: torch.device, run: Run) -> Compiled | None:
        """The step for candidates of this shape; run scores some of that shape, and may be timed."""
        if self.wanted is False or (self.wanted is None and device.type != "cuda"):
            return None
        if shape not in self.chosen:
            if self.wanted is None and not self._is_worth_it(shape, run):
                return None
            compiled = compile_step(self.backend)
            self.chosen[shape] = faster(compiled, run, measured=self.wanted is None)
        return self.chosen[shape]

    def _is_worth_it(self, shape: tuple[int, ...], run: Run) -> bool:
        self.calls[shape] = self.calls.get(shape, 0) + 1
        # The first calls of a process warm up.
        if self.calls[shape] == 3:
            self.seconds[shape] = seconds_of(run, None)
        return self.calls[shape] * self.seconds.get(shape, 0.0) > WORTH_SECONDS


def faster(compiled: Compiled, run: Run, measured: bool = True) -> Compiled | None:
    """The compiled step, unless it fails or, where that is measured, plain blocks take less time."""
    try:
        run(compiled)
        if not measured:
            return compiled
        times = {step: min(seconds_of(run, step) for _ in range(REPEATS)) for step in (compiled, None)}
        return min(times, key=times.get)
    except Exception as error:
        # Whatever a compiler stumbles over, the plain blocks have just worked.
        _tell_once(f"the reward model is not compiled: {type(error).__name__}: {str(error)[:200]}")
        return None


def seconds_of(run: Run, compiled: Compiled | None) -> float:
    """Wall time of one run, the GPU's work included."""
    _wait()
    begun = time.perf_counter()
    run(compiled)
    _wait()
    return time.perf_counter() - begun


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


@functools.cache
def _tell_once(message: str) -> None:
    logging.getLogger(__name__).warning(message)
