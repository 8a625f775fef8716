"""Scorers with random weights in a folder, with their small files, as people download them.

What transformers must load as it loads the real ones is written by transformers itself.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tests.tiny import randomise, train_tokenizer

LENGTH = 16


def write_tiny_clip(folder: str | Path, seed: int = 0) -> Path:
    """A CLIPModel of two layers for 32 x 32 pictures and 16 tokens."""
    from tokenizers import Tokenizer
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, PreTrainedTokenizerFast

    folder = Path(folder)
    raw = Tokenizer.from_str(train_tokenizer())
    start, end = "<|startoftext|>", "<|endoftext|>"
    raw.post_processor = _wrap_in(start, end, raw)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=raw, bos_token=start, eos_token=end, pad_token=end, model_max_length=LENGTH
    )
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **shared,
            "vocab_size": raw.get_vocab_size(),
            "max_position_embeddings": LENGTH,
            "bos_token_id": raw.token_to_id(start),
            "eos_token_id": raw.token_to_id(end),
            "pad_token_id": raw.token_to_id(end),
        },
        vision_config={**shared, "image_size": 32, "patch_size": 8},
        projection_dim=24,
        logit_scale_init_value=2.0,
    )
    model = randomise(CLIPModel(config), seed)
    pictures = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    model.save_pretrained(folder, safe_serialization=True)
    CLIPProcessor(image_processor=pictures, tokenizer=tokenizer).save_pretrained(folder)
    return folder


def _wrap_in(start: str, end: str, tokenizer):
    from tokenizers.processors import TemplateProcessing

    ids = [(token, tokenizer.token_to_id(token)) for token in (start, end)]
    return TemplateProcessing(single=f"{start} $A {end}", special_tokens=ids)


def own_similarity(folder: Path, prompt: str, pictures: Sequence[Image.Image]) -> Tensor:
    """exp(logit_scale) * cosine (n,) from the two towers, without the joint forward that the scorer calls."""
    from transformers import AutoImageProcessor, AutoTokenizer, CLIPTextModel, CLIPVisionModel

    weights = {key: value.float() for key, value in load_file(folder / "model.safetensors").items()}
    tokens = AutoTokenizer.from_pretrained(folder)(
        [prompt], truncation=True, max_length=LENGTH, return_tensors="pt"
    )
    pixels = AutoImageProcessor.from_pretrained(folder)(list(pictures), return_tensors="pt")
    text, image = (tower.from_pretrained(folder).float() for tower in (CLIPTextModel, CLIPVisionModel))
    with torch.no_grad():
        text = text(**tokens).pooler_output @ weights["text_projection.weight"].T
        image = image(**pixels).pooler_output @ weights["visual_projection.weight"].T
    return weights["logit_scale"].exp() * torch.nn.functional.cosine_similarity(image, text, dim=-1)


SIDE, PATCH = 32, 8
# Its authors' names and shapes, but smaller: heads are 64 wide as theirs.
VISION_WIDTH, TEXT_WIDTH, DEPTH = 64, 128, 2
BERT_WORDS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "red", "blue", "heart", "sun", "cat", "##s")


def write_tiny_image_reward(folder: str | Path, seed: int = 0) -> Path:
    """ImageReward.pt and vocab.txt; with weights that scoring does not need, as in the published file."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(BERT_WORDS) + "\n")
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.1)
        + (1.0 if len(shape) == 1 and key.endswith("weight") else 0.0)
        for key, shape in image_reward_shapes().items()
    }
    torch.save(weights, folder / "ImageReward.pt")
    return folder


def image_reward_shapes() -> dict[str, tuple[int, ...]]:
    """Every weight's name and shape."""
    vision, text = "blip.visual_encoder.", "blip.text_encoder."
    shapes = {
        vision + "cls_token": (1, 1, VISION_WIDTH),
        vision + "pos_embed": (1, (SIDE // PATCH) ** 2 + 1, VISION_WIDTH),
        vision + "patch_embed.proj.weight": (VISION_WIDTH, 3, PATCH, PATCH),
        vision + "patch_embed.proj.bias": (VISION_WIDTH,),
        text + "embeddings.word_embeddings.weight": (len(BERT_WORDS), TEXT_WIDTH),
        text + "embeddings.position_embeddings.weight": (48, TEXT_WIDTH),
        "blip.visual_encoder_m.cls_token": (1, 1, VISION_WIDTH),
        "blip.vision_proj.weight": (8, VISION_WIDTH),
    }

    def linear(name: str, inputs: int, outputs: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (outputs, inputs), (outputs,)

    def norm(name: str, width: int) -> None:
        shapes[name + ".weight"], shapes[name + ".bias"] = (width,), (width,)

    for i in range(DEPTH):
        block, width = f"{vision}blocks.{i}.", VISION_WIDTH
        norm(block + "norm1", width)
        linear(block + "attn.qkv", width, 3 * width)
        linear(block + "attn.proj", width, width)
        norm(block + "norm2", width)
        linear(block + "mlp.fc1", width, 2 * width)
        linear(block + "mlp.fc2", 2 * width, width)
        layer, width = f"{text}encoder.layer.{i}.", TEXT_WIDTH
        for attention, source in (("attention", width), ("crossattention", VISION_WIDTH)):
            linear(f"{layer}{attention}.self.query", width, width)
            linear(f"{layer}{attention}.self.key", source, width)
            linear(f"{layer}{attention}.self.value", source, width)
            linear(f"{layer}{attention}.output.dense", width, width)
            norm(f"{layer}{attention}.output.LayerNorm", width)
        linear(layer + "intermediate.dense", width, 2 * width)
        linear(layer + "output.dense", 2 * width, width)
        norm(layer + "output.LayerNorm", width)
    norm(vision + "norm", VISION_WIDTH)
    norm(text + "embeddings.LayerNorm", TEXT_WIDTH)
    for place, inputs, outputs in ((0, TEXT_WIDTH, 40), (2, 40, 24), (4, 24, 16), (6, 16, 8), (7, 8, 1)):
        linear(f"mlp.layers.{place}", inputs, outputs)
    return shapes
