"""What sibling candidates share, computed once for each prompt and sigma, and the blocks walked with it.

    temb = time(1000 sigma) + pooled text;  context = Linear(text)                      one for each prompt
    modulation_i = Linear_i(SiLU(temb)) of either stream, in every block i              likewise
    q, k, v of the text in the first block                                              likewise
    image attends to (image, text), then image and text go through their feed-forwards  each candidate

The blocks are diffusers' JointTransformerBlocks, walked by hand through their own modules in their order of
operations, so that adapters in place of a layer count. The text that leaves a block is worked out when a
later block wants it, so a walk may stop after any block, and rows of the batch leave there.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .backbone import Features, TruncatedSD3

# Query, key and value, each (n, heads, T, head width).
Projections = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Prepared:
    """For B prompts, each at its sigma. temb (B, D), context (B, T, D); image and text: a block's modulation,
    (B, 6 or 9, D) and (B, 6 or 2, D), in the order shift, scale, gate, ... of the attention, the feed-forward
    and the second attention; first: the text's query, key and value in the first block.
    """

    temb: Tensor
    context: Tensor
    image: tuple[Tensor, ...]
    text: tuple[Tensor, ...]
    first: Projections


@dataclass(frozen=True)
class Rows:
    """n candidates on their way: item (n,) is each one's row in Prepared, done the blocks behind it. tokens
    (n, L, D) and context (n, T, D) as the stream stands, heard (n, T, D) what the text's attention gave in
    the last block and has not been added yet; taps as in Features.
    """

    item: Tensor
    tokens: Tensor
    context: Tensor
    heard: Tensor | None = None
    image: tuple[Tensor, ...] = ()
    text: tuple[Tensor, ...] = ()
    done: int = 0

    def take(self, index: Tensor | slice) -> "Rows":
        """Some of the rows."""
        return self._each(lambda tensor: tensor[index])

    @staticmethod
    def join(parts: Sequence["Rows"]) -> "Rows":
        """Rows that have come equally far, as one batch."""
        if len(parts) == 1:
            return parts[0]
        first, columns = parts[0], zip(*(part._tensors() for part in parts), strict=True)
        joined = iter([torch.cat(column) for column in columns])
        return first._each(lambda _: next(joined))

    def _tensors(self) -> list[Tensor]:
        found: list[Tensor] = []
        self._each(lambda tensor: found.append(tensor) or tensor)
        return found

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Rows":
        return dataclasses.replace(
            self,
            item=change(self.item),
            tokens=change(self.tokens),
            context=change(self.context),
            heard=None if self.heard is None else change(self.heard),
            image=tuple(change(tap) for tap in self.image),
            text=tuple(change(tap) for tap in self.text),
        )


def prepare(
    backbone: TruncatedSD3, timestep: Tensor, prompt_embeds: Tensor, pooled_prompt_embeds: Tensor
) -> Prepared:
    """What B prompts (B, T, ...), pooled (B, ...) need at timestep (B,) = 1000 sigma, whatever is scored."""
    dtype, blocks = backbone.dtype, backbone.transformer_blocks
    temb = backbone.time_text_embed(timestep, pooled_prompt_embeds.to(dtype))
    context = backbone.context_embedder(prompt_embeds.to(dtype))
    signal = F.silu(temb)
    image = tuple(_modulation(block.norm1.linear, signal) for block in blocks)
    text = tuple(
        # AdaLayerNormContinuous has scale before shift.
        _modulation(block.norm1_context.linear, signal.to(context.dtype)).flip(1)
        if block.context_pre_only
        else _modulation(block.norm1_context.linear, signal)
        for block in blocks
    )
    first = _text_projections(blocks[0], context, text[0])
    return Prepared(temb, context, image, text, first)


def _modulation(linear: nn.Module, signal: Tensor) -> Tensor:
    return linear(signal).unflatten(1, (-1, signal.shape[1]))


def _parts(modulation: Tensor) -> tuple[Tensor, ...]:
    """(n, parts, D) as so many (n, 1, D)."""
    return modulation.unsqueeze(2).unbind(1)


def _heads(projected: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
    """(n, L, D) -> (n, heads, L, D / heads), with the norm of queries and keys where there is one."""
    split = projected.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


def _text_projections(block: nn.Module, context: Tensor, modulation: Tensor) -> Projections:
    shift, scale, *_ = _parts(modulation)
    attention = block.attn
    normed = block.norm1_context.norm(context) * (1 + scale) + shift
    query = _heads(attention.add_q_proj(normed), attention.heads, attention.norm_added_q)
    key = _heads(attention.add_k_proj(normed), attention.heads, attention.norm_added_k)
    return query, key, _heads(attention.add_v_proj(normed), attention.heads, None)


def _attend(attention: nn.Module, normed: Tensor, text: Projections | None) -> tuple[Tensor, Tensor | None]:
    """What image tokens (n, L, D) hear, through the output projection, and what the text hears before its."""
    streams = [
        _heads(attention.to_q(normed), attention.heads, attention.norm_q),
        _heads(attention.to_k(normed), attention.heads, attention.norm_k),
        _heads(attention.to_v(normed), attention.heads, None),
    ]
    if text is not None:
        streams = [torch.cat(both, dim=2) for both in zip(streams, text, strict=True)]
    gathered = F.scaled_dot_product_attention(*streams).transpose(1, 2).flatten(2)
    image, heard = gathered.split((normed.shape[1], gathered.shape[1] - normed.shape[1]), dim=1)
    # A linear layer takes a slow way with slices.
    image, heard = image.contiguous(), heard.contiguous()
    for layer in attention.to_out:
        image = layer(image)
    return image, heard if text is not None else None


def _feed_forward(ff: nn.Module, tokens: Tensor) -> Tensor:
    first = ff.net[0]
    if not _fuses_gelu(first.proj, tokens):
        return ff(tokens)
    weight, bias = first.proj.weight, first.proj.bias
    return ff.net[2](torch.ops.mkldnn._linear_pointwise(tokens, weight, bias, "gelu", [], first.approximate))


def _fuses_gelu(linear: nn.Module, tokens: Tensor) -> bool:
    """Whether oneDNN can do a layer and its GELU in one: in bfloat16 on a CPU, where tanh alone costs more
    than the layer does.
    """
    plain = type(linear) is nn.Linear and tokens.dtype == linear.weight.dtype == torch.bfloat16
    return plain and tokens.device.type == "cpu" and not torch.compiler.is_compiling() and _has_fused_gelu()


@functools.cache
def _has_fused_gelu() -> bool:
    try:
        ops = torch.ops.mkldnn
        if not (torch.backends.mkldnn.is_available() and ops._is_mkldnn_bf16_supported()):
            return False
        ones = torch.ones(1, 1, dtype=torch.bfloat16)
        fused = ops._linear_pointwise(ones, ones, ones[0], "gelu", [], "tanh")
        return torch.allclose(fused, F.gelu(ones + ones, approximate="tanh"), atol=0.02)
    except (AttributeError, RuntimeError, TypeError):
        return False


def image_step(
    block: nn.Module, tokens: Tensor, text: Projections, modulation: Tensor
) -> tuple[Tensor, Tensor | None]:
    """A block's image stream: tokens (n, L, D) after it, and what the text heard in its attention."""
    shift, scale, gate, shift_ff, scale_ff, gate_ff, *second = _parts(modulation)
    normed = block.norm1.norm(tokens)
    image, heard = _attend(block.attn, normed * (1 + scale) + shift, text)
    tokens = tokens + gate * image
    if second:
        shift, scale, gate = second
        tokens = tokens + gate * _attend(block.attn2, normed * (1 + scale) + shift, None)[0]
    return tokens + gate_ff * _feed_forward(block.ff, block.norm2(tokens) * (1 + scale_ff) + shift_ff), heard


