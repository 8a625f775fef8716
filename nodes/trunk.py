"""The MODEL that samples as the trunk of a shared head: its image tokens after some blocks, through ComfyUI.

    tokens(x (n, C, H, W), sigma, items (n,)) -> drm.shared.Taps

The network is run by ComfyUI's own calc_cond_batch on the positive prompt, so its conditioning, casting,
offloading, LoRAs and patches apply, and left behind the last block that is read (drm/tap.py). Works while
ComfyUI samples: the weights are in place then.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

import comfy.model_base
import comfy.model_management as mm
import comfy.model_patcher
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import torch
from torch import Tensor

from . import adapters
from .inside_sampling import InsideSampling

if TYPE_CHECKING:
    from ..drm.shared import SharedDRM, SharedScorer, Taps, TrunkFacts

Output = Tensor | tuple[Tensor | None, ...]
# (outputs of the blocks read, the number of one, image tokens L, the network) -> (n, L, width)
Image = Callable[[Mapping[int, Output], int, int, torch.nn.Module], Tensor]

# What of a CONDITIONING entry says where, when and with what else it steers; a score reads the prompt alone.
_STEERING = (
    *("area", "strength", "mask", "mask_strength", "set_area_to_bounds"),
    *("control", "control_apply_to_uncond", "gligen", "hooks", "default"),
    *("start_percent", "end_percent", "clip_start_percent", "clip_end_percent"),
)
# Wrappers that answer in the network's place, or would compile a pass that is cut off. ComfyUI's own names.
_IN_THE_WAY = ("easycache", "lazycache", "torch.compile")
# head -> models of which was said that they are not of one base with it.
_SAID: "WeakKeyDictionary[SharedDRM, set[str]]" = WeakKeyDictionary()


@dataclass(frozen=True)
class Family:
    """name: in files. lists: of blocks, in the order they run. width: the attribute with a token's width.
    image: finds the image tokens in what a block returns. attention: the layers of a block that a LoRA is
    learned on, where a block has them; SD3's are in drm/lora.py, none where ComfyUI's layers have no backward
    pass. patch: the attribute with a patch's size.
    """

    name: str
    lists: tuple[str, ...]
    width: str
    image: Image
    attention: tuple[str, ...] = ()
    patch: str = "patch_size"


def _second(outputs: Mapping[int, Output], number: int, length: int, network: torch.nn.Module) -> Tensor:
    """(text, image); references stand behind the image."""
    return outputs[number][1][:, :length]


def _first(outputs: Mapping[int, Output], number: int, length: int, network: torch.nn.Module) -> Tensor:
    """(image, text), or both in one tensor in this order."""
    output = outputs[number]
    return (output if isinstance(output, Tensor) else output[0])[:, :length]


def _last(outputs: Mapping[int, Output], number: int, length: int, network: torch.nn.Module) -> Tensor:
    """One tensor, a reference before the image."""
    return outputs[number][:, -length:]


def _grid(outputs: Mapping[int, Output], number: int, length: int, network: torch.nn.Module) -> Tensor:
    """One tensor (n, frames, rows, columns, width)."""
    return outputs[number].flatten(1, 3)[:, -length:]


def _flux(outputs: Mapping[int, Output], number: int, length: int, network: torch.nn.Module) -> Tensor:
    """(image, text), then one tensor of text, image and references."""
    doubles = len(network.double_blocks)
    if number <= doubles:
        return _first(outputs, number, length, network)
    text = outputs[doubles][1].shape[1]
    return outputs[number][:, text : text + length]


def _behind_caption(
    outputs: Mapping[int, Output], number: int, length: int, network: torch.nn.Module
) -> Tensor:
    """One tensor of caption and image, the image padded to a multiple."""
    padded = length + -length % (network.pad_tokens_multiple or 1)
    start = outputs[number].shape[1] - padded
    return outputs[number][:, start : start + length]


_FLUX_LISTS = ("double_blocks", "single_blocks")
_FLUX_ATTENTION = ("img_attn.qkv", "img_attn.proj", "txt_attn.qkv", "txt_attn.proj", "linear1", "linear2")
_QWEN_ATTENTION = tuple(
    f"attn.{layer}"
    for layer in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
)
_KREA_ATTENTION = tuple(f"attn.{layer}" for layer in ("wq", "wk", "wv", "wo", "gate"))
_WAN_ATTENTION = tuple(f"{kind}_attn.{layer}" for kind in ("self", "cross") for layer in "qkvo")
_HIDREAM_ATTENTION = tuple(
    f"block.attn1.{layer}{text}" for text in ("", "_t") for layer in ("to_q", "to_k", "to_v", "to_out")
)
# By the class of the network.
FAMILIES = {
    "OpenAISignatureMMDITWrapper": Family("sd3", ("joint_blocks",), "hidden_size", _second),
    "Flux": Family("flux", _FLUX_LISTS, "hidden_size", _flux, _FLUX_ATTENTION),
    "Chroma": Family("chroma", _FLUX_LISTS, "hidden_size", _flux, _FLUX_ATTENTION),
    "QwenImageTransformer2DModel": Family(
        "qwen_image", ("transformer_blocks",), "inner_dim", _second, _QWEN_ATTENTION
    ),
    "NextDiT": Family("lumina2", ("layers",), "dim", _behind_caption, ("attention.qkv", "attention.out")),
    "SingleStreamDiT": Family("krea2", ("blocks",), "first.out_features", _last, _KREA_ATTENTION, "patch"),
    "ErnieImageModel": Family("ernie_image", ("layers",), "hidden_size", _first),
    "Anima": Family("anima", ("blocks",), "model_channels", _grid, patch="patch_spatial"),
    "WanModel": Family("wan", ("blocks",), "dim", _last, _WAN_ATTENTION),
    "HiDreamImageTransformer2DModel": Family(
        "hidream", ("double_stream_blocks", "single_stream_blocks"), "inner_dim", _first, _HIDREAM_ATTENTION
    ),
}


def family_of(base: comfy.model_base.BaseModel) -> Family:
    """The family of a MODEL's network. Raises ValueError for one that is not in the table."""
    network = adapters.network_of(base)
    name = type(network).__name__
    if name not in FAMILIES:
        known = sorted({family.name for family in FAMILIES.values()} | {"flux2", "z_image"})
        raise ValueError(
            f"the MODEL's network is a {name}, whose tokens no head can read yet: use a model of"
            f" {', '.join(known)}, or a DRM with a backbone of its own"
        )
    return FAMILIES[name]


