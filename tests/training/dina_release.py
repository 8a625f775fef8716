"""DiNa-LRM releases around small random bases, and what the published model computes with them.

The model is put together here from diffusers' whole blocks and PEFT's own adapter, and the head's formula is
written out on its state dict: what is tested takes no part.

    dina = write_release(folder, transformer, num_transformer_layers=2, visual_head_idx=[0, 2], ...)
    dina.raw(latents, sigma, prompt_embeds, pooled)             # (B,)
"""

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from drm.sd3.comfy_layout import to_comfy_layout
from tests.tiny import tiny_transformer

ADDED = ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", *ADDED)
MODEL = {
    "model_type": "thurstone",
    "backbone_model_id": "stabilityai/stable-diffusion-3.5-medium",
    "num_transformer_layers": 2,
    "freeze_backbone": False,
    "use_ema": True,
    "use_lora": True,
    "use_text_features": True,
    "lora_config": {"r": 4, "lora_alpha": 8, "init_lora_weights": "gaussian"},
    "use_logistic": False,
    "visual_head_idx": [1, 2],
    "text_head_idx": [1, 2],
    "use_t_embed": True,
    "reward_head": {
        "use_proj_in": False,
        "width": -1,
        "out_dim": 1,
        "num_queries": 4,
        "num_attn_heads": 8,
        "dropout": 0.0,
    },
}


# Where a release keeps what.
CONFIG, HEAD = "config.json", "checkpoint/rm_head.pt"
ADAPTER, SETTINGS = (
    "checkpoint/backbone_lora/adapter_model.safetensors",
    "checkpoint/backbone_lora/adapter_config.json",
)
LORA = "base_model.model.transformer_blocks"


def small_transformer(dual_attention_layers: tuple[int, ...] = (0, 1), **changes: int) -> nn.Module:
    """A base of 3 blocks of width 192, dual attention in the first two."""
    sizes = {"hidden": 192, "depth": 3, "joint_attention_dim": 40, "pooled_projection_dim": 24, **changes}
    return tiny_transformer(**sizes, dual_attention_layers=dual_attention_layers)


def write_base(path: Path, transformer: nn.Module, dtype: torch.dtype = torch.float32) -> Path:
    """The transformer as one file in ComfyUI's layout."""
    state_dict = {key: value.to(dtype) for key, value in transformer.state_dict().items()}
    save_file(to_comfy_layout(state_dict, transformer.config), path)
    return path


class _Blocks(nn.Module):
    """The embedders and first blocks of a diffusers transformer, as the published model holds them."""

    def __init__(self, transformer: nn.Module, count: int) -> None:
        super().__init__()
        self.pos_embed = transformer.pos_embed
        self.time_text_embed = transformer.time_text_embed
        self.context_embedder = transformer.context_embedder
        self.transformer_blocks = nn.ModuleList(transformer.transformer_blocks[:count])

    def forward(
        self, latents: Tensor, sigma: float, prompt_embeds: Tensor, pooled: Tensor
    ) -> tuple[list, list, Tensor]:
        image, text = [self.pos_embed(latents)], [self.context_embedder(prompt_embeds)]
        temb = self.time_text_embed(torch.full((len(latents),), 1000.0 * sigma), pooled)
        for block in self.transformer_blocks:
            context, tokens = block(hidden_states=image[-1], encoder_hidden_states=text[-1], temb=temb)
            image.append(tokens)
            text.append(context)
        return image, text, temb


@dataclass
class Dina:
    """A release and the model it describes."""

    folder: Path
    blocks: nn.Module
    head: Mapping[str, Tensor]
    model: Mapping

    @torch.no_grad()
    def raw(self, latents: Tensor, sigma: float, prompt_embeds: Tensor, pooled: Tensor) -> Tensor:
        """Scores (B,) before the published (raw + 10) / 10."""
        image, text, temb = self.blocks(latents, sigma, prompt_embeds, pooled)
        image = [image[index] for index in sorted(self.model["visual_head_idx"])]
        text = [text[index] for index in sorted(self.model["text_head_idx"])]
        score = head_score(self.head, image, text, temb, self.model["reward_head"]["num_attn_heads"])
        return 4 / (1 + torch.exp(-score / (0.15 + 1e-6))) - 2 if self.model["use_logistic"] else score


