"""ComfyUI's own sampling as the policy of drm.grpo, with gradients.

    denoised = guider(x, sigma)          CFG, patches and wrappers of the MODEL apply, as in any sampling
    velocity = (x - denoised) / sigma

A guider is run on a sampler that samples nothing: inside it the MODEL and the DRMs are in memory together and
the function given may call the network as it likes. The unconditional branch of CFG leaves no graph.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management as mm
import comfy.model_patcher
import comfy.samplers
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from .. import adapters, trunk
from ..inside_sampling import InsideSampling

CALCULATE = "sampler_calc_cond_batch_function"
ATTENTION = "optimized_attention_override"
OUT_OF_PLACE = {Tensor.add_: Tensor.add, Tensor.mul_: Tensor.mul}


class ComfyPolicy:
    """The network with its prompts, for as long as the sampling lasts. `smaller()` makes it spare memory."""

    def __init__(
        self, guider: comfy.samplers.CFGGuider, extra_args: dict, network: nn.Module, has_frames: bool
    ) -> None:
        self.guider, self.extra_args, self.network = guider, extra_args, network
        self.blocks, self.has_frames = trunk.blocks_of(guider.inner_model), has_frames
        self.device = guider.model_patcher.load_device
        self.largest: int | None = None
        self.recompute = False

    def of(self, prompt: int) -> Callable[[Tensor, float], Tensor]:
        """(x (B, C, H, W), sigma) -> velocity (B, C, H, W) for one prompt."""
        return lambda x, sigma: self.velocity(prompt, x, sigma)

    def velocity(self, prompt: int, x: Tensor, sigma: float) -> Tensor:
        parts = x.split(self.largest or len(x))
        if not torch.is_grad_enabled():
            return torch.cat([self._velocity(prompt, part, sigma) for part in parts])
        if len(parts) == 1:
            return self._learning(prompt, x, sigma)
        return torch.cat(
            [checkpoint(self._learning, prompt, part, sigma, use_reentrant=False) for part in parts]
        )

    def _learning(self, prompt: int, x: Tensor, sigma: float) -> Tensor:
        with learning_blocks(self.blocks, self.recompute):
            return self._velocity(prompt, x, sigma)

    def _velocity(self, prompt: int, x: Tensor, sigma: float) -> Tensor:
        mm.throw_exception_if_processing_interrupted()
        self.guider.conds["positive"] = self.guider.conds[_key(prompt)]
        latents = x.unsqueeze(2) if self.has_frames else x
        denoised = self.guider(latents, sigma * x.new_ones(len(x)), **self.extra_args)
        return (x - adapters.without_frames(denoised)) / sigma

    def smaller(self, batch: int) -> str | None:
        """Takes less memory from now on, at the cost of time; what it does, or None when nothing is left."""
        at_once = min(self.largest or batch, batch)
        if at_once > 1:
            self.largest = (at_once + 1) // 2
            return f"{self.largest} pictures at once"
        if not self.recompute:
            self.recompute = True
            return "every block computed again for its gradient"
        return None


class NothingInPlace(TorchFunctionMode):
    """Within it `x += y` makes a new tensor: some blocks overwrite what autograd has kept."""

    def __torch_function__(self, function: Callable, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        return OUT_OF_PLACE.get(function, function)(*args, **(kwargs or {}))


def _torch_attention(function: Callable, *args, **kwargs) -> Tensor:
    return comfy.ldm.modules.attention.attention_pytorch(*args, **kwargs)


def _key(prompt: int) -> str:
    return f"prompt {prompt}"


def within_sampling(
    run: Callable[[ComfyPolicy], Any],
    model: comfy.model_patcher.ModelPatcher,
    drms: list[comfy.model_patcher.ModelPatcher],
    network: nn.Module,
    *,
    prompts: Mapping[int, list],
    negative: list,
    cfg: float,
    latents: Tensor,
    seed: int,
) -> Any:
    """run(policy)'s result; policy knows the CONDITIONINGs of `prompts` by their number.

    latents: zeros of the shape that is sampled. What the MODEL carries (LoRA, patches, wrappers) applies; it
    is left as it came.
    """
    both = model.clone()
    both.set_additional_models("drm", drms)

    def inside(guider: comfy.samplers.CFGGuider, extra_args: dict) -> Any:
        thaw(network)
        options = extra_args["model_options"]
        options[CALCULATE] = without_unconditional_graph(options.get(CALCULATE))
        # Some attention kernels have no backward pass; torch's own always has.
        options.setdefault("transformer_options", {})[ATTENTION] = _torch_attention
        return run(ComfyPolicy(guider, extra_args, network, latents.ndim == 5))

    sampler = InsideSampling(inside)
    with torch.inference_mode(False), torch.enable_grad():
        mm.load_models_gpu([both, *drms], force_full_load=True)
        guider = comfy.samplers.CFGGuider(both)
        conditions = {_key(number): condition for number, condition in prompts.items()}
        guider.inner_set_conds({"positive": next(iter(prompts.values())), "negative": negative, **conditions})
        guider.set_cfg(cfg)
        sigmas = torch.tensor([1.0, 0.0])
        with _in_training():
            guider.sample(torch.zeros_like(latents), latents, sampler, sigmas, disable_pbar=True, seed=seed)
    return sampler.result


@contextlib.contextmanager
def _in_training() -> Iterator[None]:
    """Tells newer ComfyUI to rotate positions in torch: its kernels for it have no backward pass."""
    before = getattr(mm, "in_training", False)
    mm.in_training = True
    try:
        yield
    finally:
        mm.in_training = before


def without_unconditional_graph(existing: Callable | None) -> Callable:
    """A sampler_calc_cond_batch_function that keeps a graph for the conditional branch alone; around the
    MODEL's own, if it has one.
    """
    if existing is not None:

        def detached(args: dict) -> list[Tensor]:
            cond, *others = existing(args)
            return [cond, *(other.detach() for other in others)]

        return detached

    def calculate(args: dict) -> list[Tensor]:
        model, (positive, negative) = args["model"], args["conds"]
        rest = args["input"], args["sigma"], args["model_options"]
        cond, nothing = comfy.samplers.calc_cond_batch(model, [positive, None], *rest)
        if negative is None:
            return [cond, nothing]
        with torch.no_grad():
            return [cond, comfy.samplers.calc_cond_batch(model, [None, negative], *rest)[1]]

    return calculate


def thaw(network: nn.Module) -> None:
    """Freezes the base weights, and makes them such that autograd may keep them.

    Weights loaded while a prompt runs are inference tensors, which autograd refuses to save; so are the cast
    weights that newer ComfyUI's layers keep as plain attributes (_v_weight) after a KSampler. Each is
    replaced by an equal ordinary tensor, one at a time: memory grows by the largest of them only.
    """
    holders: dict[int, list[tuple[dict, str]]] = {}
    for module in network.modules():
        for table in (module._parameters, module._buffers, vars(module)):
            for name, tensor in table.items():
                if isinstance(tensor, Tensor) and tensor.is_inference():
                    holders.setdefault(id(tensor), []).append((table, name))
    for places in holders.values():
        table, name = places[0]
        with torch.no_grad():
            fresh = table[name].clone()
        if isinstance(table[name], nn.Parameter):
            fresh = nn.Parameter(fresh, requires_grad=False)
        for table, name in places:
            table[name] = fresh
    network.requires_grad_(False)


@contextlib.contextmanager
def learning_blocks(blocks: Iterable[nn.Module], recompute: bool) -> Iterator[None]:
    """Within it these blocks overwrite nothing that a gradient needs; recompute: they keep no graph of their
    inside but compute it again in backward.
    """
    changed = []
    try:
        for block in blocks:

            def compute(*args, original=block.forward, **kwargs):
                with NothingInPlace():
                    return original(*args, **kwargs)

            def forward(*args, original=block.forward, compute=compute, **kwargs):
                if not torch.is_grad_enabled():
                    return original(*args, **kwargs)
                if recompute:
                    return checkpoint(compute, *args, use_reentrant=False, **kwargs)
                return compute(*args, **kwargs)

            block.forward = forward
            changed.append(block)
        yield
    finally:
        for block in changed:
            del block.forward


def graph_bytes(function: Callable[[], Tensor], network: nn.Module) -> int:
    """Memory that autograd holds for the result of a function, the network's own weights aside."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*network.parameters(), *network.buffers())}
    held = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            held[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = function()
    total = sum(held.values())
    del result
    return total
