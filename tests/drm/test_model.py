"""The reward model: scores that depend on what they should and on nothing else, and clear refusals."""

import math

import pytest
import torch

from drm import DRM
from drm.head import ConvHead
from tests.tiny import randomise, tiny_drm


def test_shapes_and_attributes(drm, inputs):
    scores = drm.score(inputs[0], 0.5, *inputs[1:])
    assert scores.shape == (5,)
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    assert (drm.in_channels, drm.prompt_dim, drm.pooled_dim, drm.num_blocks) == (16, 48, 32, 2)


def test_scores_are_independent_of_their_batch(drm, inputs):
    together = drm.score(inputs[0], 0.3, *inputs[1:])
    assert together.std() > 0.01
    for row in range(5):
        alone = drm.score(*(inputs[0][row : row + 1], 0.3, *(t[row : row + 1] for t in inputs[1:])))
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=0)
    order = torch.tensor([4, 2, 0, 1, 3])
    shuffled = drm.score(*(inputs[0][order], 0.3, *(t[order] for t in inputs[1:])))
    torch.testing.assert_close(shuffled, together[order], atol=1e-5, rtol=0)


def test_one_prompt_and_one_sigma_serve_the_batch(drm, inputs):
    latents, prompt_embeds, pooled = inputs
    one = drm.score(latents, 0.3, prompt_embeds[:1], pooled[:1])
    each = drm.score(
        latents, torch.full((5,), 0.3), prompt_embeds[:1].expand(5, -1, -1), pooled[:1].expand(5, -1)
    )
    torch.testing.assert_close(one, each, atol=1e-6, rtol=0)


@pytest.mark.parametrize("what", ["latents", "sigma", "prompt", "pooled"])
def test_every_input_counts(drm, inputs, what):
    latents, prompt_embeds, pooled = inputs
    before = drm.score(latents, 0.3, prompt_embeds, pooled)
    after = drm.score(
        latents.flip(3) if what == "latents" else latents,
        0.6 if what == "sigma" else 0.3,
        prompt_embeds.flip(2) if what == "prompt" else prompt_embeds,
        pooled.flip(1) if what == "pooled" else pooled,
    )
    assert ((before - after).abs() > 1e-4).all()


def test_sigma_per_item(drm, inputs):
    sigma = torch.tensor([0.0, 0.25, 0.5, 0.75, 1.0])
    together = drm.score(inputs[0], sigma, *inputs[1:])
    for row in range(5):
        alone = drm.score(
            inputs[0][row : row + 1], float(sigma[row]), *(t[row : row + 1] for t in inputs[1:])
        )
        torch.testing.assert_close(alone, together[row : row + 1], atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [(2, 2), (4, 20), (48, 6)])
def test_non_square_latents(drm, inputs, size):
    latents = torch.randn(2, 16, *size)
    scores = drm.score(latents, 0.5, inputs[1][:2], inputs[2][:2])
    assert torch.isfinite(scores).all()
    turned = drm.score(latents.transpose(2, 3), 0.5, inputs[1][:2], inputs[2][:2])
    assert size[0] == size[1] or (scores - turned).abs().max() > 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_backbone_float32_head(inputs, dtype):
    full = tiny_drm(hidden=128, depth=3, num_kept=2, joint_attention_dim=48, pooled_projection_dim=32)
    reference = full.score(inputs[0], 0.5, *inputs[1:])
    half = full.to(dtype)
    assert half.backbone.dtype == dtype
    assert {p.dtype for p in half.head.parameters()} == {torch.float32}
    scores = half.score(inputs[0].to(dtype), 0.5, *inputs[1:])
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, reference, atol=0.1, rtol=0)


def test_head_stays_float32_under_autocast(drm, inputs):
    seen = []
    handle = drm.head.out.register_forward_hook(lambda module, args, output: seen.append(args[0].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        drm.score(inputs[0], 0.5, *inputs[1:])
    handle.remove()
    assert seen == [torch.float32]


def test_forward_trains(inputs):
    drm = tiny_drm(hidden=64, depth=2, num_kept=1, joint_attention_dim=48, pooled_projection_dim=32)
    drm(inputs[0], torch.rand(5), *inputs[1:]).sum().backward()
    assert drm.head.out.weight.grad.abs().sum() > 0
    assert drm.backbone.pos_embed.proj.weight.grad.abs().sum() > 0


def test_head_reads_the_map_row_by_row():
    """A head on a 2 x 3 grid sees its neighbours: swapping rows and columns changes the score."""
    head = randomise(ConvHead(8, hidden=16), 0)
    tokens = torch.randn(1, 6, 8)
    transposed = tokens.reshape(1, 2, 3, 8).transpose(1, 2).reshape(1, 6, 8)
    assert (head(tokens, 2, 3) - head(tokens, 3, 2)).abs() > 1e-4
    with torch.no_grad():
        for conv in (head.conv[0], head.conv[3]):
            conv.weight.copy_(conv.weight.transpose(2, 3).clone())
    mirrored = head(transposed, 3, 2)
    with torch.no_grad():
        for conv in (head.conv[0], head.conv[3]):
            conv.weight.copy_(conv.weight.transpose(2, 3).clone())
    torch.testing.assert_close(mirrored, head(tokens, 2, 3), atol=1e-5, rtol=0)


def test_head_and_backbone_must_fit(drm):
    with pytest.raises(ValueError, match="width 64, the backbone's are 128"):
        DRM(drm.backbone, ConvHead(64))
    with pytest.raises(ValueError, match="2x3 grid"):
        drm.head(torch.zeros(1, 5, 128), 2, 3)


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        ("latents", torch.zeros(1, 4, 8, 8), "4 channels, this reward model reads 16"),
        ("latents", torch.zeros(0, 16, 8, 8), "non-empty"),
        ("latents", torch.zeros(16, 8, 8), "non-empty"),
        ("latents", torch.zeros(1, 16, 7, 8), "multiples of 2"),
        ("latents", torch.full((1, 16, 8, 8), math.nan), "NaN"),
        ("latents", torch.full((1, 16, 8, 8), math.inf), "NaN or infinity"),
        ("sigma", 1.5, "wanted 0"),
        ("sigma", -0.1, "wanted 0"),
        ("sigma", math.nan, "wanted 0"),
        ("sigma", torch.tensor([0.1, 0.2]), "2 sigmas for 1 latents"),
        ("prompt", torch.zeros(1, 5, 4096), "wants width 48"),
        ("prompt", torch.zeros(3, 5, 48), "3 prompt embeddings for 1"),
        ("pooled", torch.zeros(1, 2048), "wants width 32"),
        ("pooled", None, "pooled prompt embedding is missing"),
    ],
)
def test_bad_input_is_refused(drm, place, value, message):
    arguments = {
        "latents": torch.zeros(1, 16, 8, 8),
        "sigma": 0.5,
        "prompt": torch.zeros(1, 5, 48),
        "pooled": torch.zeros(1, 32),
        place: value,
    }
    with pytest.raises(ValueError, match=message):
        drm.score(*arguments.values())
