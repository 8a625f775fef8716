"""The DRM authors' head, on the model's own last layers, against diffusers' transformer and functions."""

import pytest
import torch
import torch.nn.functional as F

from drm import DRM, load_drm, save_drm
from drm.backbone import TruncatedSD3, backbone_from_transformer, coarsened, sd35_large_config
from drm.head import ConvGNHead, RowDropout
from tests.tiny import randomise, tiny_transformer


@pytest.fixture(scope="module")
def transformer():
    return tiny_transformer(64, 3, dual_attention_layers=(0,)).requires_grad_(False)


def make(transformer, num_kept=2):
    backbone = backbone_from_transformer(transformer, num_kept, keeps_output=True)
    head = randomise(ConvGNHead(widths=(32, 64, 64)), 1)
    return DRM(backbone, head, {"text_length": 7}).eval().requires_grad_(False)


def inputs(height=6, width=10):
    generator = torch.Generator().manual_seed(0)
    shapes = (2, 16, height, width), (2, 7, 256), (2, 256)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def expected_head(head, velocity):
    """The published description, in plain functions and by the published names."""
    weights, image = head.state_dict(), velocity
    for name in ("down1", "down2", "down3"):
        image = F.conv2d(image, weights[f"{name}.0.weight"], weights[f"{name}.0.bias"], stride=2, padding=1)
        image = F.group_norm(image, 32, weights[f"{name}.1.weight"], weights[f"{name}.1.bias"])
        image = image.clamp(min=0)
    hidden = image.flatten(2).mean(2) @ weights["mlp.0.weight"].T + weights["mlp.0.bias"]
    return (hidden.clamp(min=0) @ weights["mlp.3.weight"].T + weights["mlp.3.bias"]).squeeze(1)


def test_of_all_blocks_the_velocity_is_the_models_own(transformer):
    """Nothing cut off: the head then reads what diffusers' transformer returns."""
    latents, embeds, pooled = inputs()
    drm = make(transformer, 3)
    timestep = torch.tensor([300.0, 300.0])
    own = transformer(latents, embeds, pooled, timestep, return_dict=False)[0]
    features = drm.backbone.features(latents, timestep, embeds, pooled)
    torch.testing.assert_close(features.velocity, own, atol=1e-4, rtol=0)
    torch.testing.assert_close(
        drm.score(latents, 0.3, embeds, pooled), expected_head(drm.head, own), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("size", [(6, 10), (8, 8), (2, 2)])
@pytest.mark.parametrize("sigma", [0.0, 0.6])
def test_cut_off_it_is_norm_out_and_proj_out_of_the_last_kept_tokens(transformer, size, sigma):
    latents, embeds, pooled = inputs(*size)
    seen = {}
    hook = transformer.transformer_blocks[1].register_forward_hook(
        lambda module, arguments, output: seen.update(tokens=output[1])
    )
    timestep = torch.full((2,), 1000 * sigma)
    transformer(latents, embeds, pooled, timestep)
    hook.remove()
    out = transformer.proj_out(
        transformer.norm_out(seen["tokens"], transformer.time_text_embed(timestep, pooled))
    )
    rows, columns = size[0] // 2, size[1] // 2
    velocity = torch.empty(2, 16, *size)
    for row in range(rows):
        for column in range(columns):
            patch = out[:, row * columns + column].reshape(2, 2, 2, 16)
            velocity[:, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2] = patch.permute(0, 3, 1, 2)
    drm = make(transformer)
    wanted = expected_head(drm.head, velocity)
    torch.testing.assert_close(drm.score(latents, sigma, embeds, pooled), wanted, atol=1e-4, rtol=0)
    torch.testing.assert_close(drm(latents, sigma, embeds, pooled), wanted, atol=1e-4, rtol=0)


def test_a_file_holds_it(transformer, tmp_path):
    latents, embeds, pooled = inputs()
    drm = make(transformer)
    save_drm(drm, tmp_path / "drm.safetensors")
    loaded = load_drm(tmp_path / "drm.safetensors")
    assert loaded.head.to_dict() == drm.head.to_dict()
    assert {"backbone.norm_out.linear.weight", "backbone.proj_out.weight", "head.down3.1.bias"} <= set(
        loaded.state_dict()
    )
    assert torch.equal(loaded.score(latents, 0.4, embeds, pooled), drm.score(latents, 0.4, embeds, pooled))


def test_it_needs_the_models_last_layers(transformer):
    backbone = backbone_from_transformer(transformer, 2)
    with pytest.raises(
        ValueError, match=r"keeps norm_out and proj_out for 16 channels, this one has .* False"
    ):
        DRM(backbone, ConvGNHead())
    backbone = backbone_from_transformer(transformer, 2, keeps_output=True)
    with pytest.raises(ValueError, match="velocity of 4 channels"):
        DRM(backbone, ConvGNHead(channels=4))
    with pytest.raises(ValueError, match="coarse must be 1"):
        coarsened(backbone.state_dict(), backbone.config, 2)


def test_what_a_row_drops_depends_on_its_number_alone():
    dropout, x = RowDropout(0.25).train(), torch.ones(3, 4000)
    dropout.numbers = [5, 6, 5]
    dropped = dropout(x)
    assert torch.equal(dropped[0], dropped[2])
    assert not torch.equal(dropped[0], dropped[1])
    assert dropped.unique().tolist() == pytest.approx([0.0, 4 / 3])
    assert abs((dropped == 0).float().mean().item() - 0.25) < 0.02
    dropout.numbers = [6]
    assert torch.equal(dropout(x[:1])[0], dropped[1])
    with pytest.raises(ValueError, match="1 numbers for a dropout of 3 rows"):
        dropout(x)
    dropout.numbers = None
    assert (dropout(x) == 0).any()
    assert torch.equal(dropout.eval()(x), x)


def test_sd35_large_has_as_many_weights_as_worked_out_by_hand():
    """33 of 38 blocks of width 2432, no dual attention; the last one without its text output."""
    config = sd35_large_config()
    assert (config.width, config.num_kept, config.num_layers, config.dual_attention_layers) == (
        2432,
        33,
        38,
        (),
    )
    with torch.device("meta"):
        backbone = TruncatedSD3(config)
    d = 2432
    linear = d * d + d
    block = (
        2 * (6 * linear)  # modulations of image and text
        + 8 * linear  # q, k, v, out of both
        + 4 * 64  # norms of q and k in both
        + 2 * (2 * (4 * d * d) + 4 * d + d)  # feed-forwards
    )
    # The last: text modulation 2 parts of 6, no text output projection, no text feed-forward.
    last = block - 4 * linear - linear - (8 * d * d + 5 * d)
    embedders = (
        (16 * 4 * d + d)  # patches
        + (256 * d + d + linear)  # time
        + (2048 * d + d + linear)  # pooled text
        + (4096 * d + d)  # text
    )
    assert sum(p.numel() for p in backbone.parameters()) == 32 * block + last + embedders
    assert backbone.pos_embed.pos_embed.shape == (1, 192 * 192, d)