def _linear(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def _rms(w: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return (
        x / torch.sqrt((x * x).mean(-1, keepdim=True) + torch.finfo(torch.float32).eps) * w[f"{name}.weight"]
    )


def _attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    size = q.shape[-1] // heads
    parts = []
    for head in range(heads):
        here = slice(head * size, (head + 1) * size)
        weights = torch.softmax(q[..., here] @ k[..., here].mT / size**0.5, dim=-1)
        parts.append(weights @ v[..., here])
    return torch.cat(parts, -1)


def head_score(w: Mapping[str, Tensor], image: list, text: list, temb: Tensor, heads: int) -> Tensor:
    """The query head's formula on its state dict w."""

    def stream(name: str, taps: list) -> Tensor:
        adapted = []
        for i, x in enumerate(taps):
            at = f"layer_adapters_{name}.{i}"
            if f"{at}.proj_in.weight" in w:
                x = _linear(w, f"{at}.proj_in", x)
            style = _linear(w, f"{at}.cond_mlp.2", F.silu(_linear(w, f"{at}.cond_mlp.0", temb)))
            gamma, beta = style[:, None].chunk(2, -1)
            adapted.append(_linear(w, f"{at}.proj", x * (1 + gamma) + beta + w[f"{at}.layer_embed"]))
        return _linear(w, f"agg_{name}", torch.cat(adapted, -1))

    def value(x: Tensor, name: str, stream: str) -> Tensor:
        gate = _linear(w, f"{name}.gate_{stream}.2", F.silu(_linear(w, f"{name}.gate_{stream}.0", x)))
        return _linear(w, f"{name}.to_v_{'vis' if stream == 'vis' else 'text'}", x) * torch.sigmoid(gate)

    seen = stream("visual", image)
    queries = w["query_tokens"].expand(len(temb), -1, -1)

    q, x = _linear(w, "attn1.to_q", _rms(w, "attn1.norm_q", queries)), _rms(w, "attn1.norm_v", seen)
    gathered = _attend(q, _linear(w, "attn1.to_k_vis", x), value(x, "attn1", "vis"), heads)
    if text:
        x = _rms(w, "attn1.norm_t", stream("text", text))
        gathered = gathered + _attend(q, _linear(w, "attn1.to_k_text", x), value(x, "attn1", "text"), heads)
    queries = queries + _linear(w, "attn1.to_out.0", gathered)

    q, x = _linear(w, "attn2.to_q", _rms(w, "attn2.norm_q", queries)), _rms(w, "attn2.norm_v", seen)
    gathered = _attend(q, _linear(w, "attn2.to_k_vis", x), _linear(w, "attn2.to_v_vis", x), heads)
    queries = queries + _linear(w, "attn2.to_out.0", gathered)

    inner = F.gelu(_linear(w, "ff.0", _rms(w, "norm_ff", queries)))
    return _linear(w, "head", queries + _linear(w, "ff.2", inner)).mean(dim=(1, 2))


def head_weights(dim: int, images: int, texts: int, head: Mapping, seed: int = 5) -> dict[str, Tensor]:
    """A random rm_head.pt: the published names, and shapes that follow from the sizes."""
    width = dim if head["width"] == -1 else head["width"]
    queries, quarter = head["num_queries"], width // 4
    layers, shapes = {}, {"query_tokens": (1, queries, width), "norm_ff.weight": (width,)}
    for name, taps in (("visual", images), ("text", texts)):
        for i in range(taps):
            at = f"layer_adapters_{name}.{i}"
            shapes[f"{at}.layer_embed"] = (1, 1, width)
            layers |= {f"{at}.cond_mlp.0": (2 * width, dim), f"{at}.cond_mlp.2": (2 * width, 2 * width)}
            layers[f"{at}.proj"] = (quarter, width)
            if head["use_proj_in"] or width != dim:
                layers[f"{at}.proj_in"] = (width, dim)
        if taps:
            layers[f"agg_{name}"] = (width, taps * quarter)
    for name in ("to_q", "to_k_vis", "to_v_vis", "to_out.0"):
        layers |= {f"attn1.{name}": (width, width), f"attn2.{name}": (width, width)}
    for stream in ("vis", "text") if texts else ("vis",):
        layers |= {f"attn1.gate_{stream}.0": (width, width), f"attn1.gate_{stream}.2": (1, width)}
    shapes |= {f"{name}.weight": (width,) for name in ("attn1.norm_q", "attn1.norm_v")}
    shapes |= {f"{name}.weight": (width,) for name in ("attn2.norm_q", "attn2.norm_v")}
    if texts:
        layers |= {"attn1.to_k_text": (width, width), "attn1.to_v_text": (width, width)}
        shapes["attn1.norm_t.weight"] = (width,)
    layers |= {"ff.0": (4 * width, width), "ff.2": (width, 4 * width), "head": (1, width)}
    for name, shape in layers.items():
        shapes |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    generator = torch.Generator().manual_seed(seed)
    return {
        name: 1.5 * torch.randn(shape, generator=generator) / max(shape[-1], 1) ** 0.5
        if len(shape) > 1
        else 0.3 * torch.randn(shape, generator=generator) + ("norm" in name)
        for name, shape in shapes.items()
    }


def write_release(folder: Path, transformer: nn.Module, seed: int = 7, **model: object) -> Dina:
    """A release folder on a base, which stays as it is; `model` changes entries of its model section."""
    section = {**MODEL, **model, "reward_head": {**MODEL["reward_head"], **model.get("reward_head", {})}}
    depth = section["num_transformer_layers"]
    checkpoint = folder / "checkpoint"
    checkpoint.mkdir(parents=True)
    blocks = _Blocks(transformer, depth)
    if section["use_lora"] and not section["freeze_backbone"]:
        blocks = _adapted(blocks, section, seed)
        blocks.save_pretrained(checkpoint / "backbone_lora")
    taps = len(section["visual_head_idx"]), len(section["text_head_idx"])
    head = head_weights(transformer.inner_dim, *taps, section["reward_head"])
    if section["use_logistic"]:
        # Where the curve is not flat.
        head |= {"head.weight": 0.05 * head["head.weight"], "head.bias": torch.zeros(1)}
    torch.save(head, checkpoint / "rm_head.pt")
    training = {"mixed_precision": "bf16", "add_noise": True}
    (folder / "config.json").write_text(json.dumps({"model": section, "training": training}, indent=4))
    return Dina(folder, blocks.eval(), head, section)


def _adapted(blocks: nn.Module, section: Mapping, seed: int) -> nn.Module:
    """PEFT's model, its matrices random, on everything the published code adapts."""
    last = f"transformer_blocks.{section['num_transformer_layers'] - 1}.attn"
    text_is_read = section["use_text_features"] and section["text_head_idx"][-1:] == [
        section["num_transformer_layers"]
    ]
    config = LoraConfig(
        **section["lora_config"],
        target_modules=list(TARGETS),
        exclude_modules=None if text_is_read else [f"{last}.{name}" for name in ADDED],
    )
    # PEFT changes the modules it is given.
    adapted = get_peft_model(copy.deepcopy(blocks), config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.copy_(
                    0.3 * torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
                )
    return adapted


def change_config(folder: Path, **changes: object) -> None:
    """Changes entries of the model section; None removes one."""
    content = json.loads((folder / CONFIG).read_text())
    for name, value in changes.items():
        if value is None:
            content["model"].pop(name)
        elif isinstance(value, dict):
            content["model"][name] |= value
        else:
            content["model"][name] = value
    (folder / CONFIG).write_text(json.dumps(content))


def change_settings(folder: Path, **changes: object) -> None:
    """Changes entries of adapter_config.json."""
    settings = json.loads((folder / SETTINGS).read_text())
    (folder / SETTINGS).write_text(json.dumps(settings | changes))


def change_adapter(folder: Path, change: Callable) -> None:
    """Lets a function change the adapter's weights."""
    weights = load_file(folder / ADAPTER)
    change(weights)
    save_file(weights, folder / ADAPTER)


def change_head(folder: Path, change: Callable) -> None:
    """Lets a function change the head's weights."""
    weights = torch.load(folder / HEAD, weights_only=True)
    change(weights)
    torch.save(weights, folder / HEAD)