def family_name(base: comfy.model_base.BaseModel) -> str:
    """The family as files name it; two of them share their network's class with an elder one."""
    network, name = adapters.network_of(base), family_of(base).name
    if name == "flux" and getattr(network.params, "global_modulation", False):
        return "flux2"
    if name == "lumina2" and network.pad_tokens_multiple is not None:
        return "z_image"
    return name


def blocks_of(base: comfy.model_base.BaseModel) -> list[torch.nn.Module]:
    """The blocks in the order they run; block number n is the n-th."""
    network = adapters.network_of(base)
    return [block for name in family_of(base).lists for block in getattr(network, name)]


def attention_layers(base: comfy.model_base.BaseModel) -> dict[str, torch.nn.Module]:
    """The attention layers of all blocks by their names in the network, in order."""
    network, family = adapters.network_of(base), family_of(base)
    found = {}
    for name in family.lists:
        for number, block in enumerate(getattr(network, name)):
            layers = dict(block.named_modules())
            found |= {f"{name}.{number}.{part}": layers[part] for part in family.attention if part in layers}
    return found


def trunk_facts(model: comfy.model_patcher.ModelPatcher, taps: tuple[int, ...]) -> "TrunkFacts":
    """What the file of a head on these blocks of a MODEL says of it."""
    from ..drm.shared import TrunkFacts, fingerprint

    base = model.model
    lists = family_of(base).lists
    weights = adapters.original_weights(model)
    return TrunkFacts(
        family=family_name(base),
        width=attrgetter(family_of(base).width)(adapters.network_of(base)),
        num_blocks=len(blocks_of(base)),
        taps=tuple(taps),
        latent_channels=model.get_model_object("latent_format").latent_channels,
        fingerprint=fingerprint(
            {name: value for name, value in weights.items() if name.startswith(lists)}, "comfyui"
        ),
    )


def share_of_pass(base: comfy.model_base.BaseModel, last: int) -> float:
    """What leaving a pass behind block number `last` costs of the whole, by the blocks' weights."""
    sizes = [sum(value.numel() for value in block.parameters()) for block in blocks_of(base)]
    return sum(sizes[:last]) / sum(sizes)