def finish_text(block: nn.Module, context: Tensor, heard: Tensor, modulation: Tensor) -> Tensor:
    """A block's text stream (n, T, D) after it, from what it heard there."""
    _, _, gate, shift_ff, scale_ff, gate_ff = _parts(modulation)
    context = context + gate * block.attn.to_add_out(heard)
    return context + gate_ff * _feed_forward(
        block.ff_context, block.norm2_context(context) * (1 + scale_ff) + shift_ff
    )


def text_step(
    before: nn.Module, block: nn.Module, context: Tensor, heard: Tensor, was: Tensor, modulation: Tensor
) -> tuple[Tensor, Projections]:
    """Between two blocks: the text that leaves the one, and its projections in the other."""
    context = finish_text(before, context, heard, was)
    return context, _text_projections(block, context, modulation)


class Steps(NamedTuple):
    """What a walk is made of; compiled or plain."""

    image: Callable[..., tuple[Tensor, Tensor | None]] = image_step
    text: Callable[..., tuple[Tensor, Projections]] = text_step


PLAIN = Steps()


def enter(backbone: TruncatedSD3, latents: Tensor, prepared: Prepared, item_index: Tensor) -> Rows:
    """Latents (n, C, H, W) before the first block; item_index (n,): the prompt of each."""
    backbone.token_grid(*latents.shape[-2:])
    tokens = backbone.pos_embed(latents.to(backbone.dtype)).contiguous()
    context, config = prepared.context[item_index], backbone.config
    image = (tokens,) if 0 in config.image_taps else ()
    text = (context,) if 0 in config.text_taps else ()
    return Rows(item_index, tokens, context, None, image, text)


def walk(backbone: TruncatedSD3, prepared: Prepared, rows: Rows, upto: int, steps: Steps = PLAIN) -> Rows:
    """The rows after `upto` blocks."""
    config, blocks, item = backbone.config, backbone.transformer_blocks, rows.item
    tokens, context, heard, image, text = rows.tokens, rows.context, rows.heard, rows.image, rows.text
    for index in range(rows.done, upto):
        block = blocks[index]
        if index == 0:
            words = tuple(part[item] for part in prepared.first)
        else:
            was, now = prepared.text[index - 1][item], prepared.text[index][item]
            context, words = steps.text(blocks[index - 1], block, context, heard, was, now)
            text = (*text, context) if index in config.text_taps else text
        tokens, heard = steps.image(block, tokens, words, prepared.image[index][item])
        image = (*image, tokens) if index + 1 in config.image_taps else image
    if upto == config.num_kept and config.keeps_text_output:
        context, heard = finish_text(blocks[-1], context, heard, prepared.text[-1][item]), None
        text = (*text, context)
    return Rows(item, tokens, context, heard, image, text, upto)


def features(prepared: Prepared, rows: Rows) -> Features:
    """What a head reads, of rows that have come to the end."""
    return Features(rows.tokens, list(rows.image), list(rows.text), prepared.temb[rows.item])
