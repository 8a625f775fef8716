"""Transformers of diffusers as trunks: what a hook reads is what an ordinary pass has there."""

import pytest
import torch

from drm import SharedDRM
from drm.backbone import backbone_from_transformer
from drm.diffusers_trunk import Prompts, trunk_facts, trunk_tokens
from drm.head import ConvHead
from tests.tiny import randomise, tiny_transformer

SIGMA = 0.6


def flux():
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel(
        in_channels=64,
        num_layers=2,
        num_single_layers=3,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        pooled_projection_dim=20,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def qwen_image():
    from diffusers import QwenImageTransformer2DModel

    return QwenImageTransformer2DModel(
        in_channels=64,
        out_channels=16,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )


def z_image():
    from diffusers import ZImageTransformer2DModel

    return ZImageTransformer2DModel(
        dim=32,
        n_layers=4,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=24,
        axes_dims=[4, 6, 6],
        axes_lens=[64, 16, 16],
    )


def sd3():
    return tiny_transformer(hidden=64, depth=4, joint_attention_dim=24, pooled_projection_dim=20)


# family -> (builder, width, blocks, taps)
FAMILIES = {
    "sd3": (sd3, 64, 4, (1, 3)),
    "flux": (flux, 32, 5, (1, 2, 4)),
    "qwen_image": (qwen_image, 32, 4, (2, 4)),
    "z_image": (z_image, 32, 4, (1, 3)),
}


@pytest.fixture(params=FAMILIES)
def family(request):
    build, width, blocks, taps = FAMILIES[request.param]
    return request.param, randomise(build(), 0).eval().requires_grad_(False), width, blocks, taps


def prompts(count=2, length=7):
    generator = torch.Generator().manual_seed(5)
    embeds = torch.randn(count, length, 24, generator=generator)
    return Prompts(embeds, torch.randn(count, 20, generator=generator))


def latents(count=4, height=8, width=6):
    return torch.randn(count, 16, height, width, generator=torch.Generator().manual_seed(3))


def test_facts(family):
    name, transformer, width, blocks, taps = family
    facts = trunk_facts(transformer, taps)
    assert (facts.family, facts.width, facts.num_blocks, facts.taps) == (name, width, blocks, taps)
    assert facts.latent_channels == 16
    assert facts.fingerprint["layout"] == "diffusers"
    with pytest.raises(ValueError, match=f"ascending numbers from 1 to {blocks}"):
        trunk_facts(transformer, (blocks + 1,))


def recorded(transformer, number, lists, run):
    blocks = [block for name in lists for block in getattr(transformer, name)]
    seen = []
    handle = blocks[number - 1].register_forward_hook(lambda module, inputs, output: seen.append(output))
    try:
        run()
    finally:
        handle.remove()
    return seen[0]


def test_taps_are_those_of_an_ordinary_pass(family):
    """Of the whole pass, which the family's call makes when nothing ends it."""
    from drm import diffusers_trunk

    name, transformer, width, _, taps = family
    row = diffusers_trunk._FAMILIES[type(transformer).__name__]
    x, two = latents(2), prompts()
    found = trunk_tokens(transformer, taps, two)(x, SIGMA, torch.arange(2))
    assert (found.rows, found.columns) == (4, 3)
    for number, tokens in zip(taps, found.tokens, strict=True):
        assert tokens.shape == (2, 12, width)
        output = recorded(transformer, number, row.lists, lambda: row.call(transformer, x, SIGMA, two))
        assert torch.equal(tokens, row.image(output, 12)), (name, number)


def test_a_patch_changes_its_own_token_most(family):
    _, transformer, _, _, taps = family
    tokens = trunk_tokens(transformer, taps[:1], prompts())
    x = latents(1)
    changed = x.clone()
    changed[..., 2:4, 4:6] += 1
    items = torch.zeros(1, dtype=torch.long)
    before, after = (tokens(z, SIGMA, items).tokens[0] for z in (x, changed))
    assert (after - before).abs().sum(dim=(0, 2)).argmax() == 1 * 3 + 2


def test_candidates_have_their_own_prompts_and_nothing_of_each_other(family):
    _, transformer, _, _, taps = family
    tokens = trunk_tokens(transformer, taps, prompts())
    x, items = latents(), torch.tensor([0, 1, 1, 0])
    together = tokens(x, SIGMA, items)
    for i in range(4):
        alone = tokens(x[i : i + 1], SIGMA, items[i : i + 1])
        for a, b in zip(together.tokens, alone.tokens, strict=True):
            torch.testing.assert_close(a[i : i + 1], b, atol=2e-5, rtol=0)
    other = tokens(x, SIGMA, 1 - items)
    assert (other.tokens[-1] - together.tokens[-1]).abs().max() > 1e-3


def test_a_head_scores_them(family):
    _, transformer, _, _, taps = family
    facts = trunk_facts(transformer, taps)
    drm = randomise(SharedDRM(facts, ConvHead(16, hidden=16)), 1).eval()
    scores = drm.score(
        trunk_tokens(transformer, taps, prompts())(latents(), SIGMA, torch.zeros(4).long()), SIGMA
    )
    assert scores.isfinite().all()
    assert len(set(scores.tolist())) == 4


def test_sd3_s_tokens_are_the_truncated_backbone_s():
    transformer = randomise(sd3(), 0).eval()
    two = prompts()
    backbone = backbone_from_transformer(transformer, 3)
    tokens = trunk_tokens(transformer, (3,), two)(latents(2), SIGMA, torch.arange(2)).tokens[0]
    with torch.no_grad():
        own = backbone(latents(2), torch.full((2,), 1000 * SIGMA), two.embeds, two.pooled)
    torch.testing.assert_close(tokens, own, atol=1e-5, rtol=0)


def test_padding_of_a_caption_is_not_read():
    transformer = randomise(z_image(), 0).eval()
    one, items = prompts(1), torch.zeros(1, dtype=torch.long)
    mask = torch.ones(1, 7)
    mask[:, 5:] = 0
    masked = trunk_tokens(transformer, (3,), one._replace(mask=mask))(latents(1), SIGMA, items)
    short = trunk_tokens(transformer, (3,), Prompts(one.embeds[:, :5]))(latents(1), SIGMA, items)
    assert torch.equal(masked.tokens[0], short.tokens[0])


def test_other_classes_and_odd_sizes_are_refused():
    from diffusers import PixArtTransformer2DModel

    with pytest.raises(
        ValueError, match="PixArtTransformer2DModel is not a known trunk: wanted one of SD3Tr"
    ):
        trunk_facts(
            PixArtTransformer2DModel(num_layers=1, num_attention_heads=1, cross_attention_dim=72), (1,)
        )
    tokens = trunk_tokens(randomise(sd3(), 0), (1,), prompts())
    with pytest.raises(ValueError, match="H and W even"):
        tokens(latents(2, height=7), SIGMA, torch.arange(2))