def check_fits(
    drm: comfy.model_patcher.ModelPatcher, model: comfy.model_patcher.ModelPatcher, samples: Tensor
) -> None:
    """Raises ValueError when a shared head was made for another model than the MODEL, or the latents for
    another. Another fine-tune of the same model is fine, which the log says once.
    """
    from ..drm.shared import unlike

    wanted, base = drm.model.trunk, model.model
    if (family_name(base), len(blocks_of(base))) != (wanted.family, wanted.num_blocks):
        raise ValueError(
            f"the DRM's head was made for a {wanted.family} model of {wanted.num_blocks} blocks and the MODEL"
            f" is a {family_name(base)} of {len(blocks_of(base))}: load the model it was made for, or another"
            " DRM"
        )
    found = trunk_facts(model, wanted.taps)
    if (found.width, found.latent_channels) != (wanted.width, wanted.latent_channels):
        raise ValueError(
            f"the DRM's head was made for tokens {wanted.width} wide and latents of {wanted.latent_channels}"
            f" channels and the MODEL has {found.width} and {found.latent_channels}: load the model it was"
            " made for, or another DRM"
        )
    if samples.shape[1] != found.latent_channels:
        raise ValueError(
            f"the MODEL draws latents of {found.latent_channels} channels and this LATENT has"
            f" {samples.shape[1]}: make it with the Empty Latent node or the VAE that belongs to the model"
        )
    difference = unlike(wanted.fingerprint, found.fingerprint)
    said, mark = _SAID.setdefault(drm.model, set()), str(found.fingerprint)
    if difference and mark not in said:
        said.add(mark)
        logging.warning(
            "DRM: the MODEL is not the one this head was made on (%s); a fine-tune of it scores much the"
            " same, compare a few pictures",
            difference,
        )


class Kept(NamedTuple):
    """Candidates (n, C, H, W) at sigma, and what left the last block read."""

    sigma: float
    latents: Tensor
    output: Output


class Trunk:
    """The tokens of the MODEL that is being sampled, each latent with the prompt of its item of the batch.

    base, model_options: what ComfyUI hands a sampler. like: latents of the batch as ComfyUI has them, (B, C,
    H, W) or (B, C, 1, H, W). taps: numbers of the blocks to read. latent_image, denoise_mask: as a sampler
    gets them, for models that read these.
    """

    def __init__(
        self,
        base: comfy.model_base.BaseModel,
        model_options: dict,
        prompts: adapters.ScoringPrompts,
        like: Tensor,
        taps: tuple[int, ...],
        latent_image: Tensor | None = None,
        denoise_mask: Tensor | None = None,
    ) -> None:
        self.shown = {"latent_image": latent_image, "denoise_mask": denoise_mask}
        self.base, self.prompts, self.like, self.taps = base, prompts, like, taps
        self.family, self.network, self.blocks = family_of(base), adapters.network_of(base), blocks_of(base)
        self.model_options, self.options = model_options, without_caches(model_options)
        # For reuse.py: what left the last block read, and the shape of what left those before.
        self.keeps, self.kept, self.shapes = False, [], {}
        self._entries: dict[int, dict] = {}

    def __call__(self, x: Tensor, sigma: float, items: Tensor) -> "Taps":
        from ..drm.shared import Taps
        from ..drm.tap import tap

        entry = _rows(self.entry(sigma), items)
        latents = x.unsqueeze(2) if self.like.ndim == 5 else x
        levels = torch.full((len(x),), float(sigma), device=x.device)
        with self._noting_shapes():
            outputs = tap(
                self.blocks,
                self._read(),
                lambda: comfy.samplers.calc_cond_batch(self.base, [[entry]], latents, levels, self.options),
            )
        rows, columns = token_grid(self.network, *x.shape[-2:])
        found = [self.family.image(outputs, number, rows * columns, self.network) for number in self.taps]
        if self.keeps:
            self.kept = [kept for kept in self.kept if kept.sigma == float(sigma)]
            self.kept.append(Kept(float(sigma), x, outputs[self.taps[-1]]))
        return Taps(found, rows, columns)

    def _read(self) -> list[int]:
        """The taps, and where these lie behind the first list of two, its last block, whose output says how
        long the text is.
        """
        first = len(getattr(self.network, self.family.lists[0]))
        return [*self.taps, first] if self.taps[-1] > first else list(self.taps)

    @contextmanager
    def _noting_shapes(self) -> Iterator[None]:
        def note(number: int) -> Callable:
            def hook(module: torch.nn.Module, inputs: tuple, output: Output) -> None:
                parts = [output] if isinstance(output, Tensor) else output
                rows = [
                    part if part is None else part.new_zeros(()).expand(1, *part.shape[1:]) for part in parts
                ]
                self.shapes[number] = rows[0] if isinstance(output, Tensor) else tuple(rows)

            return hook

        before = enumerate(self.blocks[: self.taps[-1] - 1], start=1) if self.keeps else ()
        handles = [block.register_forward_hook(note(number)) for number, block in before]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def entry(self, sigma: float) -> dict:
        """The prompt read at sigma, made ready by the MODEL's own conditioning."""
        prompt = self.prompts.read_at(sigma)
        if id(prompt) not in self._entries:
            options = {key: value for key, value in prompt.options.items() if key not in _STEERING}
            conds = comfy.sampler_helpers.convert_cond([[prompt.embeds, options]])
            ready = comfy.samplers.process_conds(
                self.base, self.like, {"positive": conds}, self.like.device, **self.shown
            )
            self._entries[id(prompt)] = ready["positive"][0]
        return self._entries[id(prompt)]


