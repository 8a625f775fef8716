"""A CLIP model with random weights in a folder, with its tokenizer and picture processor, as people download.

transformers must load it as it loads the real ones, so every file is written by transformers itself.
"""

from pathlib import Path

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
