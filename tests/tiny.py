"""A demo family with random weights: the shipped files' names, shapes and headers, made in a second.

    checkpoints/drm_demo_emoji_sd3.safetensors     ComfyUI layout: an MMDiT-X and a 16-channel TAESD
    text_encoders/drm_demo_emoji_clip.safetensors  a transformers CLIPTextModel, its config and tokenizer
    drm/drm_demo_emoji.safetensors                 a reward model on the generator's first blocks

For tests in which trained weights do not matter. Scores and pictures differ from input to input, because no
weight is left at zero.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from drm import DRM, save_drm
from drm.backbone import backbone_from_transformer
from drm.head import ConvHead
from drm.sd3.comfy_layout import PREFIX, to_comfy_layout

TEXT_LENGTH = 20
LATENT_CHANNELS = 16

_WORDS = """
a an and the of with in on at by from to emoji picture icon symbol style flat fluent noto twemoji heart
sun pizza cat dog face pumpkin soccer ball tree clock key fish red blue green yellow orange purple black
white brown smiling crying angry happy sad moon star cloud rain snow fire water flower house car train
ship plane bicycle apple banana bread cheese coffee cup knife fork spoon book pen phone computer camera
music note bell lock hammer
"""


@dataclass(frozen=True)
class DemoFiles:
    """Where build_demo_family put its files."""

    checkpoint: Path
    text_encoder: Path
    drm: Path


def randomise(module: nn.Module, seed: int, gain: float = 1.0) -> nn.Module:
    """Redraws every weight so that no output, gate or norm is zero and signals keep their size."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            fan_in = parameter[0].numel() if parameter.ndim > 1 else 1
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(gain * noise / fan_in**0.5)
            elif name.endswith("bias"):
                parameter.copy_(0.1 * noise)
            else:
                parameter.copy_(1 + 0.1 * noise)
    return module


def tiny_transformer(
    hidden: int = 256,
    depth: int = 4,
    seed: int = 0,
    dual_attention_layers: tuple[int, ...] = (0, 1),
    joint_attention_dim: int = 256,
    pooled_projection_dim: int = 256,
    pos_embed_max_size: int = 24,
    qk_norm: str | None = "rms_norm",
) -> nn.Module:
    """A random float32 SD3Transformer2DModel, of SD3.5-Medium's kind: RMS qk-norm, dual attention."""
    from diffusers import SD3Transformer2DModel

    transformer = SD3Transformer2DModel(
        sample_size=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=depth,
        num_attention_heads=hidden // 64,
        attention_head_dim=64,
        caption_projection_dim=hidden,
        joint_attention_dim=joint_attention_dim,
        pooled_projection_dim=pooled_projection_dim,
        pos_embed_max_size=pos_embed_max_size,
        dual_attention_layers=tuple(i for i in dual_attention_layers if i < depth),
        qk_norm=qk_norm,
    )
    return randomise(transformer, seed).eval()


def tiny_drm(hidden: int = 64, depth: int = 2, num_kept: int = 1, seed: int = 0, **kwargs: int) -> DRM:
    """A random reward model; kwargs go to tiny_transformer."""
    backbone = backbone_from_transformer(tiny_transformer(hidden, depth, seed, **kwargs), num_kept)
    head = randomise(ConvHead(hidden, hidden=32), seed + 1)
    return DRM(backbone, head, {"name": "random", "text_length": TEXT_LENGTH}).eval()


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])


