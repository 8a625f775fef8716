"""The demo's text side: captions, a byte-level BPE tokenizer of their words, and a small CLIPTextModel.

A caption is BOS + tokens + EOS, filled with the pad token to exactly 20; there is no attention mask, as in
SD3.
"""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import CLIPTextConfig, CLIPTextModel

from training.data.demo_encoders import PREFIX_TEXT
from training.data.demo_encoders import embed as embed
from training.data.demo_encoders import encode_ids as encode_ids
from training.data.demo_encoders import load_weights as load_weights
from training.demo.data import STYLES, DemoData

LENGTH = 20
BOS, EOS, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
TEMPLATES = (
    "{word}, {style} style",
    "a {word}, {style} style",
    "{word} emoji, {style} style",
    "{word} in {style} style",
    "an emoji of a {word} in {style} style",
    "{style} {word}",
)
UNSTYLED = ("{word}", "a {word}", "{word} emoji")


def train_tokenizer(demo: DemoData) -> Tokenizer:
    """The tokenizer of the icons' captions."""
    words = [word for words in demo.words for word in words]
    styles = [t.format(word="", style=style) for t in TEMPLATES for style in STYLES]
    return tokenizer_of(words + styles * 10, LENGTH)


def tokenizer_of(texts: list[str], length: int) -> Tokenizer:
    """Byte-level BPE in which every word of the texts is one token and any other text still encodes; captions
    are cut and filled to `length` tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Punctuation(), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=2000,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    ids = [(BOS, tokenizer.token_to_id(BOS)), (EOS, tokenizer.token_to_id(EOS))]
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A {EOS}", special_tokens=ids)
    return of_length(tokenizer, length)


def of_length(tokenizer: Tokenizer, length: int) -> Tokenizer:
    """The tokenizer, cutting and filling to so many tokens."""
    tokenizer.enable_truncation(length)
    tokenizer.enable_padding(length=length, pad_id=tokenizer.token_to_id(PAD), pad_token=PAD)
    return tokenizer


def build_text_encoder(tokenizer: Tokenizer) -> CLIPTextModel:
    """CLIPTextModel of two layers and width 256, 1.6 M parameters."""
    config = CLIPTextConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.padding["length"],
        projection_dim=256,
        bos_token_id=tokenizer.token_to_id(BOS),
        eos_token_id=tokenizer.token_to_id(EOS),
        pad_token_id=tokenizer.token_to_id(PAD),
    )
    return CLIPTextModel(config)


def with_prefix(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Names as in published CLIP files; transformers 5 drops `text_model.` inside the module, 4 does not."""
    return {f"{PREFIX_TEXT}{key.removeprefix(PREFIX_TEXT)}": value for key, value in weights.items()}


def random_caption(
    words: list[str], style: int, generator: torch.Generator, *, empty: float = 0.1, unstyled: float = 0.1
) -> str:
    """A caption a person might write for this icon; with the probabilities given, an empty one or one
    without its style.
    """
    kind, word, template = torch.rand(3, generator=generator).tolist()
    if kind < empty:
        return ""
    name = words[0] if word < 0.5 else words[int((word - 0.5) * 2 * len(words))]
    if kind < empty + unstyled:
        return UNSTYLED[int(template * len(UNSTYLED))].format(word=name)
    index = 0 if template < 0.4 else int((template - 0.4) / 0.6 * len(TEMPLATES))
    return TEMPLATES[index].format(word=name, style=STYLES[style])
