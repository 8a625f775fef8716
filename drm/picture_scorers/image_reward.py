"""ImageReward (Xu et al. 2023): a BLIP whose text encoder looks at the picture, an MLP on its first token.

    score = (mlp(text_encoder(prompt, looking at picture_encoder(picture))[0]) - MEAN) / STD

Published as ImageReward.pt, which is read as tensors and nothing else (weights_only); a .safetensors with the
same names is read too. Sizes follow from the weights. The tokenizer is BERT's, uncased.
"""

import math
import pickle
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import safetensors
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .files import file_names, first_line

if TYPE_CHECKING:
    from PIL.Image import Image

MEAN, STD = 0.16717362830052426, 1.0333394966054072
TOKENS = 35
HEAD_WIDTH = 64
# What CLIP's pictures are normalised by.
PIXEL_MEAN, PIXEL_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
VISION, TEXT, MLP = "blip.visual_encoder.", "blip.text_encoder.", "mlp.layers."
# BLIP's names for its picture encoder, and transformers'.
RENAMED = (
    ("norm.", "post_layernorm."),
    ("cls_token", "embeddings.class_embedding"),
    ("pos_embed", "embeddings.position_embedding"),
    ("patch_embed.proj.", "embeddings.patch_embedding."),
    ("blocks.", "encoder.layers."),
)
RENAMED_INSIDE = (
    (".attn.proj.", ".self_attn.projection."),
    (".attn.qkv.", ".self_attn.qkv."),
    (".norm1.", ".layer_norm1."),
    (".norm2.", ".layer_norm2."),
)


class ImageReward(nn.Module):
    """vision: a transformers BlipVisionModel; text: a BlipTextModel with cross-attention; mlp: its first
    token to a number; side: of the square it sees, in pixels.
    """

    def __init__(
        self, vision: nn.Module, text: nn.Module, mlp: nn.Module, tokenizer: Callable, side: int
    ) -> None:
        super().__init__()
        self.vision, self.text, self.mlp = vision, text, mlp
        self.tokenizer, self.side = tokenizer, side

    @torch.no_grad()
    def forward(self, prompt: str, pictures: Sequence["Image"]) -> Tensor:
        """Scores (n,), float32, of n RGB pictures of any sizes, higher is better; the prompt is cut to 35
        tokens.
        """
        device = self.mlp[0].weight.device
        pixels = torch.stack([square(picture, self.side) for picture in pictures]).to(device)
        seen = self.vision(pixels).last_hidden_state
        words = self.tokenizer([prompt], truncation=True, max_length=TOKENS, return_tensors="pt").input_ids
        words = words.to(device).expand(len(pictures), -1)
        read = self.text(
            words,
            attention_mask=torch.ones_like(words),
            encoder_hidden_states=seen,
            encoder_attention_mask=torch.ones(seen.shape[:2], dtype=torch.long, device=device),
        ).last_hidden_state
        return (self.mlp(read[:, 0])[:, 0] - MEAN) / STD


def square(picture: "Image", side: int) -> Tensor:
    """(3, side, side): the shorter side bicubically to `side`, the middle of the longer one, normalised."""
    from PIL import Image

    width, height = picture.size
    short = min(width, height)
    width, height = int(side * width / short), int(side * height / short)
    left, top = round((width - side) / 2), round((height - side) / 2)
    resized = picture.resize((width, height), Image.Resampling.BICUBIC)
    cut = resized.crop((left, top, left + side, top + side)).convert("RGB")
    pixels = torch.from_numpy(np.array(cut, dtype=np.float32)) / 255
    return ((pixels - torch.tensor(PIXEL_MEAN)) / torch.tensor(PIXEL_STD)).permute(2, 0, 1)


def weights_of(names: Collection[str]) -> str | None:
    """The file of a folder that holds ImageReward's weights, the .safetensors first."""
    found = [name for name in names if name.lower().startswith("imagereward")]
    return next(
        (name for end in (".safetensors", ".pt") for name in sorted(found) if name.endswith(end)), None
    )