def _taesd_state_dict(seed: int) -> dict[str, Tensor]:
    """ComfyUI's TAESD (64 wide, 1/3/3/3 blocks) under its own names."""

    # Only the places of its layers count here, so identities stand for those without weights.
    def conv(n_in: int, n_out: int, bias: bool = True) -> nn.Conv2d:
        return nn.Conv2d(n_in, n_out, 3, padding=1, bias=bias)

    down = [layer for _ in range(3) for layer in (conv(64, 64, bias=False), *(_Block(64) for _ in range(3)))]
    encoder = nn.Sequential(conv(3, 64), _Block(64), *down, conv(64, LATENT_CHANNELS))
    up = [
        layer
        for _ in range(3)
        for layer in (*(_Block(64) for _ in range(3)), nn.Identity(), conv(64, 64, bias=False))
    ]
    decoder = nn.Sequential(
        nn.Identity(), conv(LATENT_CHANNELS, 64), nn.Identity(), *up, _Block(64), conv(64, 3)
    )
    parts = nn.ModuleDict({"taesd_encoder": encoder, "taesd_decoder": decoder})
    state_dict = {
        f"first_stage_model.{key}": value for key, value in randomise(parts, seed).state_dict().items()
    }
    state_dict["first_stage_model.vae_scale"] = torch.tensor(1.0)
    state_dict["first_stage_model.vae_shift"] = torch.tensor(0.0)
    return state_dict


def train_tokenizer(words: str = _WORDS) -> str:
    """A small byte-level BPE tokenizer, lower-casing, as the text of a tokenizer.json."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512,
        show_progress=False,
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([words] * 2, trainer)
    return tokenizer.to_str()


def _write_text_encoder(path: Path, width: int, seed: int) -> None:
    from tokenizers import Tokenizer
    from transformers import CLIPTextConfig, CLIPTextModel

    text = train_tokenizer()
    tokenizer = Tokenizer.from_str(text)
    end = tokenizer.token_to_id("<|endoftext|>")
    kwargs = {
        "vocab_size": tokenizer.get_vocab_size(),
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": max(width // 64, 1),
        "max_position_embeddings": TEXT_LENGTH,
        "projection_dim": width,
        "bos_token_id": tokenizer.token_to_id("<|startoftext|>"),
        "eos_token_id": end,
        "pad_token_id": end,
    }
    model = randomise(CLIPTextModel(CLIPTextConfig(**kwargs)), seed)
    # The names transformers writes to a file, which its in-memory names need not match.
    state_dict = {
        key if key.startswith("text_model.") else f"text_model.{key}": value.half().contiguous()
        for key, value in model.state_dict().items()
        if not key.endswith("position_ids")
    }
    from safetensors.torch import save_file

    metadata = {"format": "drm-demo-clip", "version": "1", "config": json.dumps(kwargs), "tokenizer": text}
    save_file(state_dict, path, metadata=metadata)


def build_demo_family(
    folder: str | Path, seed: int = 0, hidden: int = 128, depth: int = 2, text: int = 256
) -> DemoFiles:
    """Writes the three files below `folder`, in half precision, and says where; hidden must be 64 x depth.
    text: width of its embeddings.
    """
    from safetensors.torch import save_file

    folder = Path(folder)
    files = DemoFiles(
        folder / "checkpoints" / "drm_demo_emoji_sd3.safetensors",
        folder / "text_encoders" / "drm_demo_emoji_clip.safetensors",
        folder / "drm" / "drm_demo_emoji.safetensors",
    )
    for path in (files.checkpoint, files.text_encoder, files.drm):
        path.parent.mkdir(parents=True, exist_ok=True)
    transformer = tiny_transformer(hidden, depth, seed, joint_attention_dim=text, pooled_projection_dim=text)
    network = to_comfy_layout(transformer.state_dict(), transformer.config)
    checkpoint = {PREFIX + key: value for key, value in network.items()} | _taesd_state_dict(seed + 1)
    save_file({key: value.half().contiguous() for key, value in checkpoint.items()}, files.checkpoint)
    _write_text_encoder(files.text_encoder, text, seed + 2)
    backbone = backbone_from_transformer(transformer, max(depth - 1, 1))
    drm = DRM(backbone, randomise(ConvHead(hidden), seed + 3))
    facts = {"name": "drm_demo_emoji", "text_length": TEXT_LENGTH}
    save_drm(drm, files.drm, metadata=facts, dtype=torch.float16)
    return files
