"""Winner reuse: what scoring made of the candidate that won, the next step need not make again.

    scoring   blocks 1..n on (x'_j, sigma', positive)                   keeps what left block n
    next step blocks 1..n on (x'_win, sigma', positive) and the negative:  the positive rows are put in

Exact to rounding, and saves n / N of a conditional pass a step. Only where nothing else could make the two
passes differ; a first use is checked against the ordinary pass, and reuse ends where they differ.
"""

import dataclasses
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

import comfy.samplers
import torch
from torch import Tensor

if TYPE_CHECKING:
    from .trunk import Trunk

# What may stand in a sampler's transformer_options when nothing changes the network's passes.
_HARMLESS = {"sample_sigmas", "wrappers", "callbacks"}
_INTERFERES = ("model_function_wrapper", "sampler_calc_cond_batch_function", "context_handler")
_STEERS = ("area", "mask", "control", "gligen", "hooks", "timestep_start", "timestep_end")
# Relative to the spread of the denoised latents; half precision rounds coarsely.
_FLOAT32, _HALF = 1e-3, 5e-2
# network -> whether reuse gave what an ordinary pass gives
_CHECKED: WeakKeyDictionary[torch.nn.Module, bool] = WeakKeyDictionary()


class Reuse:
    """The policy of a run whose candidates `trunk` reads. denoise: (x, sigma) -> x0, as ComfyUI hands it.
    saved: conditional rows whose first blocks were not walked again.
    """

    def __init__(self, trunk: "Trunk", guider: object, denoise: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.trunk, self.guider, self.denoise, self.saved = trunk, guider, denoise, 0
        trunk.keeps = True

    def __call__(self, x: Tensor, sigma: Tensor) -> Tensor:
        cached = self._cached(x, float(sigma))
        self.trunk.kept.clear()
        if cached is None:
            return self.denoise(x, sigma)
        network = self.trunk.network
        if network not in _CHECKED:
            return self._checked(x, sigma, cached)
        self.saved += len(x)
        with _skipping(self.trunk, cached, len(x)):
            return self.denoise(x, sigma)

    def _cached(self, x: Tensor, sigma: float) -> object | None:
        """What left the last tapped block for every row of x, or None where that is not to be had."""
        if not _CHECKED.get(self.trunk.network, True) or not plain(self.trunk, self.guider, sigma):
            return None
        rows = [self._row(latent, sigma) for latent in x]
        return None if None in rows else _joined(rows)

    def _row(self, latent: Tensor, sigma: float) -> object | None:
        for kept in self.trunk.kept:
            if kept.sigma == sigma:
                for place, candidate in enumerate(kept.latents):
                    if torch.equal(candidate, latent):
                        return _map(kept.output, lambda part, place=place: part[place : place + 1])
        return None

    def _checked(self, x: Tensor, sigma: Tensor, cached: object) -> Tensor:
        whole = self.denoise(x, sigma)
        with _skipping(self.trunk, cached, len(x)):
            short = self.denoise(x, sigma)
        half = next(self.trunk.network.parameters()).dtype != torch.float32
        apart = float((short - whole).abs().max() / whole.std())
        _CHECKED[self.trunk.network] = good = apart < (_HALF if half else _FLOAT32)
        if not good:
            logging.info("DRM: scoring is not reused for this model, passes differ by %.1e", apart)
        # As every later run does, so that the first one gives the same bits.
        return short if good else whole


def plain(trunk: "Trunk", guider: object, sigma: float) -> bool:
    """Whether the guider's conditional pass is the scorer's: one prompt, the same, and nothing on the way."""
    options, conds = trunk.model_options, getattr(guider, "conds", {}).get("positive", [])
    inner = options.get("transformer_options", {})
    if getattr(type(guider), "predict_noise", None) is not comfy.samplers.CFGGuider.predict_noise:
        return False
    if any(name in options for name in _INTERFERES) or any(
        value for name, value in inner.items() if name not in _HARMLESS
    ):
        return False
    if any(named for kind in ("wrappers", "callbacks") for named in inner.get(kind, {}).values()):
        return False
    if any("forward" in vars(block) for block in trunk.blocks) or not _told(trunk.blocks[0]):
        return False
    if len(conds) != 1 or any(conds[0].get(name) is not None for name in _STEERS):
        return False
    ours, theirs = trunk.entry(sigma)["model_conds"], conds[0]["model_conds"]
    return ours.keys() == theirs.keys() and all(_same(ours[name].cond, theirs[name].cond) for name in ours)


def _told(block: torch.nn.Module) -> bool:
    """Whether a block is told which of its rows are conditional."""
    found = inspect.signature(block.forward).parameters.values()
    return any(given.name == "transformer_options" or given.kind == given.VAR_KEYWORD for given in found)


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.shape == b.shape and bool(torch.equal(a, b))
    return not isinstance(a, (Tensor, list)) and a == b


@contextmanager
def _skipping(trunk: "Trunk", cached: object, batch: int) -> Iterator[None]:
    """Within, the tapped blocks walk the rows of the negative prompt alone, and the last gives `cached` for
    the rest.
    """
    last = trunk.taps[-1]
    blocks = trunk.blocks[:last]
    try:
        for number, block in enumerate(blocks, start=1):
            given = cached if number == last else trunk.shapes[number]
            block.forward = _shorter(block.forward, given, batch)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _shorter(forward: Callable, given: object, batch: int) -> Callable:
    def run(*args: object, **kwargs: object) -> object:
        chunks = kwargs["transformer_options"]["cond_or_uncond"]
        total = len(chunks) * batch
        rows = [chunk * batch + i for chunk, kind in enumerate(chunks) if kind != 0 for i in range(batch)]
        places = [chunk * batch + i for chunk, kind in enumerate(chunks) if kind == 0 for i in range(batch)]
        if not places:
            return forward(*args, **kwargs)

        def pick(part: Tensor) -> Tensor:
            return part[rows] if part.ndim and len(part) == total else part

        done = forward(*_map(args, pick), **_map(kwargs, pick)) if rows else None
        return _put(given, places, done, rows, total)

    return run


def _put(given: object, places: list[int], done: object, rows: list[int], total: int) -> object:
    """One output of `total` rows from two."""
    if given is None:
        return None
    if not isinstance(given, Tensor):
        parts = [None] * len(given) if done is None else done
        return tuple(_put(a, places, b, rows, total) for a, b in zip(given, parts, strict=True))
    whole = given.new_empty(total, *given.shape[1:])
    whole[places] = given.expand(len(places), *given.shape[1:])
    if done is not None:
        whole[rows] = done
    return whole


def _joined(rows: list[object]) -> object:
    if rows[0] is None:
        return None
    if isinstance(rows[0], Tensor):
        return torch.cat(rows)
    return tuple(_joined(list(parts)) for parts in zip(*rows, strict=True))


def _map(tree: object, change: Callable[[Tensor], Tensor]) -> object:
    """The tree with every tensor of it changed; of dictionaries, what is no option of the whole pass."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, (tuple, list)):
        return type(tree)(_map(part, change) for part in tree)
    if isinstance(tree, dict):
        return {
            name: part if name == "transformer_options" else _map(part, change) for name, part in tree.items()
        }
    if dataclasses.is_dataclass(tree):
        named = {field.name: getattr(tree, field.name) for field in dataclasses.fields(tree)}
        return dataclasses.replace(tree, **_map(named, change))
    return tree