def load_image_reward(folder: str | Path) -> ImageReward:
    """The scorer of a folder with ImageReward.pt (or .safetensors) and BERT's tokenizer, on the CPU, float32.
    Raises ValueError for a folder that is not so, or whose weights are not complete.
    """
    from transformers import BlipTextModel, BlipVisionModel

    folder = Path(folder)
    names = file_names(folder)
    name = weights_of(names)
    if name is None:
        raise ValueError(f"{folder} holds no ImageReward.pt: take it from the model's page")
    if not names & {"tokenizer.json", "vocab.txt"}:
        raise ValueError(
            f"{folder} holds no tokenizer.json: put it and vocab.txt of google-bert/bert-base-uncased beside"
            f" {name}"
        )
    weights = _read(folder / name)
    try:
        vision_config, text_config = _configs(weights)
        mlp = _mlp(weights)
    except KeyError as error:
        raise ValueError(f"{folder / name} lacks {error.args[0]}: it is no ImageReward file") from error
    vision, text = BlipVisionModel(vision_config), BlipTextModel(text_config, add_pooling_layer=False)
    _fill(vision, {_renamed(key): weights[VISION + key] for key in _below(weights, VISION)}, folder / name)
    _fill(text, {key: weights[TEXT + key] for key in _below(weights, TEXT)}, folder / name)
    scorer = ImageReward(vision, text, mlp, _tokenizer(folder), vision_config.image_size)
    return scorer.float().requires_grad_(False).eval()


def _read(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {first_line(error)}; download it again") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise ValueError(f"{path} is no dictionary of tensors: it is no ImageReward file")
    return weights


def _below(weights: dict[str, Tensor], prefix: str) -> list[str]:
    return [key.removeprefix(prefix) for key in weights if key.startswith(prefix)]


def _renamed(key: str) -> str:
    for start, new in RENAMED:
        if key.startswith(start):
            key = new + key.removeprefix(start)
            break
    for old, new in RENAMED_INSIDE:
        key = key.replace(old, new)
    return key


def _configs(weights: dict[str, Tensor]) -> tuple:
    """transformers' configurations of the two encoders. Raises KeyError for a weight that is not there."""
    from transformers import BlipTextConfig, BlipVisionConfig

    patch = weights[VISION + "patch_embed.proj.weight"].shape[-1]
    patches, width = weights[VISION + "pos_embed"].shape[1] - 1, weights[VISION + "pos_embed"].shape[2]
    vision = BlipVisionConfig(
        hidden_size=width,
        intermediate_size=len(weights[VISION + "blocks.0.mlp.fc1.weight"]),
        num_hidden_layers=_depth(weights, VISION + "blocks."),
        num_attention_heads=width // HEAD_WIDTH,
        image_size=math.isqrt(patches) * patch,
        patch_size=patch,
        layer_norm_eps=1e-6,
    )
    words, text_width = weights[TEXT + "embeddings.word_embeddings.weight"].shape
    text = BlipTextConfig(
        vocab_size=words,
        hidden_size=text_width,
        encoder_hidden_size=width,
        intermediate_size=len(weights[TEXT + "encoder.layer.0.intermediate.dense.weight"]),
        num_hidden_layers=_depth(weights, TEXT + "encoder.layer."),
        num_attention_heads=text_width // HEAD_WIDTH,
        max_position_embeddings=len(weights[TEXT + "embeddings.position_embeddings.weight"]),
    )
    return vision, text


def _depth(weights: dict[str, Tensor], prefix: str) -> int:
    return 1 + max(int(key.split(".")[0]) for key in _below(weights, prefix))


def _mlp(weights: dict[str, Tensor]) -> nn.Sequential:
    """The linear layers in their order; what lies between them is dropout. Raises KeyError."""
    layers = nn.Sequential()
    for i in sorted({int(key.split(".")[0]) for key in _below(weights, MLP)}) or [0]:
        weight, bias = weights[f"{MLP}{i}.weight"], weights[f"{MLP}{i}.bias"]
        layer = nn.Linear(weight.shape[1], weight.shape[0])
        layer.load_state_dict({"weight": weight, "bias": bias})
        layers.append(layer)
    return layers


def _fill(module: nn.Module, weights: dict[str, Tensor], path: Path) -> None:
    missing = sorted(module.state_dict().keys() - weights.keys())
    if missing:
        raise ValueError(f"{path} lacks {missing[0]} ({len(missing)} in all): download it again")
    try:
        module.load_state_dict(weights, strict=False)
    except RuntimeError as error:
        raise ValueError(
            f"{path} does not fit together: {str(error).strip().splitlines()[-1].strip()}"
        ) from error


def _tokenizer(folder: Path) -> Callable:
    from transformers import BertTokenizerFast

    try:
        return BertTokenizerFast.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # transformers raises many kinds
        raise ValueError(f"cannot load BERT's tokenizer from {folder}: {first_line(error)}") from error