def token_grid(network: torch.nn.Module, height: int, width: int) -> tuple[int, int]:
    """Rows and columns of image tokens; the networks pad sizes that are no multiple of a patch."""
    patch = getattr(network, FAMILIES[type(network).__name__].patch)
    patch = patch if isinstance(patch, int) else patch[-1]
    return -(-height // patch), -(-width // patch)


def without_caches(model_options: dict) -> dict:
    """A copy without the wrappers that a pass which is cut off must not meet."""
    options = comfy.model_patcher.create_model_options_clone(model_options)
    inner = dict(options.get("transformer_options", {}))
    for kind in ("wrappers", "callbacks"):
        inner[kind] = {
            place: {key: value for key, value in named.items() if key not in _IN_THE_WAY}
            for place, named in inner.get(kind, {}).items()
        }
    return {**options, "transformer_options": inner}


def _rows(entry: dict, items: Tensor) -> dict:
    """The entry with, of everything it has for several items of the batch, the row of each of `items`."""

    def pick(value: Tensor) -> Tensor:
        return value[items.to(value.device) % len(value)] if len(value) > 1 else value

    conds = {}
    for name, cond in entry["model_conds"].items():
        value = cond.cond
        if isinstance(value, Tensor) and value.ndim:
            cond = cond._copy_with(pick(value))
        elif isinstance(value, list) and all(isinstance(part, Tensor) for part in value):
            cond = cond._copy_with([pick(part) for part in value])
        conds[name] = cond
    return {**entry, "model_conds": conds}


def shared_scorer(
    drm: comfy.model_patcher.ModelPatcher,
    base: comfy.model_base.BaseModel,
    model_options: dict,
    prompts: adapters.ScoringPrompts,
    like: Tensor,
    **shown: Tensor | None,
) -> "SharedScorer":
    """A scorer of the batch `like` by a shared head in memory, with ComfyUI's memory and its Cancel."""
    from ..drm.shared import SharedScorer

    return SharedScorer(
        drm.model,
        Trunk(base, model_options, prompts, like, drm.model.trunk.taps, **shown),
        before=mm.throw_exception_if_processing_interrupted,
        out_of_memory=adapters.is_out_of_memory,
        free=mm.soft_empty_cache,
    )


def score_with_model(
    drm: comfy.model_patcher.ModelPatcher,
    model: comfy.model_patcher.ModelPatcher | None,
    positive: list,
    samples: Tensor,
    leftover_sigma: float | None,
    work: Callable[["SharedScorer", Tensor], Tensor],
) -> Tensor:
    """work(scorer, x in model space) with a shared head and its MODEL in memory, outside of sampling.

    samples, leftover_sigma: see adapters.model_latents. Raises ValueError without a MODEL, or for one that
    the head was not made for.
    """
    if model is None:
        raise ValueError(
            "this DRM is a head that reads the tokens of the model it was made for"
            f" ({drm.model.trunk.family}): connect that MODEL to this node too"
        )
    sampling = model.get_model_object("model_sampling")
    prompts = adapters.ScoringPrompts(positive, sampling.percent_to_sigma)
    samples = comfy.sample.fix_empty_latent_channels(model, samples)
    adapters.check_policy(model, prompts, samples)
    check_fits(drm, model, samples)
    x = adapters.model_latents(samples, leftover_sigma, model.get_model_object("latent_format"))

    def inside(guider: comfy.samplers.CFGGuider, extra_args: dict) -> Tensor:
        adapters.load_beside(guider, drm)
        own = x.to(guider.model_patcher.load_device)
        return work(shared_scorer(drm, guider.inner_model, extra_args["model_options"], prompts, own), own)

    return while_sampling(model, positive, x, inside)


def while_sampling(
    model: comfy.model_patcher.ModelPatcher,
    positive: list,
    like: Tensor,
    work: Callable[[comfy.samplers.CFGGuider, dict], Tensor],
) -> Tensor:
    """work(guider, extra_args) with the MODEL loaded and patched as for sampling latents like these."""
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds(positive, [])
    sampler, nothing = InsideSampling(work), torch.zeros_like(like)
    guider.sample(nothing, nothing, sampler, torch.tensor([1.0, 0.0]), disable_pbar=True)
    return sampler.result
