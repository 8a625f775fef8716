"""SD3's block with the two streams of picture and text, walked so that siblings may share the text's part.

    normed  = LayerNorm(tokens) (1 + scale) + shift             modulation = Linear(SiLU(temb)), either stream
    image attends to (image, text), the text to the same; then both go through their feed-forwards

The modules are those of diffusers' JointTransformerBlock, and what comes out is what its own forward gives.
They are walked by hand in its order of operations, so that adapters in place of a layer count and what every
candidate of a prompt has in common is worked out once.
"""

import functools
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers.models import attention
from torch import Tensor, nn

# Query, key and value, each (n, heads, T, head width).
Projections = tuple[Tensor, Tensor, Tensor]


class Shared(NamedTuple):
    """What a block need not work out again: image (n, 6 or 9, D) and text (n, 6 or 2, D), its modulation in
    the order shift, scale, gate, ... of the attention, the feed-forward and the second attention; words: the
    text's query, key and value, where they are known.
    """

    image: Tensor
    text: Tensor
    words: Projections | None

    def of(self, item: Tensor) -> "Shared":
        """What candidates with the prompts item (n,) take of it."""
        words = None if self.words is None else tuple(part[item] for part in self.words)
        return Shared(self.image[item], self.text[item], words)


class JointTransformerBlock(attention.JointTransformerBlock):
    """diffusers' block, weights and names; the name too, which FSDP's settings know blocks by."""

    def forward(
        self, tokens: Tensor, context: Tensor, signal: Tensor | None, shared: Shared | None = None
    ) -> tuple[Tensor | None, Tensor]:
        """Text (n, T, D), None where nothing reads it, and image tokens (n, L, D) after the block.

        signal: SiLU(temb) (n, D), needed where nothing is shared.
        """
        if shared is None:
            shared = Shared(*modulations(self, signal, context.dtype), None)
        return step(self, tokens, context, *shared)


def step(
    block: nn.Module, tokens: Tensor, context: Tensor, image: Tensor, text: Tensor, words: Projections | None
) -> tuple[Tensor | None, Tensor]:
    """A block's two streams. A function, so that blocks of one structure may share what is compiled of it."""
    words = text_projections(block, context, text) if words is None else words
    tokens, heard = _image_stream(block, tokens, words, image)
    return None if block.context_pre_only else _text_stream(block, context, heard, text), tokens


def modulations(block: nn.Module, signal: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(image, text) as `Shared` has them. dtype: of the text."""
    image = _modulation(block.norm1.linear, signal)
    text = _modulation(block.norm1_context.linear, signal.to(dtype) if block.context_pre_only else signal)
    # AdaLayerNormContinuous has scale before shift.
    return image, text.flip(1) if block.context_pre_only else text


def _modulation(linear: nn.Module, signal: Tensor) -> Tensor:
    return linear(signal).unflatten(1, (-1, signal.shape[1]))


def _parts(modulation: Tensor) -> tuple[Tensor, ...]:
    """(n, parts, D) as so many (n, 1, D)."""
    return modulation.unsqueeze(2).unbind(1)


def _heads(projected: Tensor, heads: int, norm: nn.Module | None) -> Tensor:
    """(n, L, D) -> (n, heads, L, D / heads), with the norm of queries and keys where there is one."""
    split = projected.unflatten(-1, (heads, -1)).transpose(1, 2)
    return split if norm is None else norm(split)


def text_projections(block: nn.Module, context: Tensor, modulation: Tensor) -> Projections:
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
    # It has no gradient.
    plain = plain and not torch.is_grad_enabled()
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


def _image_stream(
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


def _text_stream(block: nn.Module, context: Tensor, heard: Tensor, modulation: Tensor) -> Tensor:
    """A block's text stream (n, T, D) after it, from what it heard there."""
    _, _, gate, shift_ff, scale_ff, gate_ff = _parts(modulation)
    context = context + gate * block.attn.to_add_out(heard)
    return context + gate_ff * _feed_forward(
        block.ff_context, block.norm2_context(context) * (1 + scale_ff) + shift_ff
    )
