"""A sampler's scorer: one DRM and a batch's prompts, called with candidates at one sigma after another.

    score(candidates (n, C, H, W), sigma, item_index (n,)) -> (n,)            item_index: the prompt of each
    score.staged(..., go_on) -> scores (n,), depths (n,)                      stops early where go_on says so

What siblings share is worked out once a sigma. Candidates go through in parts: on a CPU as many as its cache
likes, elsewhere all at once, and half as many whenever memory runs out. How they are parted changes nothing.
"""

from collections.abc import Callable, Sequence
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .compiling import CompiledSteps
from .model import DRM, GoOn, See
from .preference import lead_at
from .prepared import PLAIN, Prepared, Rows, Steps

# So many tokens at once keep what a block makes of them in a CPU's cache; more and fewer are slower.
CPU_TOKENS = 2048

T = TypeVar("T")
Part = tuple[Tensor, Prepared, Tensor]
# What was compiled for a model serves every run with it.
_COMPILED: WeakKeyDictionary[DRM, CompiledSteps] = WeakKeyDictionary()


class Scorer:
    """prompt_embeds (B, T, D) and pooled (B, P) of the batch, on the DRM's device; `read` changes them.

    chunk: most candidates at once. compiled: which blocks are compiled, measured where not given. before:
    called before every part, raises to cancel. out_of_memory tells such errors, free is called after one.
    """

    def __init__(
        self,
        drm: DRM,
        prompt_embeds: Tensor,
        pooled: Tensor,
        *,
        chunk: int | None = None,
        compiled: CompiledSteps | None = None,
        before: Callable[[], object] | None = None,
        out_of_memory: Callable[[Exception], bool] | None = None,
        free: Callable[[], object] | None = None,
    ) -> None:
        self.drm, self.largest, self.before, self.free = drm, chunk, before, free
        self.out_of_memory = out_of_memory or is_out_of_memory
        self.compiled = compiled or _COMPILED.setdefault(drm, CompiledSteps())
        self.read(prompt_embeds, pooled)

    def read(self, prompt_embeds: Tensor, pooled: Tensor) -> None:
        """Other prompts from here on."""
        self.prompt_embeds, self.pooled = prompt_embeds, pooled
        self._sigma: float | None = None

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks before each head; the last is the whole model's."""
        return self.drm.depths

    @property
    def dtype(self) -> torch.dtype:
        """What candidates are turned into anyway, and may come in."""
        return self.drm.backbone.dtype

    @property
    def calibration(self) -> dict[str, list[float]] | None:
        """Mean and std of real pictures' scores by sigma, where the file has them."""
        return self.drm.metadata.get("calibration")

    def decisive(self, depth: int, sigma: float) -> float | None:
        """How far behind the leader at that depth a candidate is out; None where nobody has measured it."""
        table = (self.drm.metadata.get("decisive") or {}).get(str(depth))
        scale = (self.drm.metadata.get("shown") or {}).get("scale", 1.0)
        return None if table is None else scale * lead_at(sigma, table)

    def __call__(self, candidates: Tensor, sigma: float, item_index: Tensor) -> Tensor:
        latents, prepared, items = self._inputs(candidates, sigma, item_index)

        def see(rows: Tensor) -> Tensor:
            part = latents[rows], prepared, items[rows]
            return self._score(part, self._steps(part, graphs=True))

        rows = torch.arange(len(latents), device=latents.device)
        return torch.cat(self._in_parts(see, rows, latents, prepared)).to(candidates.device)

    def staged(
        self, candidates: Tensor, sigma: float, item_index: Tensor, go_on: GoOn
    ) -> tuple[Tensor, Tensor]:
        """Scores (n,) and depths (n,) of DRM.score_staged; go_on(depth, scores (n,)) -> (n,) who stays."""
        latents, prepared, items = self._inputs(candidates, sigma, item_index)

        def in_parts(see: See, rows: Tensor) -> list[tuple[Rows, Tensor]]:
            def fixed(piece: Tensor) -> tuple[Rows, Tensor]:
                count = len(piece)
                if not self.compiled.is_on(latents.device):
                    return see(piece, PLAIN)
                # The number of survivors varies: rounded up to a power of two, few shapes are compiled.
                size = 1 << (count - 1).bit_length()
                some = latents[:1].expand(size, -1, -1, -1), prepared, items[:1].expand(size)
                filled = torch.cat((piece, piece[-1:].expand(size - count)))
                part, scores = see(filled, self._steps(some, graphs=False))
                return part.take(slice(count)), scores[:count]

            return self._in_parts(fixed, rows, latents, prepared)

        found = self.drm.score_staged(latents, prepared, items, go_on, in_parts)
        return tuple(column.to(candidates.device) for column in found)

    def _inputs(self, candidates: Tensor, sigma: float, item_index: Tensor) -> Part:
        device = self.prompt_embeds.device
        if self._sigma != sigma:
            self._prepared = self.drm.prepare(sigma, self.prompt_embeds, self.pooled)
            self._sigma = sigma
        return candidates.to(device), self._prepared, item_index.to(device)

    def _score(self, part: Part, steps: Steps) -> Tensor:
        if steps is not PLAIN:
            torch.compiler.cudagraph_mark_step_begin()
        return self.drm.score_prepared(*part, steps)

    def _steps(self, part: Part, *, graphs: bool) -> Steps:
        latents, prepared, _ = part
        shape = (*latents.shape, prepared.context.shape[1])
        return self.compiled.fitting(shape, latents.device, lambda steps: self._score(part, steps), graphs)

    def _in_parts(
        self, work: Callable[[Tensor], T], rows: Tensor, latents: Tensor, prepared: Prepared
    ) -> list[T]:
        """work(piece) of pieces of rows (n,), in order; a piece that does not fit is halved."""
        at_once = len(rows)
        if latents.device.type == "cpu":
            height, width = self.drm.backbone.token_grid(*latents.shape[-2:])
            at_once = max(1, CPU_TOKENS // (height * width + prepared.context.shape[1]))
        done, found = 0, []
        while done < len(rows):
            size = min(at_once, self.largest or at_once, len(rows) - done)
            if self.before is not None:
                self.before()
            try:
                found.append(work(rows[done : done + size]))
                done += size
                continue
            except Exception as error:
                if size == 1 or not self.out_of_memory(error):
                    raise
            # Outside of the except clause, where the error's frames still hold what did not fit.
            self.largest = (size + 1) // 2
            if self.free is not None:
                self.free()
        return found


def check_finite(scores: Tensor, sigma: float, rows: Sequence[int] | None = None) -> None:
    """Raises ValueError for NaN or infinity in scores (B, ...). rows: the batch rows they are of."""
    if bool(scores.isfinite().all()):
        return
    place = (~scores.isfinite()).nonzero()[0].tolist()
    row = place[0] if rows is None else rows[place[0]]
    raise ValueError(
        f"the scorer returned {scores[tuple(place)].item()} for batch item {row} at sigma {sigma:.4g}: the"
        " reward model overflowed or got bad input; try it in float32"
    )


def is_out_of_memory(error: Exception) -> bool:
    """Whether a device, or the memory of a CPU, was too small."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
