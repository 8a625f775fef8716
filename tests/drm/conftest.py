"""Random models built once for the whole folder."""

import pytest
import torch

from tests.tiny import build_demo_family, tiny_drm, tiny_transformer


@pytest.fixture(scope="session")
def family(tmp_path_factory):
    """The demo family's files with random weights, in the shipped shape."""
    return build_demo_family(tmp_path_factory.mktemp("family"), hidden=256, depth=4)


@pytest.fixture(scope="session")
def transformer():
    """SD3Transformer2DModel: 3 blocks of width 128, dual attention in block 0 only."""
    return tiny_transformer(hidden=128, depth=3, dual_attention_layers=(0,), joint_attention_dim=48)


@pytest.fixture(scope="session")
def drm():
    return tiny_drm(hidden=128, depth=3, num_kept=2, joint_attention_dim=48, pooled_projection_dim=32)


@pytest.fixture
def inputs():
    """(latents, prompt_embeds, pooled_prompt_embeds) for the model of the `drm` fixture, batch 5."""
    generator = torch.Generator().manual_seed(0)
    shapes = (5, 16, 12, 8), (5, 20, 48), (5, 32)
    return tuple(torch.randn(shape, generator=generator) for shape in shapes)
