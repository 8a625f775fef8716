"""A CLIP model with random weights in a folder, with its tokenizer and picture processor, as people download.

transformers must load it as it loads the real ones, so every file is written by transformers itself.
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
