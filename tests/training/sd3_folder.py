"""A diffusers SD3 pipeline folder with random weights and tokenizers made on the spot, a few hundred kB."""

from __future__ import annotations

from pathlib import Path

import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, StableDiffusion3Pipeline
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
)

from tests.tiny import randomise, tiny_transformer

TEXT = """sample fluent flat noto twemoji style a cat on the moon in own words with stars, red green blue
0 1 2 3 4 5 6 7 8 9 house tree emoji picture"""
CLIP_WIDTHS, T5_WIDTH = (32, 64), 128


def clip_tokenizer(folder: Path) -> CLIPTokenizer:
    """Byte-pair tokens from TEXT in the two files CLIP's tokenizer reads."""
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=600,
        show_progress=False,
        end_of_word_suffix="</w>",
        special_tokens=["<|startoftext|>", "<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(TEXT.split(), trainer)
    tokenizer.model.save(str(folder))
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77, pad_token="<|endoftext|>")


def t5_tokenizer() -> T5TokenizerFast:
    """Word pieces from TEXT with T5's pad, end and unknown tokens."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -10.0)]
    words = sorted({f"▁{word}" for word in TEXT.split()} | set(TEXT.replace("\n", " ")) | {"▁"})
    tokenizer = Tokenizer(models.Unigram([*pieces, *((word, -float(len(word))) for word in words)], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", tokenizer.token_to_id("</s>"))]
    )
    return T5TokenizerFast(tokenizer_object=tokenizer, extra_ids=0)


def _clip(tokenizer: CLIPTokenizer, width: int, seed: int) -> CLIPTextModelWithProjection:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=2 * width,
        projection_dim=width,
        num_hidden_layers=3,
        num_attention_heads=2,
        max_position_embeddings=77,
        hidden_act="gelu" if seed % 2 else "quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return randomise(CLIPTextModelWithProjection(config), seed).eval()


def _t5(tokenizer: T5TokenizerFast) -> T5EncoderModel:
    config = T5Config(
        vocab_size=len(tokenizer),
        d_model=T5_WIDTH,
        d_kv=16,
        d_ff=128,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return randomise(T5EncoderModel(config), 3).eval()


def _vae() -> AutoencoderKL:
    torch.manual_seed(4)
    return AutoencoderKL(
        block_out_channels=(16, 16, 16, 16),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=1,
        latent_channels=16,
        norm_num_groups=8,
        scaling_factor=1.5305,
        shift_factor=0.0609,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ).eval()


def build_pipeline(folder: Path, *, t5: bool = True) -> StableDiffusion3Pipeline:
    """The pipeline as it comes back from `folder`; one CLIP tokenizer in the newer single file, the other in
    the two files SD3.5 has.
    """
    (folder / "tokenizer_2").mkdir(parents=True)
    tokenizer = clip_tokenizer(folder / "tokenizer_2")
    text3 = t5_tokenizer() if t5 else None
    pipeline = StableDiffusion3Pipeline(
        transformer=tiny_transformer(64, 1, joint_attention_dim=T5_WIDTH, pooled_projection_dim=96),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=_vae(),
        text_encoder=_clip(tokenizer, CLIP_WIDTHS[0], 1),
        text_encoder_2=_clip(tokenizer, CLIP_WIDTHS[1], 2),
        text_encoder_3=_t5(text3) if t5 else None,
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        tokenizer_3=text3,
    )
    pipeline.save_pretrained(folder)
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    without = {} if t5 else {"text_encoder_3": None, "tokenizer_3": None}
    return StableDiffusion3Pipeline.from_pretrained(folder, local_files_only=True, **without)
