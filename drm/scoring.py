"""A sampler's scorer: one DRM and a batch's prompts, called with candidates at one sigma after another.

    score(candidates (n, C, H, W), sigma, item_index (n,)) -> (n,)            item_index: the prompt of each

What siblings share is worked out once a sigma. Candidates go through in parts: on a CPU as many as its cache
likes, elsewhere all at once, and half as many whenever memory runs out. How they are parted changes nothing.
"""

from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from .backbone import Compiled, Prepared
from .compiling import CompiledSteps
from .model import DRM

# So many tokens at once keep what a block makes of them in a CPU's cache; more and fewer are slower.
CPU_TOKENS = 2048

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
        self.drm = drm
        self.parts = Parts(chunk, before, out_of_memory or is_out_of_memory, free)
        self.compiled = compiled or _COMPILED.setdefault(drm, CompiledSteps())
        self.read(prompt_embeds, pooled)

    def read(self, prompt_embeds: Tensor, pooled: Tensor) -> None:
        """Other prompts from here on."""
        self.prompt_embeds, self.pooled = prompt_embeds, pooled
        self._sigma: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """What candidates are turned into anyway, and may come in."""
        return self.drm.backbone.dtype

    def __call__(self, candidates: Tensor, sigma: float, item_index: Tensor) -> Tensor:
        """Scores (n,) on the candidates' device."""
        latents, prepared, items = self._inputs(candidates, sigma, item_index)

        def score(part: slice) -> Tensor:
            return self._score((latents[part], prepared, items[part]))

        return self.parts.run(len(latents), self._at_once(latents, prepared), score).to(candidates.device)

    def _inputs(self, candidates: Tensor, sigma: float, item_index: Tensor) -> Part:
        device = self.prompt_embeds.device
        if self._sigma != sigma:
            self._prepared = self.drm.prepare(sigma, self.prompt_embeds, self.pooled)
            self._sigma = sigma
        return candidates.to(device), self._prepared, item_index.to(device)

    def _score(self, part: Part) -> Tensor:
        latents, prepared, _ = part
        shape = (*latents.shape, prepared.context.shape[1])

        def run(compiled: Compiled | None) -> Tensor:
            return self.drm.score_prepared(*part, compiled)

        return run(self.compiled.fitting(shape, latents.device, run))

    def _at_once(self, latents: Tensor, prepared: Prepared) -> int:
        """Candidates of one part, if memory allows and there are so many."""
        if latents.device.type != "cpu":
            return len(latents)
        height, width = self.drm.backbone.token_grid(*latents.shape[-2:])
        return max(1, CPU_TOKENS // (height * width + prepared.context.shape[1]))


class Parts:
    """Candidates through a network part by part, half as many from then on whenever memory runs out.

    largest: most candidates of a part, None for no limit. The rest: see Scorer.
    """

    def __init__(
        self,
        largest: int | None,
        before: Callable[[], object] | None,
        out_of_memory: Callable[[Exception], bool],
        free: Callable[[], object] | None,
    ) -> None:
        self.largest, self.before, self.out_of_memory, self.free = largest, before, out_of_memory, free

    def run(self, count: int, at_once: int, score: Callable[[slice], Tensor]) -> Tensor:
        """score(part) -> (its length,) of count candidates in parts of at_once, put together (count,)."""
        done, found = 0, []
        while done < count:
            size = min(at_once, self.largest or at_once, count - done)
            if self.before is not None:
                self.before()
            try:
                found.append(score(slice(done, done + size)))
                done += size
                continue
            except Exception as error:
                if size == 1 or not self.out_of_memory(error):
                    raise
            # Outside of the except clause, where the error's frames still hold what did not fit.
            self.largest = (size + 1) // 2
            if self.free is not None:
                self.free()
        return torch.cat(found)


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
