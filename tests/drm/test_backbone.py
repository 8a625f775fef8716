"""The truncated transformer against the whole one, SD3.5-Medium's shape, and ComfyUI-layout checkpoints."""

import pytest
import torch

from drm.backbone import (
    BackboneConfig,
    TruncatedSD3,
    backbone_from_transformer,
    sd35_medium_config,
    truncate_state_dict,
)


def tokens_of_whole_model(transformer, num_kept, latents, timestep, prompt_embeds, pooled):
    """Image tokens after a block of the untouched model, caught on its way forward."""
    caught = []
    handle = transformer.transformer_blocks[num_kept - 1].register_forward_hook(
        lambda module, args, output: caught.append(output[1])
    )
    with torch.no_grad():
        transformer(latents, prompt_embeds, pooled, timestep)
    handle.remove()
    return caught[0]


@pytest.mark.parametrize("num_kept", [1, 2, 3])
@pytest.mark.parametrize("size", [(12, 12), (6, 20)])
def test_tokens_are_those_of_the_whole_model(transformer, num_kept, size):
    torch.manual_seed(0)
    inputs = (
        torch.randn(2, 16, *size),
        torch.tensor([250.0, 900.0]),
        torch.randn(2, 7, 48),
        torch.randn(2, 256),
    )
    backbone = backbone_from_transformer(transformer, num_kept)
    with torch.no_grad():
        ours = backbone(*inputs)
    whole = tokens_of_whole_model(transformer, num_kept, *inputs)
    assert ours.shape == (2, size[0] * size[1] // 4, 128)
    torch.testing.assert_close(ours, whole, atol=1e-6, rtol=1e-6)


def test_unused_text_weights_are_left_out(transformer):
    backbone = backbone_from_transformer(transformer, 2)
    last = backbone.transformer_blocks[-1]
    assert last.ff_context is None
    assert last.attn.to_add_out is None
    assert last.norm1_context.linear.weight.shape == (2 * 128, 128)
    whole = dict(transformer.named_parameters())
    assert "transformer_blocks.1.ff_context.net.2.weight" in whole
    assert not any("ff_context" in key for key in last.state_dict())
    shift, scale = whole["transformer_blocks.1.norm1_context.linear.weight"].chunk(6)[:2]
    assert torch.equal(last.norm1_context.linear.weight, torch.cat((scale, shift)))


def test_every_kept_weight_has_a_gradient(transformer):
    backbone = backbone_from_transformer(transformer, 2)
    tokens = backbone(
        torch.randn(1, 16, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 48), torch.randn(1, 256)
    )
    tokens.square().sum().backward()
    without = [
        name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0
    ]
    # The last block's text queries attend, and what they gather would only feed the text.
    assert all("add_q" in name or "norm_added_q" in name for name in without), without


def test_gradient_checkpointing_changes_nothing(transformer):
    gradients = []
    for enabled in (False, True):
        backbone = backbone_from_transformer(transformer, 2)
        backbone.gradient_checkpointing = enabled
        torch.manual_seed(0)
        inputs = torch.randn(1, 16, 4, 4), torch.tensor([500.0]), torch.randn(1, 3, 48), torch.randn(1, 256)
        backbone(*inputs).square().sum().backward()
        gradients.append(backbone.context_embedder.weight.grad)
    torch.testing.assert_close(*gradients)


def test_weights_are_copies(transformer):
    backbone = backbone_from_transformer(transformer, 1)
    before = transformer.context_embedder.weight.clone()
    with torch.no_grad():
        backbone.context_embedder.weight.zero_()
    assert torch.equal(transformer.context_embedder.weight, before)


def test_sd35_medium_on_the_meta_device():
    """21 of 24 blocks: 2.01 B parameters without the position table, 31 M of them unused text output."""
    from diffusers import SD3Transformer2DModel

    with torch.device("meta"):
        backbone = TruncatedSD3(sd35_medium_config())
        whole = SD3Transformer2DModel(
            sample_size=128,
            patch_size=2,
            in_channels=16,
            out_channels=16,
            num_layers=24,
            attention_head_dim=64,
            num_attention_heads=24,
            joint_attention_dim=4096,
            caption_projection_dim=1536,
            pooled_projection_dim=2048,
            pos_embed_max_size=384,
            dual_attention_layers=tuple(range(13)),
            qk_norm="rms_norm",
        )
    assert BackboneConfig.from_diffusers(whole.config, 21) == backbone.config
    blocks = backbone.transformer_blocks
    assert [block.attn2 is not None for block in blocks] == [True] * 13 + [False] * 8
    assert backbone.pos_embed.pos_embed.shape == (1, 384 * 384, 1536)
    count = sum(parameter.numel() for parameter in backbone.parameters())
    unused = sum(
        sum(parameter.numel() for parameter in module.parameters())
        for module in (whole.transformer_blocks[20].attn.to_add_out, whole.transformer_blocks[20].ff_context)
    ) + 4 * 1536 * (1536 + 1)
    assert unused == pytest.approx(30.7e6, rel=0.01)
    assert round((count + unused) / 1e9, 2) == 2.01
    assert round(count / 1e9, 2) == 1.98
    assert (blocks[-1].ff_context, blocks[-1].attn.to_add_out) == (None, None)
    assert blocks[-2].ff_context is not None
    kept = truncate_state_dict(whole.state_dict(), backbone.config)
    expected = {key: value.shape for key, value in backbone.state_dict().items()}
    assert {key: value.shape for key, value in kept.items()} == expected


def test_sd35_medium_forward_shape_on_the_meta_device():
    with torch.device("meta"):
        backbone = TruncatedSD3(sd35_medium_config())
        tokens = backbone(
            torch.empty(1, 16, 64, 64), torch.empty(1), torch.empty(1, 333, 4096), torch.empty(1, 2048)
        )
    assert tokens.shape == (1, 1024, 1536)


@pytest.mark.parametrize("size", [(7, 8), (8, 5), (0, 8)])
def test_odd_sizes_are_refused(transformer, size):
    with pytest.raises(ValueError, match="multiples of 2"):
        backbone_from_transformer(transformer, 1).token_grid(*size)


def test_too_large_latents_are_refused(transformer):
    backbone = backbone_from_transformer(transformer, 1)
    assert backbone.token_grid(48, 2) == (24, 1)
    with pytest.raises(ValueError, match="reach 48 a side"):
        backbone.token_grid(50, 2)


@pytest.mark.parametrize("num_kept", [0, 4])
def test_more_blocks_than_there_are(transformer, num_kept):
    with pytest.raises(ValueError, match="wanted 1 to 3"):
        backbone_from_transformer(transformer, num_kept)


@pytest.mark.parametrize("factor", [2, 4])
def test_a_coarse_token_starts_as_the_mean_of_the_fine_ones(transformer, factor):
    fine = backbone_from_transformer(transformer, 2)
    coarse = backbone_from_transformer(transformer, 2, coarse=factor)
    assert coarse.config.patch_size == 2 * factor
    latents = torch.randn(2, 16, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        grid = fine.pos_embed(latents).transpose(1, 2).unflatten(2, (8, 8))
        wanted = torch.nn.functional.avg_pool2d(grid, factor).flatten(2).transpose(1, 2)
        torch.testing.assert_close(coarse.pos_embed(latents), wanted, atol=1e-5, rtol=1e-5)
    for name, value in fine.transformer_blocks.state_dict().items():
        assert torch.equal(value, coarse.transformer_blocks.state_dict()[name])


def test_coarse_tokens_run_and_say_what_sizes_they_take(transformer):
    coarse = backbone_from_transformer(transformer, 2, coarse=2)
    shapes = (3, 16, 12, 8), (3,), (3, 7, 48), (3, 256)
    tokens = coarse(*(torch.rand(shape, generator=torch.Generator().manual_seed(0)) for shape in shapes))
    assert tokens.shape == (3, 6, 128)
    with pytest.raises(ValueError, match="multiples of 4, that is pictures in multiples of 32"):
        coarse.token_grid(14, 8)


@pytest.mark.parametrize("factor", [0, 5])
def test_positions_that_cannot_be_shared_out(transformer, factor):
    with pytest.raises(ValueError, match=f"cannot be {factor} times as coarse: wanted a divisor of the 24"):
        backbone_from_transformer(transformer, 2, coarse=factor)
